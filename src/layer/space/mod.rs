//! The space of disks on the local file system.
//!
//! `budget` counts it and has the limits. `evict` makes room: it removes layers that nobody uses (`remove`), and then the least recently used
//! spans of open disks (`span_uses`).

pub(crate) mod budget;
pub(crate) mod evict;
pub(crate) mod measure;
mod remove;
pub(crate) mod span_uses;
