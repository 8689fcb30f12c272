//! From one daemon to the next.
//!
//! After a daemon that died, `recover` takes over the attachments that are in use, with their disks and devices. `leftovers` clears the rest
//! away. `hand_over` prepares a planned restart; `formats` are the versions of what one daemon leaves to the next. `restore` attaches kept
//! attachments again after a reboot.

pub(crate) mod formats;
pub(crate) mod hand_over;
pub(crate) mod leftovers;
pub(crate) mod recover;
pub(crate) mod restore;
