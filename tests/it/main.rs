//! The integration tests: one binary, a module a topic.

mod gzip;
mod kernel;
mod nbd;
mod soci;
mod source;
mod support;
