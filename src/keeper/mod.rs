//! A daemon that dies, and descriptors that do not: the keeper, and what the daemon says to whoever runs it.
//!
//! What runs a daemon starts it, keeps descriptors for it (a *descriptor store*), starts the next one with them when it dies, and kills it
//! when it hangs. That is systemd, or, where systemd does not run it, a *keeper*: a small process of this program ([`keep`]). Both speak the
//! protocol of sd_notify(3) and sd_listen_fds(3), so a daemon has one way ([`Service`]), and does not know which of them it is.

mod death;
mod descriptors;
mod limits;
pub mod message;
mod notify;
mod process;
mod programs;
mod restarts;
mod service;
mod socket;
mod store;
mod watchdog;

pub use limits::MAX_DESCRIPTORS;
pub use notify::Notify;
pub use process::{Plan, RELOAD, RESTART, Times, keep};
pub use service::{Service, Succession};
pub use store::FdStore;
pub use watchdog::{Answer, Check, watch};

/// How often a daemon has to say that it works, before it is taken to hang.
pub const WATCHDOG: std::time::Duration = std::time::Duration::from_secs(20);
