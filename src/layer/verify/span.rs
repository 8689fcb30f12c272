//! Compares a span with its table. A span's digest shows that its compressed bytes are those that the table was made from. It does not show
//! that the table's offsets, windows and files are those of the layer. So these are checked while the span is decoded.
//!
//! A contradiction is an error of the table: no other source helps.

use std::sync::Arc;

use super::{
    contradictions::{Refutation, TableContradiction},
    non_file_bytes::MAX_TAIL,
};
use crate::{
    error::{Error, Kind, Result},
    gzip::{
        WINDOW_SIZE,
        inflate::{SpanDecoder, window_follows},
    },
    layer::{disk::Disk, read::reader::SpanReader, stored::span_table::Spans},
    units::SpanId,
    ztoc::{Compression, Span},
};

/// The output of a span, and what it was decoded with.
pub(crate) struct DecodedSpan<'a> {
    /// The bytes of the layer.
    pub bytes: &'a [u8],
    record: &'a Span,
    window: Option<&'a [u8]>,
    surplus: bool,
    /// The bytes after the end of the tar, if it is the last span.
    pub tail: &'a [u8],
}

impl<'a> DecodedSpan<'a> {
    /// Decodes a span. Its output has the length that the table states.
    pub(crate) fn new(
        spans: &Spans,
        span: SpanId,
        record: &'a Span,
        compressed: &'a [u8],
        window: Option<&'a [u8]>,
        decoder: &'a mut SpanDecoder,
    ) -> Result<Self, TableContradiction> {
        let is_last = span.get().saturating_add(1) == spans.count();
        let (bytes, beyond, surplus) = match spans.compression() {
            Compression::Uncompressed => {
                let expected = length(record);
                // the bytes of the last span continue after the end of the tar
                let (bytes, beyond) = usize::try_from(expected)
                    .ok()
                    .and_then(|length| compressed.split_at_checked(length))
                    .ok_or(TableContradiction::Length {
                        expected,
                        found: compressed.len(),
                    })?;
                (bytes, beyond, !beyond.is_empty())
            }
            Compression::Gzip => {
                let decoded = match is_last {
                    true => decoder.decode_beyond(record, compressed, window, MAX_TAIL + 1),
                    false => decoder.decode(record, compressed, window),
                };
                decoded.map_err(TableContradiction::Data)?;
                (decoder.bytes(), decoder.beyond(), decoder.surplus())
            }
        };
        Ok(Self {
            bytes,
            record,
            window,
            surplus,
            // one byte too many shows that the tail is longer
            tail: match is_last {
                true => &beyond[..beyond.len().min(MAX_TAIL + 1)],
                false => &[],
            },
        })
    }

    /// Checks what this span alone can show, and returns the first contradiction. An error is that of a local file.
    pub(crate) fn check(&self, disk: &Disk, span: SpanId) -> Result<Option<TableContradiction>> {
        let next = SpanId(span.get() + 1); // there are less than u32::MAX spans
        if next.get() < disk.layout().spans().count() {
            if self.surplus {
                return Ok(Some(TableContradiction::Surplus {
                    expected: length(self.record),
                }));
            }
            if !self.leads_to(disk.reader(), next)? {
                return Ok(Some(TableContradiction::Window { next }));
            }
        }
        let Some(headers) = disk.verification().headers() else {
            return Ok(None);
        };
        let start = self.record.uncompressed.start;
        let found = headers.check(start, self.bytes, || disk.read_entries())?;
        Ok(found.map(TableContradiction::Header))
    }

    /// Whether this span's output ends with the window of the next span. Each span passes this check before it is present, so the window of
    /// a span whose predecessor is present was checked.
    fn leads_to(&self, reader: &SpanReader, next: SpanId) -> Result<bool> {
        let read = || {
            let record = reader.layout().spans().read(next)?;
            Ok((
                reader.windows().of_ztoc(&record)?,
                record.span.uncompressed.start.get(),
            ))
        };
        let (window, start) = read().map_err(|error: std::io::Error| {
            let context = format!("the window of span {next} cannot be read");
            Error::with_source(Kind::Io, context, error)
        })?;
        // bytes of the window from before the layer's start are not used
        let used = usize::try_from(start).map_or(WINDOW_SIZE, |start| start.min(WINDOW_SIZE));
        Ok(window.is_none_or(|window| {
            let window = &window[window.len().saturating_sub(used)..];
            window_follows(self.window, self.bytes, window)
        }))
    }
}

/// The reason for which a disk is degraded when it revokes a span; `None`: all spans.
pub(crate) fn revoked_reason(
    disk: &Disk,
    span: Option<SpanId>,
    refutation: Refutation,
) -> Arc<Error> {
    let (layer, table) = (disk.layer().digest, disk.table());
    let what = match span {
        Some(span) => format!("span {span} of layer {layer}"),
        None => format!("layer {layer}"),
    };
    let context = format!("{what} contradicts its table {table}");
    Arc::new(Error::with_source(Kind::Corrupt, context, refutation))
}

/// The length that the table states for a span's output.
fn length(record: &Span) -> u64 {
    // `spans::encode` accepts only spans that do not end before their start
    record
        .uncompressed
        .end
        .get()
        .saturating_sub(record.uncompressed.start.get())
}
