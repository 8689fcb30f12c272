//! Images and what belongs to them, from and to registries and layouts.
//!
//! `copy` moves an image with its indexes, `push` an index that is stored on this host; `gc` removes indexes that nobody needs. `manifests` follows
//! what a manifest names, `referrers` what names it, `naming` gives tags. `describe` says what an image has.

pub mod copy;
pub mod describe;
pub mod gc;
pub(crate) mod manifests;
pub(crate) mod naming;
pub mod push;
pub mod referrers;
