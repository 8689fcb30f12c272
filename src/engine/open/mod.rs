//! From an image reference to the opened disks of its layers.
//!
//! image reference -> manifest for the platform (`image`, `platforms`) -> index (`compact_index`, `soci_index`, `local_indexes`, `artifacts`) ->
//! table of each layer -> disk (`disks`). `prefetch` has the disks fetch what the index lists.

pub mod artifacts;
pub mod compact_index;
pub mod disks;
pub mod image;
pub mod local_indexes;
pub mod platforms;
pub(crate) mod prefetch;
pub mod soci_index;
