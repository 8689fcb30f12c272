//! The push parser: takes the uncompressed stream in pieces of any length and says what they are.
//!
//! ```no_run
//! # fn f(pieces: Vec<Vec<u8>>) -> Result<(), socinbd::tar::Error> {
//! use socinbd::tar::{Event, Reader};
//! let mut reader = Reader::new();
//! for piece in &pieces {
//!     let mut rest = &piece[..];
//!     while let Some(event) = reader.next(&mut rest)? {
//!         match event {
//!             Event::Entry { index } => println!("{:?}", reader.entries()[index].name),
//!             Event::Data { index, file_offset, bytes } => println!("{index} {file_offset} {}", bytes.len()),
//!             Event::End => println!("the two zero blocks have passed"),
//!         }
//!     }
//! }
//! let archive = reader.finish()?;
//! # Ok(()) }
//! ```

use super::{Entry, Error};
use crate::units::LayerOffset;

/// What the stream's next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A new entry, all its headers merged: `Reader::entries()[index]`. Indexes count from zero without gaps. Its data follows.
    Entry {
        /// Index into [`Reader::entries`].
        index: usize,
    },
    /// Bytes of the latest entry's data. A sparse file's holes are left out; its data comes at its true offsets.
    Data {
        /// Index into [`Reader::entries`].
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

/// Takes a tar stream's bytes as they come. Holds the entries, and headers in part; never data.
#[derive(Debug, Default)]
pub struct Reader {}

impl Reader {
    /// A reader at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next event in `bytes`, which is moved past what was taken; `None` when all is taken and more is needed. After an error the
    /// reader is of no more use.
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<Event<'a>>, Error> {
        let _ = bytes;
        unimplemented!("module tar")
    }

    /// The entries so far.
    pub fn entries(&self) -> &[Entry] {
        unimplemented!("module tar")
    }

    /// Bytes taken so far.
    pub fn position(&self) -> LayerOffset {
        unimplemented!("module tar")
    }

    /// The end of the stream: an error when it is in the middle of a header or of an entry's data.
    pub fn finish(self) -> Result<Archive, Error> {
        unimplemented!("module tar")
    }
}
