//! Tar: headers, PAX records, GNU long names, sparse maps, with exact offsets; the entry as SOCI records it. Pure.

#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    missing_docs
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        clippy::expect_used,
        clippy::unwrap_used,
        clippy::panic,
        reason = "a test may fail"
    )
)]

mod event;
mod header;
mod merge;
mod number;
mod pax;
mod reader;
mod sparse;

use bytes::Bytes;

use crate::units::LayerOffset;

pub use event::{Archive, Event, NoZtoc};
pub use reader::Reader;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link; its text is `linkname`.
    Symlink,
    /// A further name of the file that `linkname` names in the same layer.
    Hardlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// A piece of a sparse file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file.
    pub file_offset: u64,
    /// Where in the layer's uncompressed stream.
    pub layer_offset: LayerOffset,
    /// Bytes.
    pub length: u64,
}

/// One entry of a layer, as a zTOC's `FileMetadata` holds it. Merged headers (PAX, GNU long names) are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As in the tar, not cleaned: may start with `./` or `/` and end with `/`. Any bytes but NUL.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Where its data starts.
    pub data_offset: LayerOffset,
    /// Bytes of data; 0 for all but regular files.
    pub size: u64,
    /// Text of a symlink, target of a hard link; on other kinds without meaning.
    pub linkname: Vec<u8>,
    /// The raw mode; the low 12 bits count.
    pub mode: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name; not used for the disk. Entries that have the same share it.
    pub uname: Bytes,
    /// Group's name; not used for the disk.
    pub gname: Bytes,
    /// Modification time; `None` where a zTOC holds no readable one.
    pub mtime: Option<Timestamp>,
    /// Device numbers, for `Char` and `Block`; on other kinds without meaning.
    pub devmajor: i64,
    /// See `devmajor`.
    pub devminor: i64,
    /// All PAX records of the entry, sorted bytewise by key. Xattrs are those that start with `SCHILY.xattr.`.
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// Only for a sparse file: its data, sorted, within `size`. A zTOC cannot hold this.
    pub sparse: Option<Vec<Segment>>,
}

#[cfg(test)]
impl Entry {
    /// An entry without data, owned by root, for tests.
    pub(crate) fn bare(kind: EntryKind, name: &str) -> Self {
        Self {
            name: name.into(),
            kind,
            data_offset: crate::units::LayerOffset(0),
            size: 0,
            linkname: vec![],
            mode: 0o644,
            uid: 0,
            gid: 0,
            uname: Bytes::new(),
            gname: Bytes::new(),
            mtime: None,
            devmajor: 0,
            devminor: 0,
            pax: vec![],
            sparse: None,
        }
    }
}

/// An owner's name, which is that of the `last` entry as a rule.
pub(crate) fn shared(last: Option<&Bytes>, text: &[u8]) -> Bytes {
    match last {
        Some(last) if last == text => last.clone(),
        _ => Bytes::copy_from_slice(text),
    }
}

impl Entry {
    /// The value of one of the entry's PAX records; empty when it has none.
    pub fn pax_record(&self, key: &[u8]) -> &[u8] {
        self.pax
            .binary_search_by(|(name, _)| name.as_slice().cmp(key))
            .ok()
            .and_then(|at| self.pax.get(at))
            .map(|(_, value)| value.as_slice())
            .unwrap_or_default()
    }

    /// Whether the PAX records say that the file is sparse: then its data does not stand in the layer as it is in the file.
    pub fn says_sparse(&self) -> bool {
        sparse::format(|key| self.pax_record(key.as_bytes())).is_some()
    }

    /// About what it takes in memory, in bytes.
    pub(super) fn memory(&self) -> usize {
        /// What an allocation costs besides its bytes.
        const OVERHEAD: usize = 16;
        let strings = [&self.name, &self.linkname];
        let records = self.pax.iter().flat_map(|(key, value)| [key, value]);
        let capacities = strings.into_iter().chain(records).map(Vec::capacity);
        let owners = [&self.uname, &self.gname].map(Bytes::len);
        let bytes = capacities
            .chain(owners)
            .map(|bytes| bytes.saturating_add(OVERHEAD));
        let records = size_of::<(Vec<u8>, Vec<u8>)>().saturating_mul(self.pax.capacity());
        let segments = self.sparse.as_ref().map_or(0, Vec::capacity);
        let lists = records.saturating_add(size_of::<Segment>().saturating_mul(segments));
        bytes
            .fold(lists, usize::saturating_add)
            .saturating_add(size_of::<Entry>())
    }
}

/// The most that one PAX header, GNU long name or sparse map may take, in bytes; Go's limit.
pub const MAX_SPECIAL_SIZE: usize = 1 << 20;

/// The most that a layer's entries may take in memory, in bytes: about four million files.
pub const MAX_TABLE_SIZE: usize = 1 << 30;

/// Why a tar stream could not be read. `offset` is that of the header block at fault in the uncompressed stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The block is no tar header: its checksum is not that of its bytes.
    #[error("no tar header at offset {offset} of the layer: the checksum is wrong")]
    Checksum {
        /// The header.
        offset: LayerOffset,
    },
    /// One zero block; an archive ends with two.
    #[error("a single zero block before offset {offset} of the layer, and data after it")]
    SingleZeroBlock {
        /// The block after the zero block.
        offset: LayerOffset,
    },
    /// A field that holds no number, or one that is out of range.
    #[error("tar header at offset {offset} of the layer: {field} is no number that it can be")]
    Number {
        /// The header.
        offset: LayerOffset,
        /// The field's or the PAX record's name.
        field: &'static str,
    },
    /// A record of a PAX header that breaks its rules.
    #[error("PAX header at offset {offset} of the layer: bad record at its byte {position}")]
    PaxRecord {
        /// The header.
        offset: LayerOffset,
        /// Where in the header's data.
        position: usize,
    },
    /// A PAX header or a GNU long name that is longer than [`MAX_SPECIAL_SIZE`].
    #[error(
        "header at offset {offset} of the layer: {size} bytes of PAX records or name are too many"
    )]
    SpecialTooLong {
        /// The header.
        offset: LayerOffset,
        /// What it says.
        size: u64,
    },
    /// A sparse file's map that makes no sense.
    #[error("sparse file {name:?} at offset {offset} of the layer: {reason}")]
    SparseMap {
        /// The header.
        offset: LayerOffset,
        /// The entry's name.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An entry of a type that no file is (GNU dump folders and volume labels, unknown letters); containerd refuses it too.
    #[error("entry {name:?} at offset {offset} of the layer has the type {:?}, which is no file", char::from(*flag))]
    UnsupportedType {
        /// The header.
        offset: LayerOffset,
        /// The entry's name.
        name: String,
        /// Its type flag.
        flag: u8,
    },
    /// The stream ended too early.
    #[error("the layer ends at offset {offset}, inside {inside}")]
    Truncated {
        /// The stream's end.
        offset: LayerOffset,
        /// What it is in the middle of.
        inside: &'static str,
    },
    /// The entries need more memory than [`MAX_TABLE_SIZE`].
    #[error("the layer's table is too large at its entry {index}: over {MAX_TABLE_SIZE} bytes")]
    TableTooLarge {
        /// The entry at which it was seen.
        index: usize,
    },
}
