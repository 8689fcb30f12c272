//! Checks of disks, and recordings of starts.
//!
//! `check` compares disks with their checksums and repairs them. `recording` is the temporary directory of a recorded start.

pub mod check;
pub(crate) mod recording;
