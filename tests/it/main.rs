//! The integration tests: one binary, a module a topic.

mod kernel;
mod nbd;
mod source;
mod support;
