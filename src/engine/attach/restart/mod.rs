//! After a daemon that died.
//!
//! `recover` takes over the attachments that are in use, with their disks and devices. `leftovers` clears the rest away.

pub(crate) mod leftovers;
pub(crate) mod recover;
