//! What several topics use.

pub mod compare;
pub mod registry;
pub mod vm;
