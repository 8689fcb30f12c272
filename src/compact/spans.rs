//! The section of spans: columns of numbers, then the digests.

use super::{
    Error,
    header::Header,
    window::MAX_STORED_SIZE,
    wire::{Cursor, put, put_bytes},
};
use crate::{
    oci::Digest,
    units::{CompressedOffset, LayerOffset},
    ztoc::{Compression, Span, SpanTable},
};

/// The shortest gzip header.
const GZIP_HEADER_SIZE: u64 = 10;

/// The most bytes that one byte of a deflate stream can say: four pairs of a one-bit length code (258) and a one-bit distance.
const MAX_EXPANSION: u64 = 1032;

const DIGEST_SIZE: usize = 32;

/// A span to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSpan {
    /// Its first byte in the blob, with the span before where `bits` is not 0. Not stored for a plain tar.
    pub compressed_start: CompressedOffset,
    /// So many high bits (0 to 7) of the first byte belong to it; 0: all.
    pub bits: u8,
    /// Bytes of the layer.
    pub length: u64,
    /// SHA-256 of these bytes.
    pub digest: Digest,
    /// Bytes of its stored window.
    pub window_size: u32,
}

/// The section's bytes. The last span ends with the blob.
pub(super) fn encode(compression: Compression, blob_size: u64, spans: &[NewSpan]) -> Vec<u8> {
    let mut section = Vec::new();
    let mut column = Vec::new();
    let mut end_column = |column: &mut Vec<u8>| {
        put_bytes(&mut section, column);
        column.clear();
    };
    if compression == Compression::Gzip {
        let starts = spans.iter().map(|span| span.compressed_start.get());
        let mut last = 0_u64;
        for start in starts.chain([blob_size]) {
            put(&mut column, start.saturating_sub(last));
            last = start;
        }
        end_column(&mut column);
        column.extend(spans.iter().map(|span| span.bits));
        end_column(&mut column);
        for span in spans {
            put(&mut column, span.window_size.into());
        }
        end_column(&mut column);
    }
    for span in spans {
        put(&mut column, span.length);
    }
    end_column(&mut column);
    for span in spans {
        section.extend_from_slice(span.digest.bytes());
    }
    section
}

/// The columns of a section.
struct Columns<'a> {
    /// Where each span starts after the one before, and then the end; only for gzip, as are bits and windows.
    starts: Cursor<'a>,
    bits: Cursor<'a>,
    windows: Cursor<'a>,
    lengths: Cursor<'a>,
}

/// Parses the section. `windows_at` is where the windows start in the compact index's blob.
pub(super) fn parse(section: &[u8], header: &Header, windows_at: u64) -> Result<SpanTable, Error> {
    const PART: &str = "columns of spans";
    let compression = header.compression()?;
    let is_gzip = compression == Compression::Gzip;
    let mut section = Cursor::new(section, PART);
    let mut gzip_column = |part| match is_gzip {
        true => Ok(Cursor::new(section.bytes()?, part)),
        false => Ok(Cursor::new(&[], part)),
    };
    let mut columns = Columns {
        starts: gzip_column("starts of spans")?,
        bits: gzip_column("bits of spans")?,
        windows: gzip_column("sizes of windows")?,
        lengths: Cursor::new(&[], ""),
    };
    columns.lengths = Cursor::new(section.bytes()?, "lengths of spans");
    let (digests, rest) = section.rest().as_chunks::<DIGEST_SIZE>();
    let count = usize::try_from(header.spans.get()).unwrap_or(usize::MAX);
    if !rest.is_empty() || digests.len() != count {
        return Err(Error::Part {
            part: "digests of spans",
        });
    }
    let mut spans = Vec::with_capacity(digests.len());
    let mut place = SpanPlace {
        blob: header.layer_size.get(),
        start: 0,
        output: 0,
        window: windows_at,
    };
    if is_gzip {
        place.start = columns.starts.number()?;
    }
    let mut next_bits = match is_gzip && count > 0 {
        true => columns.bits.byte()?,
        false => 0,
    };
    // nothing comes before the first span: neither a byte that it shares nor a window
    if next_bits != 0 {
        return Err(Error::SpanBits {
            span: 0,
            bits: next_bits,
        });
    }
    if is_gzip && count > 0 && place.start < GZIP_HEADER_SIZE {
        return Err(place.error(0, place.start));
    }
    for (index, digest) in digests.iter().enumerate() {
        let bits = next_bits;
        let is_last = index.checked_add(1) == Some(count);
        next_bits = match is_gzip && !is_last {
            true => columns.bits.byte()?,
            false => 0,
        };
        spans.push(match is_gzip {
            true => place.gzip(index, &mut columns, bits, next_bits, digest)?,
            false => place.plain(index, columns.lengths.number()?, digest)?,
        });
    }
    for column in [
        columns.starts,
        columns.bits,
        columns.windows,
        columns.lengths,
    ] {
        column.finish()?;
    }
    let windows_size = place.window.checked_sub(windows_at);
    if windows_size != Some(header.windows_size.get()) {
        return Err(Error::Header {
            field: "size of all windows",
            value: header.windows_size.get(),
        });
    }
    Ok(SpanTable {
        compression,
        compressed_size: place.blob,
        uncompressed_size: place.output,
        span_size: header.span_size.get(),
        spans,
    })
}

