//! Detects and repairs damage of a disk's own files.
//!
//! `mend` makes files anew from the stored table, `metadata` the metadata of the file system. `lost_spans` finds spans that the local disk
//! has
//! not kept. `scrub` checks all of a disk, and `pieces` one that was streamed; `report` is their result.

pub(crate) mod lost_spans;
pub(crate) mod mend;
pub(crate) mod metadata;
pub(crate) mod pieces;
pub(crate) mod report;
pub(crate) mod scrub;
pub(crate) mod table_repair;
