//! Whether a table tells the truth. A span's digest shows that its compressed bytes are those that whoever made the table saw; not that
//! the table's offsets, windows and files are those of the layer. That is looked at as the bytes pass.
//!
//! What is found is a lie of the table: no other source helps.

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

/// A span's bytes, and what was there to decode them.
pub(crate) struct DecodedSpan<'a> {
    /// The layer's bytes.
    pub bytes: &'a [u8],
    record: &'a Span,
    window: Option<&'a [u8]>,
    surplus: bool,
    /// What stands behind the last span.
    pub tail: &'a [u8],
}

impl<'a> DecodedSpan<'a> {
    /// Decodes a span; it has the length that the table states.
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
                // the last span's bytes go on behind the tar's end
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
            // one byte too many shows that it was cut
            tail: match is_last {
                true => &beyond[..beyond.len().min(MAX_TAIL + 1)],
                false => &[],
            },
        })
    }

    /// Looks at all that this span can show, and gives the first lie. An error is one of the local files.
    pub(crate) fn check(&self, disk: &Disk, span: SpanId) -> Result<Option<TableContradiction>> {
        let next = SpanId(span.get() + 1); // there are fewer than u32::MAX
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

    /// Whether the window of the next span is what this one ends with. As this is asked of each span before it is present, a span
    /// whose predecessor is present has had its window checked.
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
        // what stands in it before the layer's start means nothing
        let known = usize::try_from(start).map_or(WINDOW_SIZE, |start| start.min(WINDOW_SIZE));
        Ok(window.is_none_or(|window| {
            let meaningful = &window[window.len().saturating_sub(known)..];
            window_follows(self.window, self.bytes, meaningful)
        }))
    }
}

/// The reason that a disk is degraded for when it takes a span back; without a span, all of them.
pub(crate) fn taken_back(disk: &Disk, span: Option<SpanId>, refutation: Refutation) -> Arc<Error> {
    let (layer, table) = (disk.layer().digest, disk.table());
    let what = match span {
        Some(span) => format!("span {span} of layer {layer}"),
        None => format!("layer {layer}"),
    };
    let context = format!("{what} is not what its table {table} says");
    Arc::new(Error::with_source(Kind::Corrupt, context, refutation))
}

/// The bytes of the layer that a span has by its table.
fn length(record: &Span) -> u64 {
    // `spans::encode` took only those that end where they start or behind
    record
        .uncompressed
        .end
        .get()
        .saturating_sub(record.uncompressed.start.get())
}
