//! The files of a disk's directory: names, formats and checksums.
//!
//! `directory` has their names, `seal` their checksums, `stored_file` opens them. `state` is the content of `state.json`, `disk_record`
//! that of an open disk. `span_table` has the spans, and `disk_layout` relates them to the regions of the ext4 image. `present_spans`
//! records which spans are present (`span_record`), `presence` also which are synced. `pieces` has the checksums of a streamed disk.
//! `uncached_file` reads the ext4 image.

pub(crate) mod directory;
pub(crate) mod disk_layout;
pub(crate) mod disk_record;
pub(crate) mod pieces;
pub(crate) mod presence;
pub(crate) mod present_spans;
pub(crate) mod seal;
pub(crate) mod span_record;
pub(crate) mod span_table;
pub(crate) mod state;
pub(crate) mod stored_file;
pub(crate) mod uncached_file;
