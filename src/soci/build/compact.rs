//! The spans of a layer for a compact index, collected in one pass: digests of their output, and their reduced windows.

use crate::{
    compact::{self, MAX_TABLE_SIZE, NewSpan, NewTable, window, window::Window},
    gzip::{
        WINDOW_SIZE,
        inflate::SpanDecoder,
        references::{MAX_READ, Used, references},
        scan::Checkpoint,
    },
    oci::{Digest, digest::Hasher},
    tar::Entry,
    units::{CompressedOffset, LayerOffset},
    ztoc::{Compression, Span},
};

/// Spans of a plain tar are not shorter, in bytes.
const LEAST_FIXED: u64 = 4096;

/// More spans than this make no table: their digests alone would pass its limit.
const MAX_SPANS: usize = MAX_TABLE_SIZE as usize / 32;

/// A layer's blob of a compact index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompactBlob {
    /// The table, followed by the windows.
    pub bytes: Vec<u8>,
    /// Bytes of the table.
    pub table_size: usize,
    /// SHA-256 of the table.
    pub table: Digest,
    /// The span size that was asked for.
    pub span_size: u64,
    /// How many spans it has.
    pub spans: usize,
}

/// The mode of collection.
pub(super) struct CompactSpans {
    compression: Compression,
    span_size: u64,
    done: Vec<NewSpan>,
    windows: Vec<u8>,
    current: Option<Current>,
    /// Bytes of the layer in the spans that have started.
    output: u64,
    /// The latest byte of the blob: two spans share it when the second starts in its middle.
    last_byte: u8,
    decoder: SpanDecoder,
    /// Why no index can be made.
    failed: Option<String>,
}

/// The current span.
struct Current {
    start: CompressedOffset,
    bits: u8,
    length: u64,
    hasher: Hasher,
    /// The state for reducing its window; `None` if that is done, or if it has none.
    window: Option<Whole>,
    /// The reduced window, at the end of all windows.
    window_size: usize,
}

/// A window, and the part of its span that may refer to it.
struct Whole {
    window: Vec<u8>,
    /// The span's compressed bytes so far, and no more than can be of use.
    compressed: Vec<u8>,
    /// The first 32 KiB of the span's output.
    output: Vec<u8>,
}

impl CompactSpans {
    /// For a gzip blob.
    pub(super) fn checkpoints(span_size: u64) -> Self {
        Self::new(Compression::Gzip, span_size)
    }

    /// For a plain tar.
    pub(super) fn fixed(span_size: u64) -> Self {
        Self::new(Compression::Uncompressed, span_size.max(LEAST_FIXED))
    }

    fn new(compression: Compression, span_size: u64) -> Self {
        Self {
            compression,
            span_size,
            done: Vec::new(),
            windows: Vec::new(),
            current: None,
            output: 0,
            last_byte: 0,
            decoder: SpanDecoder::default(),
            failed: None,
        }
    }

