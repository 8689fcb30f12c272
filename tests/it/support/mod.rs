//! What several topics use.

pub mod registry;
