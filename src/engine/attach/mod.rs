//! From disks to a mount, and back.
//!
//! disk -> device (`devices`) -> ext4 mount -> overlay (`stack`) -> a mount's descriptor: `steps`. `engine` is what all attachments
//! share, `live` has those that are there, `release` gives back what one had, `leftovers` what a daemon that died has left, by its `records`.

pub(crate) mod devices;
pub(crate) mod engine;
pub(crate) mod explain;
pub(crate) mod leftovers;
pub(crate) mod list;
pub(crate) mod live;
pub(crate) mod mount_place;
pub(crate) mod names;
pub(crate) mod open;
pub(crate) mod records;
pub(crate) mod release;
pub(crate) mod stack;
pub(crate) mod steps;
pub(crate) mod types;
