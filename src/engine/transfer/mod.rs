//! Copies images, indexes and the artifacts that refer to them, between registries and layouts.
//!
//! `copy` copies an image with its indexes, `push` an index of this host; `gc` removes indexes whose images are gone. `manifests` copies
//! what
//! a manifest refers to, `referrers` lists what refers to a manifest, `naming` sets tags. `describe` reports all of a reference.

pub mod copy;
pub mod describe;
pub mod gc;
pub(crate) mod manifests;
pub(crate) mod naming;
pub mod push;
pub mod referrers;
