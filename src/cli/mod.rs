//! The command line.

pub mod ztoc;
