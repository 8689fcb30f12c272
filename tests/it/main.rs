//! The integration tests: one binary, a module a topic.

mod kernel;
mod source;
mod support;
