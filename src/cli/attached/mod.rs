//! The commands for attached images and for the daemon.

pub(super) mod attach;
pub(super) mod check;
pub(super) mod daemon;
pub(super) mod detach;
pub(super) mod doctor;
pub(super) mod list;
pub(super) mod run;
pub(super) mod start;
pub(super) mod why;
