//! What images and layers hold on the root, and what may be removed.
//!
//! `image_record` has the images that were opened in the root, with their pins; `in_use` the disks of attachments, `snapshots` those of
//! containerd's snapshots; `usage` what each image and layer holds; `prune` removes what nobody uses, `unused` does so when the disk limit is
//! reached.

pub mod image_record;
pub mod in_use;
pub mod prune;
pub(crate) mod snapshots;
pub(crate) mod unused;
pub mod usage;
