//! From disks to a mount, and back.
//!
//! disk -> device (`devices`) -> ext4 mount -> overlay (`stack`) -> mount descriptor: the steps are in `steps`. `engine` is the state that
//! all attachments share; `open` makes it, `list` reads it, `live` is one attachment in it. `release` undoes an attachment. `restart`
//! takes over the attachments of a daemon that died, by its `records`.

pub(crate) mod devices;
pub(crate) mod engine;
pub(crate) mod explain;
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
