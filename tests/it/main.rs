//! The integration tests: one binary, a module a topic.

mod builder;
mod cli;
mod compact;
mod dependencies;
mod engine;
mod ext4;
mod gzip;
mod keeper;
mod kernel;
mod layer;
mod levels;
mod nbd;
mod observe;
mod outputs;
mod picture;
mod rooms;
mod snapshotter;
mod soci;
mod source;
mod support;
mod tidy;
mod vectors;
