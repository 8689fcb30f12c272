//! From disks to a mount, and back.
//!
//! disk -> device (`devices`, `nbd_connections`) -> ext4 mount -> overlay (`stack`) -> a mount's descriptor: `steps`. `engine` is what all attachments
//! share, `live` has those that are there, `release` gives back what one had, `leftovers` what a daemon that died has left, by its `records`.
//! `explain` says why a read was slow, `check` looks at disks for damage.

pub mod check;
pub(crate) mod devices;
pub(crate) mod engine;
pub(crate) mod explain;
pub(crate) mod kernel_readahead;
pub(crate) mod leftovers;
pub(crate) mod live;
pub(crate) mod metadata_readahead;
pub(crate) mod mount_place;
pub(crate) mod nbd_connections;
pub(crate) mod recording;
pub(crate) mod records;
pub(crate) mod release;
pub(crate) mod stack;
pub(crate) mod steps;
pub(crate) mod types;
