//! The zTOC of SOCI (`ztoc.fbs`, version 0.9): reading with every bound checked, and writing the same bytes that AWS's tool writes. Pure.
//!
//! A zTOC's windows stay in its bytes (the file is memory-mapped); a [`SpanTable`] only says where. What is refused here though AWS's
//! reader takes it is listed in `docs/soci.md`.

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

mod flatbuffer;
mod header;
mod read;
mod slots;
mod spans;
mod time;
mod write;
mod zinfo;

use std::ops::Range;

use crate::tar::Entry;

pub use header::{
    EndCheck, HeaderMismatch, check_header, fingerprint, fingerprints, header_fingerprint, storable,
};
pub use spans::{Span, SpanTable};
pub use time::format as rfc3339;
pub use write::{ZtocParts, write};
pub use zinfo::{CheckpointsBuilder, TarInfo, WINDOW_SIZE};

/// A parsed and checked zTOC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ztoc {
    /// `version`, e.g. `0.9`. Not checked, as AWS's reader does not.
    pub version: String,
    /// `build_tool_identifier`.
    pub build_tool: String,
    /// The entries, in tar order.
    pub entries: Vec<Entry>,
    /// The spans.
    pub spans: SpanTable,
    /// Where `checkpoints` stands in the zTOC's own bytes; for [`write()`] and for tests.
    pub checkpoints: Range<usize>,
}

/// How a layer's blob is compressed, as far as a zTOC can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// One or several gzip members.
    Gzip,
    /// A plain tar.
    Uncompressed,
}

impl Ztoc {
    /// Parses and checks untrusted bytes. Bounded in time and memory by their length.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        read::parse(bytes)
    }
}

/// What is wrong with a zTOC. Entries and spans are counted from zero.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are no FlatBuffer of this kind.
    #[error("not a zTOC: what is at byte {offset} leads outside of it")]
    Structure {
        /// The table, vector or field at fault.
        offset: usize,
    },
    /// A part that each zTOC has is not there.
    #[error("the zTOC has no {what}")]
    Missing {
        /// The field's name.
        what: &'static str,
    },
    /// Its parts are shared so often that it says much more than it holds.
    #[error("the zTOC says more than its own length: its parts are shared too often")]
    Amplified,
    /// A compression that is neither gzip nor none.
    #[error(
        "the zTOC is for a layer compressed with algorithm {algorithm}; 1 (gzip) and 2 (none) are known"
    )]
    Compression {
        /// `compression_algorithm`.
        algorithm: i8,
    },
    /// The checkpoints of a gzip layer are cut, or more or fewer than they say.
    #[error("the zTOC's {length} bytes of checkpoints are not as long as their count says")]
    CheckpointsLength {
        /// Bytes.
        length: usize,
    },
    /// The `TarZinfo` of a plain tar cannot be read, or makes no sense.
    #[error("the zTOC's span size and tar size cannot be read or make no sense")]
    TarInfo,
    /// A plain tar whose sizes differ from the blob's.
    #[error(
        "the zTOC is for a plain tar of {tar} bytes, in a blob of {compressed}, that ends at {uncompressed}"
    )]
    TarSize {
        /// `TarZinfo.size`.
        tar: u64,
        /// `compressed_archive_size`.
        compressed: u64,
        /// `uncompressed_archive_size`.
        uncompressed: u64,
    },
    /// The three counts of spans differ.
    #[error(
        "the zTOC counts spans three ways: the last is {max_span_id}, checkpoints {checkpoints}, digests {digests}"
    )]
    SpanCount {
        /// `max_span_id`.
        max_span_id: i32,
        /// Checkpoints.
        checkpoints: u64,
        /// `span_digests`.
        digests: usize,
    },
    /// A span's digest is none, or not SHA-256.
    #[error("span {span}: {text:?} is no SHA-256 digest")]
    Digest {
        /// The span.
        span: usize,
        /// What is there.
        text: String,
    },
    /// One of the archive's two sizes is negative.
    #[error("the zTOC's {which} size is {value}")]
    NegativeSize {
        /// `compressed` or `uncompressed`.
        which: &'static str,
        /// What it is.
        value: i64,
    },
    /// The first checkpoint is not right after a gzip header.
    #[error(
        "the first checkpoint is at {input} of the blob and {output} of the layer; it must be behind the gzip header and at 0"
    )]
    FirstCheckpoint {
        /// Its compressed offset.
        input: u64,
        /// Its uncompressed offset.
        output: u64,
    },
    /// A checkpoint that does not come after the one before it, or has negative offsets.
    #[error("span {span}: its checkpoint and the next are out of order")]
    SpanOrder {
        /// The span.
        span: usize,
    },
    /// More than 7 bits of a byte.
    #[error("span {span}: its checkpoint takes {bits} bits of a byte")]
    CheckpointBits {
        /// The span.
        span: usize,
        /// What is there.
        bits: u8,
    },
    /// A checkpoint behind the blob's end.
    #[error("span {span} starts at {input} of a blob of {blob} bytes")]
    SpanBeyondBlob {
        /// The span.
        span: usize,
        /// Its compressed offset.
        input: u64,
        /// `compressed_archive_size`.
        blob: u64,
    },
    /// A span that is longer than any deflate stream of its length can say.
    #[error(
        "span {span}: {compressed} compressed bytes cannot be {uncompressed} bytes of the layer"
    )]
    SpanTooLong {
        /// The span.
        span: usize,
        /// Its compressed length.
        compressed: u64,
        /// Its length in the layer.
        uncompressed: u64,
    },
    /// The blob that the zTOC is to be used with has another size.
    #[error("the zTOC is for a blob of {table} bytes; this one has {blob}")]
    BlobSize {
        /// `compressed_archive_size`.
        table: u64,
        /// The blob's true size.
        blob: u64,
    },
    /// A file type that is none.
    #[error("entry {index}: {text:?} is no type of file")]
    EntryType {
        /// The entry.
        index: usize,
        /// What is there.
        text: String,
    },
    /// A NUL in a name or in a link's text.
    #[error("entry {index}: its name or link has a NUL")]
    NulInName {
        /// The entry.
        index: usize,
    },
    /// A negative offset or size.
    #[error("entry {index}: {size} bytes at {offset}")]
    EntryRange {
        /// The entry.
        index: usize,
        /// `uncompressed_offset`.
        offset: i64,
        /// `uncompressed_size`.
        size: i64,
    },
    /// Data that starts before the header that must stand before it: AWS's `ErrInvalidTOCEntry`.
    #[error("entry {index}: its data is at {data}, but its header cannot start before {header}")]
    EntryOverlap {
        /// The entry, in tar order.
        index: usize,
        /// Where its header starts at the earliest.
        header: u64,
        /// Where its data starts.
        data: u64,
    },
    /// Data that does not start at a whole block of the tar.
    #[error("entry {index}: its data is at {data}, which is no block of a tar")]
    EntryUnaligned {
        /// The entry, in tar order.
        index: usize,
        /// Where its data starts.
        data: u64,
    },
    /// Data behind the last span.
    #[error("entry {index}: {size} bytes at {data}, but the spans end at {covered}")]
    EntryBeyondEnd {
        /// The entry, in tar order.
        index: usize,
        /// Where its data starts.
        data: u64,
        /// Its size.
        size: u64,
        /// Where the last span ends.
        covered: u64,
    },
    /// A file whose PAX records say that it is sparse: its data is not where a zTOC can say.
    #[error("entry {index} is a sparse file, which no zTOC can describe")]
    SparseEntry {
        /// The entry.
        index: usize,
    },
}
