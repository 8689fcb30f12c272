//! A snapshotter of containerd: its snapshots API version 1 as gRPC on Unix sockets, in the daemon.
//!
//! A *snapshot* is a layer of an image (committed), the writable layer of a container or of an extraction (active), or a read-only one
//! (view). A committed snapshot is a directory that containerd has filled, or a *lazy layer*: the file system of a disk of the engine.
//!
//! request (`server`, `service`) -> labels (`labels`) -> image that is opened (`images`) as `rules` choose -> record (`records`) -> mounted layers of the
//! chain (`chain`) -> mounts that containerd makes (`mounts`). `owners` maps the owners of layers for user namespaces. `filters` are those of
//! a list. `proto` is generated code. `image_service` notes the credentials of pulls, and `claims` tells which images contradict each other.

mod chain;
mod changes;
mod claims;
mod errors;
pub mod filters;
mod image_service;
mod images;
pub mod labels;
mod mounts;
mod options;
mod prepare;
pub mod proto;
pub mod records;
mod rules;
pub mod server;
mod service;
mod set;
mod socket;

pub(crate) use image_service::take_over_credentials;
pub use options::{ImageServiceOptions, PullLimits, SnapshotterOptions, Unproven};
pub use rules::{PULL_LABEL, Pull, Rule};
pub use server::Server;
