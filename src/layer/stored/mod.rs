//! The files of a disk's directory: names, formats and checksums.
//!
//! `folder` has their names, `seal` their checksums, `stored_file` opens them. `state` is the state of the directory, `span_table` the
//! spans,
//! `present_spans` which of them are present (`span_record`), `pieces` the checksums of a streamed disk, `uncached_file` the ext4 image.

pub(crate) mod folder;
pub(crate) mod pieces;
pub(crate) mod present_spans;
pub(crate) mod seal;
pub(crate) mod span_record;
pub(crate) mod span_table;
pub(crate) mod state;
pub(crate) mod stored_file;
pub(crate) mod uncached_file;