/// Where the next span starts.
struct SpanPlace {
    /// Bytes of the layer's blob.
    blob: u64,
    /// In the blob.
    start: u64,
    /// In the layer.
    output: u64,
    /// In the compact index's blob.
    window: u64,
}

impl SpanPlace {
    fn gzip(
        &mut self,
        index: usize,
        columns: &mut Columns<'_>,
        bits: u8,
        next_bits: u8,
        digest: &[u8; DIGEST_SIZE],
    ) -> Result<Span, Error> {
        if next_bits > 7 {
            return Err(Error::SpanBits {
                span: index.saturating_add(1),
                bits: next_bits,
            });
        }
        let next = self.start.checked_add(columns.starts.number()?);
        // the byte that the next one shares belongs to both
        let end = next.and_then(|next| next.checked_add(u64::from(next_bits != 0)));
        let (Some(next), Some(end)) = (next, end) else {
            return Err(self.error(index, u64::MAX));
        };
        if end > self.blob {
            return Err(self.error(index, end));
        }
        let length = columns.lengths.number()?;
        let compressed = end.saturating_sub(self.start);
        if length > compressed.saturating_add(1).saturating_mul(MAX_EXPANSION) {
            return Err(Error::SpanTooLong {
                span: index,
                compressed,
                uncompressed: length,
            });
        }
        let window = self.take_window(index, columns.windows.number()?)?;
        let span = Span {
            compressed: CompressedOffset(self.start)..CompressedOffset(end),
            uncompressed: self.take_output(index, length)?,
            digest: Digest::new(*digest),
            bits,
            end_bits: next_bits,
            window,
        };
        self.start = next;
        Ok(span)
    }

    fn plain(
        &mut self,
        index: usize,
        length: u64,
        digest: &[u8; DIGEST_SIZE],
    ) -> Result<Span, Error> {
        let uncompressed = self.take_output(index, length)?;
        let (start, end) = (uncompressed.start.get(), uncompressed.end.get());
        self.start = start;
        if end > self.blob {
            return Err(self.error(index, end));
        }
        Ok(Span {
            compressed: CompressedOffset(start)..CompressedOffset(end),
            uncompressed,
            digest: Digest::new(*digest),
            bits: 0,
            end_bits: 0,
            window: None,
        })
    }

    fn take_output(
        &mut self,
        index: usize,
        length: u64,
    ) -> Result<std::ops::Range<LayerOffset>, Error> {
        if length == 0 {
            return Err(Error::EmptySpan { span: index });
        }
        let start = LayerOffset(self.output);
        let end = start.checked_add(length).ok_or(Error::SpanTooLong {
            span: index,
            compressed: 0,
            uncompressed: length,
        })?;
        self.output = end.get();
        Ok(start..end)
    }

    fn take_window(
        &mut self,
        index: usize,
        length: u64,
    ) -> Result<Option<std::ops::Range<usize>>, Error> {
        let wrong = Error::WindowLength {
            span: index,
            length,
        };
        let end = self.window.checked_add(length);
        let (Some(end), true) = (end, length <= MAX_STORED_SIZE) else {
            return Err(wrong);
        };
        let (Ok(start), Ok(range_end)) = (usize::try_from(self.window), usize::try_from(end))
        else {
            return Err(wrong);
        };
        if length > 0 && index == 0 {
            return Err(wrong);
        }
        self.window = end;
        Ok((length > 0).then_some(start..range_end))
    }

    fn error(&self, span: usize, end: u64) -> Error {
        Error::SpanPlace {
            span,
            start: self.start,
            end,
            blob: self.blob,
        }
    }
}
