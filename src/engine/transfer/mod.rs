//! Copies images, indexes and the artifacts that refer to them, between registries and layouts.
//!
//! `copy` copies an image with its indexes, `push` an index of this host; `gc` removes indexes of deleted images. `manifests` copies a
//! manifest with everything that it refers to, `referrers` lists the referrers of a manifest, `naming` sets tags. `describe` describes a
//! reference for `inspect`.

pub mod copy;
pub mod describe;
pub mod gc;
pub(crate) mod manifests;
pub(crate) mod naming;
pub mod push;
pub mod referrers;
