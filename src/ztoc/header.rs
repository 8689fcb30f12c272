//! The table against the tar: whether an entry's header says what the table says of it.

use super::time;
use crate::{
    oci::Digest,
    tar::{Entry, EntryKind, Event, Reader, Timestamp},
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
    /// Entries lead there that the table does not have.
    #[error("the zTOC leaves out an entry of the tar before {data_offset} of the layer")]
    LeftOut {
        /// Where the table says that the data starts.
        data_offset: u64,
    },
    /// The tar goes on behind the table's last entry.
    #[error("the tar goes on at {at} of the layer, and the zTOC ends there")]
    Continued {
        /// Where the last entry's data ends.
        at: u64,
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
    let mut reader = Reader::starting_at(start);
    let header = only_header(&mut reader, entry.data_offset, before)?;
    match difference(entry, header) {
        None => Ok(()),
        Some(field) => Err(HeaderMismatch::Field { data_offset, field }),
    }
}

/// A fingerprint of what [`check_header`] compares, for who cannot keep the entries: the same of a table's entry and of the header
/// that it is true to.
pub fn fingerprint(entry: &Entry) -> [u8; 16] {
    fingerprint_in(&mut Vec::new(), entry)
}

/// The [`fingerprint`]s of these entries.
pub fn fingerprints(entries: &[Entry]) -> impl Iterator<Item = [u8; 16]> {
    let mut bytes = Vec::new();
    entries
        .iter()
        .map(move |entry| fingerprint_in(&mut bytes, entry))
}

/// The same; what is hashed is put together in `bytes`, whatever it had.
fn fingerprint_in(bytes: &mut Vec<u8>, entry: &Entry) -> [u8; 16] {
    let is_regular = entry.kind == EntryKind::Regular;
    let is_link = is_link(entry);
    let is_device = is_device(entry);
    let mtime = storable(entry.mtime);
    let kind = match entry.kind {
        EntryKind::Regular => 0,
        EntryKind::Directory => 1,
        EntryKind::Symlink => 2,
        EntryKind::Hardlink => 3,
        EntryKind::Char => 4,
        EntryKind::Block => 5,
        EntryKind::Fifo => 6,
    };
    let link: &[u8] = if is_link { &entry.linkname } else { &[] };
    bytes.clear();
    bytes.extend_from_slice(&[kind, u8::from(mtime.is_some())]);
    let mtime = mtime.unwrap_or_default();
    for number in [
        if is_regular { entry.size } else { 0 }.to_le_bytes(),
        entry.mode.to_le_bytes(),
        u64::from(entry.uid).to_le_bytes(),
        u64::from(entry.gid).to_le_bytes(),
        mtime.seconds.to_le_bytes(),
        u64::from(mtime.nanoseconds).to_le_bytes(),
        if is_device { entry.devmajor } else { 0 }.to_le_bytes(),
        if is_device { entry.devminor } else { 0 }.to_le_bytes(),
    ] {
        bytes.extend_from_slice(&number);
    }
    // NUL stands in no name, link or key
    for string in [&entry.name, link] {
        bytes.extend_from_slice(string);
        bytes.push(0);
    }
    for (key, value) in xattrs(entry) {
        bytes.extend_from_slice(key);
        bytes.push(0);
        bytes.extend_from_slice(&u64::try_from(value.len()).unwrap_or(u64::MAX).to_le_bytes());
        bytes.extend_from_slice(value);
    }
    let digest = Digest::of(bytes);
    let mut half = [0; 16];
    half.copy_from_slice(digest.bytes().first_chunk::<16>().unwrap_or(&[0; 16])); // it has 32
    half
}

/// The [`fingerprint`] of the header that leads to the data at `data_offset`; the other arguments as for [`check_header`]. `None`
/// where no header leads there, or several do.
pub fn header_fingerprint(
    data_offset: LayerOffset,
    start: LayerOffset,
    before: &[u8],
) -> Option<[u8; 16]> {
    let mut reader = Reader::starting_at(start);
    only_header(&mut reader, data_offset, before)
        .ok()
        .filter(|header| header.sparse.is_none())
        .map(fingerprint)
}

/// Takes what stands behind the data of a table's last entry, piece by piece: no header is there.
#[derive(Debug)]
pub struct EndCheck {
    reader: Reader,
    start: LayerOffset,
}

impl EndCheck {
    /// `start` is the end of the last entry's data, in whole blocks.
    pub fn new(start: LayerOffset) -> Self {
        Self {
            reader: Reader::starting_at(start),
            start,
        }
    }

    /// Takes the next piece.
    pub fn read(&mut self, mut piece: &[u8]) -> Result<(), HeaderMismatch> {
        let at = self.start.get();
        loop {
            match self.reader.next(&mut piece) {
                Ok(None) => return Ok(()),
                Ok(Some(Event::End)) => {}
                Ok(Some(_)) | Err(_) => return Err(HeaderMismatch::Continued { at }),
            }
        }
    }
}

/// The one entry in `before`, if its data starts at `data_offset`.
fn only_header<'a>(
    reader: &'a mut Reader,
    data_offset: LayerOffset,
    before: &[u8],
) -> Result<&'a Entry, HeaderMismatch> {
    let at = data_offset.get();
    let none = || HeaderMismatch::NoHeader { data_offset: at };
    let mut rest = before;
    let mut found = None;
    while let Some(event) = reader.next(&mut rest).map_err(|_| none())? {
        if let Event::Entry { index } = event
            && found.replace(index).is_some()
        {
            return Err(HeaderMismatch::LeftOut { data_offset: at });
        }
    }
    let header = found.and_then(|index| reader.entries().get(index));
    header
        .filter(|header| header.data_offset == data_offset)
        .ok_or_else(none)
}

/// What a zTOC can hold of a header's time.
pub fn storable(mtime: Option<Timestamp>) -> Option<Timestamp> {
    mtime.filter(|mtime| time::has_text(*mtime))
}

fn is_link(header: &Entry) -> bool {
    matches!(header.kind, EntryKind::Symlink | EntryKind::Hardlink)
}

fn is_device(header: &Entry) -> bool {
    matches!(header.kind, EntryKind::Char | EntryKind::Block)
}

fn difference(entry: &Entry, header: &Entry) -> Option<&'static str> {
    let mtime = storable(header.mtime);
    let is_link = is_link(header);
    let is_device = is_device(header);
    let differ = [
        (entry.name != header.name, "name"),
        (entry.kind != header.kind, "type"),
        // nothing else has data; AWS's tool writes what stands in the header of a directory, link or device, where it says nothing
        (
            header.kind == EntryKind::Regular && entry.size != header.size,
            "size",
        ),
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
