//! Makes indexes, and converts images.
//!
//! `create` makes an index of an image; `convert` makes an image that names its index. Both read each layer once (`layer_pass`) for its
//! zTOC and its part of a compact index (`compact_index`), or reuse existing ones (`reuse`). `options` and `report` are their input and
//! output.

pub(crate) mod compact_index;
pub mod convert;
pub mod create;
pub(crate) mod layer_pass;
pub mod options;
pub(crate) mod parts;
pub(crate) mod prefetch_lists;
pub mod report;
pub(crate) mod reuse;
