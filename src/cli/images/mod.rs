//! The commands for images and their indexes.

pub(super) mod artifacts;
pub(super) mod cat;
pub(super) mod convert;
pub(super) mod copy;
pub(super) mod index;
pub(super) mod inspect;
pub(super) mod making;
pub(super) mod prefetch;
pub(super) mod record;
pub(super) mod serve;
pub(super) mod ztoc;
