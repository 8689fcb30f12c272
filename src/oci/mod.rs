//! OCI image specification 1.1 and its names: references, digests, manifests, platforms, media types. Pure.
//!
//! The wire structures are those of the crate `oci-spec`; this module adds what that crate lacks, and limits for outside data.

pub mod artifact;
pub mod config;
pub mod descriptor;
pub mod digest;
pub mod index_edit;
pub mod manifest;
pub mod media_type;
pub mod pattern;
pub mod platform;
mod process;
pub mod reference;
pub mod referrers;

pub use config::ImageConfig;
pub use digest::Digest;
pub use media_type::Packing;
pub use platform::Platform;
pub use process::Process;
pub use reference::Reference;
