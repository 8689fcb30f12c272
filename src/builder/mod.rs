//! The builder: a service that makes SOCI indexes for images as they are pushed.
//!
//! A registry posts its [`event`]s; [`rules`] say which of the images get an index and under what tag; they wait in the [`queue`], a
//! folder, until a worker has made and pushed it. Nothing is trusted in an event but the names in it, and they lead to one registry.

mod build;
pub mod event;
mod metrics;
pub mod queue;
pub mod rules;
mod service;

pub use build::Build;
pub use service::{Secret, Service};
