//! Writing a table.

use zerocopy::IntoBytes as _;

use super::{
    entries,
    header::{Header, MAGIC, VERSION, compression_code},
    spans::{self, NewSpan},
    wire::put_bytes,
};
use crate::{oci::Digest, tar::Entry, ztoc::Compression};

/// The kinds of sections.
pub(super) const SECTION_SPANS: u8 = 1;
pub(super) const SECTION_ENTRIES: u8 = 2;

/// zstd's level for the body.
const LEVEL: i32 = 19;

/// What a table is made of.
#[derive(Clone, Copy, Debug)]
pub struct NewTable<'a> {
    /// The layer's blob.
    pub layer: Digest,
    /// Its size.
    pub layer_size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// The span size that was asked for.
    pub span_size: u64,
    /// The spans. Their windows stand behind the table in this order.
    pub spans: &'a [NewSpan],
    /// The entries, in tar order.
    pub entries: &'a [Entry],
}

/// The bytes of a table. An error is zstd's, which has no memory.
pub fn write(parts: &NewTable<'_>) -> std::io::Result<Vec<u8>> {
    let spans = spans::encode(parts.compression, parts.layer_size, parts.spans);
    let entries = entries::encode(parts.entries);
    let mut body = Vec::new();
    for (kind, section) in [(SECTION_SPANS, spans), (SECTION_ENTRIES, entries)] {
        body.push(kind);
        put_bytes(&mut body, &section);
    }
    let stored = zstd::bulk::compress(&body, LEVEL)?;
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let size = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    let windows = parts.spans.iter().map(|span| u64::from(span.window_size));
    let header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        compression: compression_code(parts.compression),
        reserved: [0; 3],
        layer: *parts.layer.bytes(),
        layer_size: parts.layer_size.into(),
        span_size: parts.span_size.into(),
        stored_size: size(stored.len()).into(),
        body_size: size(body.len()).into(),
        windows_size: windows.fold(0, u64::saturating_add).into(),
        spans: count(parts.spans.len()).into(),
        entries: count(parts.entries.len()).into(),
    };
    let mut table = header.as_bytes().to_vec();
    table.extend_from_slice(&stored);
    Ok(table)
}
