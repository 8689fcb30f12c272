//! The integration tests: one binary, a module a topic.

mod kernel;
mod soci;
mod source;
mod support;
