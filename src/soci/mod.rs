//! SOCI index manifests v1 and v2, conversion to v2, prefetch artifacts, and the builder that makes a zTOC from a layer as it passes. Pure.

pub mod build;
pub mod convert;
pub mod files;
pub mod index;
mod json;
pub mod prefetch;

pub use json::TypeError;
