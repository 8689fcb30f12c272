//! From an image reference to the opened disks of its layers.
//!
//! image reference -> manifest for the platform (`image`, `platforms`) -> index (`search`, `policy`; `compact_index`, `soci_index`,
//! `local_indexes`) -> table of each layer -> disk (`disks`). `prefetch` fetches the spans that the index lists for a start.

pub mod artifacts;
pub mod compact_index;
pub mod disks;
pub mod image;
pub(crate) mod image_index;
pub mod local_indexes;
pub(crate) mod nested_indexes;
pub mod opened;
pub mod platforms;
pub mod policy;
pub(crate) mod prefetch;
mod resolve;
pub mod search;
pub mod soci_index;
