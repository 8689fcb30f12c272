//! From disks to a mount, and back.
//!
//! disk -> device (`devices`) -> ext4 mount -> overlay (`stack`) -> mount descriptor: the steps are in `steps`. `engine` is the state that
//! all attachments share; `open` makes it, `list` reads it, `live` is one attachment in it. `release` undoes an attachment. `restart`
//! takes over the attachments of a daemon that died, by its `records`, and attaches kept images again, by each `kept_record`. `layer_mounts`
//! are mounts of single layers.

pub(crate) mod devices;
pub(crate) mod engine;
pub(crate) mod explain;
pub(crate) mod kept_record;
pub(crate) mod layer_mounts;
pub(crate) mod list;
pub(crate) mod live;
pub(crate) mod mount_place;
pub(crate) mod names;
pub(crate) mod open;
pub(crate) mod records;
pub(crate) mod release;
pub(crate) mod restart;
pub(crate) mod stack;
pub(crate) mod steps;
pub(crate) mod types;
