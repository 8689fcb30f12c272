//! The builder: a service that makes SOCI indexes for images when they are pushed.
//!
//! A registry posts its [`event`]s. The [`rules`] decide which images get an index, and under what tag. These wait in the [`queue`], a
//! directory, until a worker has made and pushed the index. Only the names in an event are used, and they lead to one registry.

mod build;
pub mod event;
mod metrics;
pub mod queue;
pub mod rules;
mod service;

pub use build::Build;
pub use service::{Secret, Service};
