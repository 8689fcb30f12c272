//! Detects and repairs damage of a disk's own files.
//!
//! `from_table` makes files again from the stored table, and `metadata` the metadata of the file system. `table_repair` is the state of a
//! damaged table. `lost_spans` finds spans that the local disk has not kept. `scrub` checks all of a disk, `pieces` the disk of a streamed
//! layer, and `report` has the result.

pub(crate) mod from_table;
pub(crate) mod lost_spans;
pub(crate) mod metadata;
pub(crate) mod pieces;
pub(crate) mod report;
pub(crate) mod scrub;
pub(crate) mod table_repair;
