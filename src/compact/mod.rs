//! The compact index: a layer's files and spans in a table that is small enough to be fetched before the first read, with spans as fine
//! as the layer's deflate blocks, and behind the table each span's window, to be fetched when it is needed. `docs/compact.md` is the
//! specification. Pure.
//!
//! A zTOC holds 32 KiB of window a span, so its spans must be large; here a window is reduced to the bytes that its span refers to.
//! A span's digest is of its output: it covers the window, the checkpoint and the compressed bytes at once.

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

mod entries;
mod header;
pub mod manifest;
mod read;
mod spans;
pub mod window;
mod wire;
mod write;

use crate::{oci::Digest, tar::Entry, ztoc::SpanTable};

pub use header::HEADER_SIZE;
pub use spans::NewSpan;
pub use write::{NewTable, write};

/// The span size where none is asked for, in bytes: `docs/compact.md` has the measurements.
pub const DEFAULT_SPAN_SIZE: u64 = 128 << 10;

/// The longest table that is read, in bytes as it is stored. The largest image of the lab (20,000 files, 1.7 GB) needs half a MiB.
pub const MAX_TABLE_SIZE: u64 = 64 << 20;

/// The most that a table may unpack to, in bytes.
pub const MAX_BODY_SIZE: u64 = 256 << 20;

/// The table of a layer, parsed and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The layer's blob.
    pub layer: Digest,
    /// The entries, in tar order; what a zTOC of the same layer has.
    pub entries: Vec<Entry>,
    /// The spans. Other than a zTOC's: their digests are of their *uncompressed* bytes, and a window is where the reduced window is
    /// stored in the compact index's blob (`None`: the span refers to nothing before it).
    pub spans: SpanTable,
    /// Bytes of the blob: the table and the windows.
    pub blob_size: u64,
}

impl Table {
    /// Parses and checks untrusted bytes: a table, all of it and nothing more. Time and memory are bounded by [`MAX_BODY_SIZE`] and by
    /// what entries may take, whatever the bytes say.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        read::parse(bytes)
    }

    /// Checks that the table is about a layer of this digest and size, and in a blob of a compact index of this size. What imports it
    /// must ask: whoever made the manifest has said so, not who made the table.
    pub fn check(&self, layer: &Digest, layer_size: u64, blob_size: u64) -> Result<(), Error> {
        if self.layer != *layer || self.spans.compressed_size != layer_size {
            return Err(Error::OtherLayer {
                layer: self.layer,
                size: self.spans.compressed_size,
            });
        }
        if self.blob_size != blob_size {
            return Err(Error::OtherBlob {
                size: self.blob_size,
            });
        }
        Ok(())
    }
}

/// What is wrong with a table. Entries and spans are counted from zero.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The first bytes are not those of a table.
    #[error("no table of a compact index: its first bytes are others")]
    Magic,
    /// A later version.
    #[error("the compact index has version {version}; {known} is known", known = header::VERSION)]
    Version {
        /// What it says.
        version: u32,
    },
    /// A field of the header that makes no sense.
    #[error("the table's header has the impossible {field} {value}")]
    Header {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
    /// The table is longer or shorter than its header says.
    #[error("the table has {found} bytes, and its header says {stated}")]
    Length {
        /// By the header.
        stated: u64,
        /// As found.
        found: u64,
    },
    /// The body is no zstd, or unpacks to more or less than the header says.
    #[error("the table's body does not unpack to {stated} bytes")]
    Body {
        /// By the header.
        stated: u64,
    },
    /// A section that this version does not know, and that is not optional.
    #[error("the table has a section of the unknown kind {kind}")]
    Section {
        /// Its kind.
        kind: u8,
    },
    /// A section that every table has is not there, or is there twice.
    #[error("the table has not one section of {what}")]
    SectionCount {
        /// What it is of.
        what: &'static str,
    },
    /// A part ends too early, or not where it should.
    #[error("the table's {part} are not as long as they should be")]
    Part {
        /// The part.
        part: &'static str,
    },
    /// A span without output.
    #[error("span {span} is empty")]
    EmptySpan {
        /// The span.
        span: usize,
    },
    /// A span that cannot lie where the table says, or not in a blob of this size.
    #[error("span {span} lies at {start} to {end} of a blob of {blob} bytes")]
    SpanPlace {
        /// The span.
        span: usize,
        /// Where it starts in the blob.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The blob's size.
        blob: u64,
    },
    /// More than 7 bits of a byte, or bits of a byte that the first span does not share.
    #[error("span {span} starts with {bits} bits of a byte")]
    SpanBits {
        /// The span.
        span: usize,
        /// What is there.
        bits: u8,
    },
    /// A span that is longer than any deflate stream of its length can say.
    #[error("span {span}: {compressed} compressed bytes cannot be {uncompressed} of the layer")]
    SpanTooLong {
        /// The span.
        span: usize,
        /// Its compressed length.
        compressed: u64,
        /// Its length in the layer.
        uncompressed: u64,
    },
    /// A stored window that is too long, or windows that are not as long in all as the header says.
    #[error("span {span}: its window cannot have {length} bytes")]
    WindowLength {
        /// The span.
        span: usize,
        /// What it says.
        length: u64,
    },
    /// A file type that is none.
    #[error("entry {index}: {kind} is no type of file")]
    EntryKind {
        /// The entry.
        index: usize,
        /// What is there.
        kind: u8,
    },
    /// A number that is out of its range.
    #[error("entry {index}: {value} cannot be its {field}")]
    EntryNumber {
        /// The entry.
        index: usize,
        /// The field.
        field: &'static str,
        /// What is there.
        value: u64,
    },
    /// Data behind the last span.
    #[error("entry {index}: {size} bytes at {data}, but the spans end at {covered}")]
    EntryBeyondEnd {
        /// The entry.
        index: usize,
        /// Where its data starts.
        data: u64,
        /// Its size.
        size: u64,
        /// Where the last span ends.
        covered: u64,
    },
    /// A file whose PAX records say that it is sparse: its data is not where a table can say.
    #[error("entry {index} is a sparse file, which no table can describe")]
    SparseEntry {
        /// The entry.
        index: usize,
    },
    /// The entries need more memory than [`crate::tar::MAX_TABLE_SIZE`].
    #[error("the table is too large at its entry {index}")]
    TooLarge {
        /// The entry at which it was seen.
        index: usize,
    },
    /// The windows behind the table are more or fewer than those that the blob has.
    #[error("the table is of a compact index's blob of {size} bytes")]
    OtherBlob {
        /// By the table.
        size: u64,
    },
    /// The table is about another layer, or about a blob of another size.
    #[error("the table is about the layer {layer} of {size} bytes")]
    OtherLayer {
        /// The layer.
        layer: Digest,
        /// Its size.
        size: u64,
    },
}
