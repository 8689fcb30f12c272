//! The NBD protocol server: handshake and transmission over any stream.

pub mod protocol;
