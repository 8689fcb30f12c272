//! The table against the tar: whether an entry's header says what the table says of it.

use super::time;
use crate::{
    tar::{Entry, EntryKind, Event, Reader},
    units::LayerOffset,
};

/// What a table says of an entry and its tar does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderMismatch {
    /// No header leads to the entry's data.
    #[error("no tar header stands before {data_offset} of the layer")]
    NoHeader {
        /// Where the table says that the data starts.
        data_offset: u64,
    },
    /// The header says something else.
    #[error("the tar header before {data_offset} of the layer has another {field} than the zTOC")]
    Field {
        /// Where the data starts.
        data_offset: u64,
        /// The field.
        field: &'static str,
    },
}

/// Checks an entry against the layer's bytes from the end of the entry before it (in whole blocks) up to its data, which start at
/// `start`. A span's digest does not show this: who makes a table may say other things of a layer than the layer does.
///
/// AWS's daemon checks the same before it reads a file; like it, this leaves the owners' names and PAX records that are no xattrs
/// out.
pub fn check_header(
    entry: &Entry,
    start: LayerOffset,
    before: &[u8],
) -> Result<(), HeaderMismatch> {
    let data_offset = entry.data_offset.get();
    let missing = HeaderMismatch::NoHeader { data_offset };
    let mut reader = Reader::starting_at(start);
    let mut rest = before;
    let mut found = None;
    loop {
        match reader.next(&mut rest) {
            Ok(Some(Event::Entry { index })) => found = Some(index),
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(_) => return Err(missing),
        }
    }
    let header = found
        .and_then(|index| reader.entries().get(index))
        .filter(|header| header.data_offset == entry.data_offset)
        .ok_or(missing)?;
    match difference(entry, header) {
        None => Ok(()),
        Some(field) => Err(HeaderMismatch::Field { data_offset, field }),
    }
}

fn difference(entry: &Entry, header: &Entry) -> Option<&'static str> {
    // what a table can hold of the header's time
    let mtime = header
        .mtime
        .and_then(|mtime| time::parse(time::format(mtime).as_bytes()));
    let is_link = matches!(header.kind, EntryKind::Symlink | EntryKind::Hardlink);
    let is_device = matches!(header.kind, EntryKind::Char | EntryKind::Block);
    let differ = [
        (entry.name != header.name, "name"),
        (entry.kind != header.kind, "type"),
        (entry.size != header.size, "size"),
        (header.sparse.is_some(), "map of holes"),
        (is_link && entry.linkname != header.linkname, "link"),
        (entry.mode != header.mode, "mode"),
        (entry.uid != header.uid, "owner"),
        (entry.gid != header.gid, "group"),
        (entry.mtime != mtime, "modification time"),
        (
            is_device && entry.devmajor != header.devmajor,
            "major number",
        ),
        (
            is_device && entry.devminor != header.devminor,
            "minor number",
        ),
        (!xattrs(entry).eq(xattrs(header)), "set of xattrs"),
    ];
    differ
        .iter()
        .find(|(differs, _)| *differs)
        .map(|(_, field)| *field)
}

fn xattrs(entry: &Entry) -> impl Iterator<Item = &(Vec<u8>, Vec<u8>)> {
    entry
        .pax
        .iter()
        .filter(|(key, _)| key.starts_with(b"SCHILY.xattr."))
}
