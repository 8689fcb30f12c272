//! The commands for attached images and for the daemon.

pub(super) mod attach;
pub(super) mod check;
pub(super) mod daemon;
pub(super) mod detach;
pub(super) mod doctor;
pub(super) mod log_level;
mod reload;
pub(super) mod replace;
pub(super) mod restore;
pub(super) mod run;
pub(super) mod snapshotter;
pub(super) mod start;