    /// Bytes of the blob.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        if let Some(&last) = bytes.last() {
            self.last_byte = last;
        }
        let whole = self.current.as_mut().and_then(|span| span.window.as_mut());
        if let Some(whole) = whole {
            // one byte over the limit shows that there are too many
            let room = (MAX_READ + 1).saturating_sub(whole.compressed.len());
            whole
                .compressed
                .extend_from_slice(&bytes[..bytes.len().min(room)]);
        }
    }

    /// A span starts after the bytes that were taken.
    pub(super) fn start(&mut self, at: &Checkpoint<'_>) {
        self.end_span();
        let compressed = match at.bits {
            0 => Vec::new(),
            _ => vec![self.last_byte],
        };
        self.begin(Current {
            start: CompressedOffset(at.input.get() - compressed.len() as u64),
            bits: at.bits,
            length: 0,
            hasher: Hasher::default(),
            // nothing comes before the layer's start
            window: (at.output > LayerOffset(0)).then(|| Whole {
                window: at.window.to_vec(),
                compressed,
                output: Vec::new(),
            }),
            window_size: 0,
        });
    }

    /// Bytes of the layer, up to the tar's end.
    pub(super) fn data(&mut self, mut bytes: &[u8]) {
        if self.compression == Compression::Uncompressed {
            while !bytes.is_empty() && self.failed.is_none() {
                let have = self.current.as_ref().map_or(self.span_size, |it| it.length);
                if have == self.span_size {
                    self.end_span();
                    self.begin(Current {
                        start: CompressedOffset(self.output),
                        bits: 0,
                        length: 0,
                        hasher: Hasher::default(),
                        window: None,
                        window_size: 0,
                    });
                    continue;
                }
                let left = usize::try_from(self.span_size - have).unwrap_or(usize::MAX);
                let (now, rest) = bytes.split_at(left.min(bytes.len()));
                self.add(now);
                bytes = rest;
            }
        } else {
            self.add(bytes);
        }
    }

    /// The end of the blob: the layer's part of a compact index, or why there is none.
    pub(super) fn finish(
        mut self,
        layer: Digest,
        layer_size: u64,
        entries: &[Entry],
    ) -> Result<CompactBlob, String> {
        self.end_span();
        if let Some(reason) = self.failed {
            return Err(reason);
        }
        let table = compact::write(&NewTable {
            layer,
            layer_size,
            compression: self.compression,
            span_size: self.span_size,
            spans: &self.done,
            entries,
        })
        .map_err(|error| error.to_string())?;
        if table.len() as u64 > MAX_TABLE_SIZE {
            return Err(format!(
                "its table would have {} bytes, over the limit of {MAX_TABLE_SIZE}",
                table.len()
            ));
        }
        let (table_size, digest) = (table.len(), Digest::of(&table));
        let mut bytes = table;
        bytes.append(&mut self.windows);
        Ok(CompactBlob {
            bytes,
            table_size,
            table: digest,
            span_size: self.span_size,
            spans: self.done.len(),
        })
    }

    fn begin(&mut self, span: Current) {
        if self.done.len() >= MAX_SPANS {
            self.failed = Some("it has too many spans; use a larger span size".to_owned());
        }
        self.current = self.failed.is_none().then_some(span);
    }

    /// Output of the passing span.
    fn add(&mut self, bytes: &[u8]) {
        self.output += bytes.len() as u64;
        let Some(span) = &mut self.current else {
            return;
        };
        span.hasher.update(bytes);
        span.length += bytes.len() as u64;
        if let Some(whole) = &mut span.window {
            let room = WINDOW_SIZE - whole.output.len();
            whole
                .output
                .extend_from_slice(&bytes[..bytes.len().min(room)]);
            if whole.output.len() == WINDOW_SIZE {
                self.reduce_window();
            }
        }
    }

    fn end_span(&mut self) {
        self.reduce_window();
        let Some(span) = self.current.take() else {
            return;
        };
        if span.length == 0 {
            // it starts where the tar ends: the span before has all there is
            self.windows.truncate(self.windows.len() - span.window_size);
            return;
        }
        self.done.push(NewSpan {
            compressed_start: span.start,
            bits: span.bits,
            length: span.length,
            digest: span.hasher.finish(),
            window_size: span.window_size as u32, // `reduce_window` has looked
        });
    }

    /// Adds the passing span's window to the others.
    fn reduce_window(&mut self) {
        let Some(span) = &mut self.current else {
            return;
        };
        let Some(whole) = span.window.take() else {
            return;
        };
        let length = whole.output.len() as u64;
        let used = references(&whole.compressed, span.bits, length).unwrap_or_else(|_| Used::all());
        let stored = [used, Used::all()].into_iter().find_map(|used| {
            let stored = window::encode(&whole.window, &used).ok()?;
            let fits = stored.len() as u64 <= window::MAX_STORED_SIZE;
            (fits && makes(&mut self.decoder, span.bits, &whole, &stored)).then_some(stored)
        });
        match stored {
            Some(stored) => {
                span.window_size = stored.len();
                self.windows.extend(stored);
            }
            None => {
                self.failed = Some(format!(
                    "its span at {} does not decode from its window",
                    span.start
                ));
            }
        }
    }
}

/// Whether a span's first bytes come out with a stored window as they did without. No later byte can refer to the window.
fn makes(decoder: &mut SpanDecoder, bits: u8, whole: &Whole, stored: &[u8]) -> bool {
    let Ok(window) = Window::parse(stored) else {
        return false;
    };
    let span = Span {
        compressed: CompressedOffset(0)..CompressedOffset(whole.compressed.len() as u64),
        uncompressed: LayerOffset(0)..LayerOffset(whole.output.len() as u64),
        digest: Digest::new([0; 32]), // the decoder does not look at it
        bits,
        end_bits: 0, // these may be the span's first bytes only
        window: None,
    };
    // some compressed bytes were not kept, so a reduced window cannot be checked; a whole one is right
    if whole.compressed.len() > MAX_READ {
        return window.is_whole();
    }
    decoder
        .decode(&span, &whole.compressed, Some(window.bytes()))
        .is_ok_and(|decoded| decoded == whole.output)
}
