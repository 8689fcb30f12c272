//! The integration tests: one binary, a module a topic.

mod ext4;
mod gzip;
mod kernel;
mod nbd;
mod soci;
mod source;
mod support;
mod vectors;
