//! The zTOC of SOCI (`ztoc.fbs`, version 0.9): reading with every bound checked, and writing the same bytes that AWS's tool writes. Pure.
//!
//! The shape that other modules use. A zTOC's windows stay in its bytes (the file is memory-mapped); a [`SpanTable`] only says where.

mod write;
mod zinfo;

pub use write::{ZtocParts, write};
pub use zinfo::{CheckpointsBuilder, TarInfo, WINDOW_SIZE};

use std::ops::Range;

use crate::{
    oci::Digest,
    tar::Entry,
    units::{CompressedOffset, LayerOffset, SpanId},
};

/// A parsed and checked zTOC.
#[derive(Clone, Debug)]
pub struct Ztoc {
    /// `version`, e.g. `0.9`.
    pub version: String,
    /// `build_tool_identifier`.
    pub build_tool: String,
    /// The entries, in tar order.
    pub entries: Vec<Entry>,
    /// The spans.
    pub spans: SpanTable,
}

/// How a layer's blob is compressed, as far as a zTOC can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// One or several gzip members.
    Gzip,
    /// A plain tar.
    Uncompressed,
}

/// One span: the bytes of the layer from one checkpoint to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the blob that are fetched and that the digest covers. For gzip with `bits != 0` the first byte is shared with the
    /// span before.
    pub compressed: Range<CompressedOffset>,
    /// Bytes of the layer that it decodes to. May be empty.
    pub uncompressed: Range<LayerOffset>,
    /// SHA-256 of the compressed bytes.
    pub digest: Digest,
    /// 0 to 7: bits of the first byte that belong to this span; 0 means that it starts on a whole byte.
    pub bits: u8,
    /// Where the 32 KiB window stands in the zTOC's own bytes. `None`: all zero, or not needed (uncompressed).
    pub window: Option<Range<usize>>,
}

/// All spans of a layer, in order; consecutive in the layer.
#[derive(Clone, Debug)]
pub struct SpanTable {
    /// How the blob is compressed.
    pub compression: Compression,
    /// The blob's size.
    pub compressed_size: u64,
    /// The size of the layer as the zTOC records it (position after the tar's end blocks).
    pub uncompressed_size: u64,
    /// The span size that was asked for at the making.
    pub span_size: u64,
    /// The spans.
    pub spans: Vec<Span>,
}

impl SpanTable {
    /// The spans that hold this range of the layer; empty for an empty range.
    pub fn covering(&self, range: Range<LayerOffset>) -> Range<SpanId> {
        let _ = range;
        unimplemented!("module ztoc")
    }
}

impl Ztoc {
    /// Parses and checks untrusted bytes. Bounded in time and memory by their length.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let _ = bytes;
        unimplemented!("module ztoc")
    }
}

/// What is wrong with a zTOC.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
