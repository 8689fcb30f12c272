//! The files of a disk's folder: their names, formats and checks.
//!
//! `folder` has their names, `seal` their checks, `stored_file` their descriptors. `state` is what the folder is worth, `span_table` where the spans
//! are and what they hold, `present_spans` which of them are on the disk (`span_record`), `uncached_file` the ext4 image itself.

pub(crate) mod folder;
pub(crate) mod pieces;
pub(crate) mod present_spans;
pub(crate) mod seal;
pub(crate) mod span_record;
pub(crate) mod span_table;
pub(crate) mod state;
pub(crate) mod stored_file;
pub(crate) mod uncached_file;
