//! The integration tests: one binary, a module a topic.

mod source;
mod support;
