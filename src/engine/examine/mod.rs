//! What people ask of disks.
//!
//! `check` holds them against their checks; `recording` is where the reads of a start are noted.

pub mod check;
pub(crate) mod recording;
