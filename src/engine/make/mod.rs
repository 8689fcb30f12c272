//! Indexes and converted images.
//!
//! `create` makes an image's index, `convert` an image that names it. Both pass over each layer once (`layer_pass`) for its zTOC and its part of
//! a compact index (`compact_index`), unless one that is known will do (`reuse`).

pub(crate) mod compact_index;
pub mod convert;
pub mod create;
pub(crate) mod layer_pass;
pub mod options;
pub(crate) mod parts;
pub(crate) mod prefetch_lists;
pub mod report;
pub(crate) mod reuse;
