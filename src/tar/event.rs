//! What the reader says: events as a stream passes, and the whole at its end.

use super::Entry;
use crate::units::LayerOffset;

/// What the stream's next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A new entry, all its headers merged: `Reader::entries()[index]`. Indexes count from zero without gaps. Its data follows.
    Entry {
        /// Index into [`Reader::entries`](super::Reader::entries).
        index: usize,
    },
    /// Bytes of the latest entry's data. A sparse file's holes are left out; its data comes at its true offsets.
    Data {
        /// Index into [`Reader::entries`](super::Reader::entries).
        index: usize,
        /// Where in the file.
        file_offset: u64,
        /// Never empty.
        bytes: &'a [u8],
    },
    /// The two zero blocks that end the archive. What follows is taken and ignored. Not seen when a stream ends without them.
    End,
}

/// Why no zTOC can describe a layer, though its files are all well.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoZtoc {
    /// A sparse file: a zTOC has one offset a file.
    Sparse {
        /// The first such entry.
        index: usize,
    },
    /// A PAX global header before a regular file: AWS's daemon looks for a file's own header where the entry before ends, and would
    /// find the global one.
    GlobalHeader {
        /// The file behind the header.
        index: usize,
    },
}

impl std::fmt::Display for NoZtoc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sparse { index } => write!(f, "entry {index} is a sparse file"),
            Self::GlobalHeader { index } => {
                write!(f, "a PAX global header stands before entry {index}")
            }
        }
    }
}

/// A tar stream that has ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// All entries, in order.
    pub entries: Vec<Entry>,
    /// Right after the two zero blocks, or the stream's end where they are missing: what SOCI writes as `uncompressed_archive_size`.
    pub end: LayerOffset,
    /// The length of the whole stream, with what follows the end.
    pub stream_size: u64,
    /// Why these entries cannot stand in a zTOC.
    pub no_ztoc: Option<NoZtoc>,
}
