//! Damage of a folder's own files, found and mended.
//!
//! `mend` makes files anew from the stored table, `metadata` the file system's metadata. `lost_spans` says which spans the local disk has not kept.
//! `scrub` looks at all of a disk, and `pieces` at one that was streamed.

pub(crate) mod lost_spans;
pub(crate) mod mend;
pub(crate) mod metadata;
pub(crate) mod pieces;
pub(crate) mod report;
pub(crate) mod scrub;
