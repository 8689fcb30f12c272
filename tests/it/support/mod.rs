//! What several topics use.

pub mod registry;
pub mod vm;
