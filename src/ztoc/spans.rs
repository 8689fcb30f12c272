//! The spans of a layer, from its checkpoints, with the checks that AWS's daemon makes and those that it lacks.

use std::ops::Range;

use super::{
    Compression, Error,
    zinfo::{Checkpoint, GzipInfo, TarInfo, WINDOW_SIZE},
};
use crate::{
    oci::Digest,
    units::{CompressedOffset, LayerOffset, SpanId},
};

/// The shortest gzip header.
const GZIP_HEADER_SIZE: u64 = 10;

/// The most bytes that one byte of a deflate stream can say: four pairs of a one-bit length code (258) and a one-bit distance.
const MAX_EXPANSION: u64 = 1032;

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
    /// 0 to 7: bits of the last byte that belong to the next span; 0 where the next one starts on a whole byte, or there is none.
    pub end_bits: u8,
    /// Where the 32 KiB window stands in the zTOC's own bytes. `None`: all zero, or not needed (uncompressed).
    pub window: Option<Range<usize>>,
}

/// All spans of a layer, in order; consecutive in the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanTable {
    /// How the blob is compressed.
    pub compression: Compression,
    /// The blob's size.
    pub compressed_size: u64,
    /// The size of the layer as the zTOC records it (position after the tar's end blocks).
    pub uncompressed_size: u64,
    /// The span size that was asked for at the making. Says nothing of the spans of gzip layers; 0 where the table has a negative one.
    pub span_size: u64,
    /// The spans.
    pub spans: Vec<Span>,
}

/// The sizes that stand beside a zTOC's checkpoints.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) compressed: u64,
    pub(super) uncompressed: u64,
}

impl SpanTable {
    /// The spans that hold this range of the layer; empty for an empty range.
    pub fn covering(&self, range: Range<LayerOffset>) -> Range<SpanId> {
        let range = range.start..range.end.min(self.covered());
        if range.is_empty() {
            return SpanId(0)..SpanId(0);
        }
        let first = self
            .spans
            .partition_point(|span| span.uncompressed.end <= range.start);
        let end = self
            .spans
            .partition_point(|span| span.uncompressed.start < range.end);
        // there are at most 2^31 spans
        let id = |at: usize| SpanId(u32::try_from(at).unwrap_or(u32::MAX));
        id(first.min(end))..id(end)
    }

    /// The end of the last span in the layer: `uncompressed_size`, or more where data stands behind the tar's end blocks.
    pub fn covered(&self) -> LayerOffset {
        self.spans
            .last()
            .map_or(LayerOffset(0), |span| span.uncompressed.end)
    }

    /// Checks that the table is about a blob of this size. What imports a zTOC must ask: nothing in the zTOC itself can tell.
    pub fn check_blob_size(&self, blob: u64) -> Result<(), Error> {
        if self.compressed_size == blob {
            Ok(())
        } else {
            Err(Error::BlobSize {
                table: self.compressed_size,
                blob,
            })
        }
    }

    /// The spans of a gzip layer. `blob_at` is where the checkpoints stand in the zTOC.
    pub(super) fn gzip(
        info: &GzipInfo<'_>,
        sizes: Sizes,
        digests: &[Digest],
        blob_at: usize,
    ) -> Result<Self, Error> {
        let checkpoints = info
            .checkpoints()
            .enumerate()
            .map(|(index, checkpoint)| Start::checked(index, checkpoint, sizes))
            .collect::<Result<Vec<_>, _>>()?;
        let mut spans = Vec::with_capacity(checkpoints.len());
        for (index, (start, digest)) in checkpoints.iter().zip(digests).enumerate() {
            let next = index.checked_add(1).and_then(|next| checkpoints.get(next));
            spans.push(start.span(index, next, sizes, digest, blob_at)?);
        }
        Ok(Self {
            compression: Compression::Gzip,
            compressed_size: sizes.compressed,
            uncompressed_size: sizes.uncompressed,
            span_size: u64::try_from(info.span_size).unwrap_or(0),
            spans,
        })
    }

    /// The spans of a plain tar; there are as many digests as spans.
    pub(super) fn uncompressed(
        info: TarInfo,
        sizes: Sizes,
        digests: &[Digest],
    ) -> Result<Self, Error> {
        if info.size != sizes.compressed || sizes.uncompressed > sizes.compressed {
            return Err(Error::TarSize {
                tar: info.size,
                compressed: sizes.compressed,
                uncompressed: sizes.uncompressed,
            });
        }
        let mut spans = Vec::with_capacity(digests.len());
        let mut start = 0_u64;
        for (index, digest) in digests.iter().enumerate() {
            let end = start.saturating_add(info.span_size).min(info.size);
            let is_last = index.checked_add(1) == Some(digests.len());
            let tar_end = if is_last {
                sizes.uncompressed.max(start)
            } else {
                end
            };
            spans.push(Span {
                compressed: CompressedOffset(start)..CompressedOffset(end),
                uncompressed: LayerOffset(start)..LayerOffset(tar_end),
                digest: *digest,
                bits: 0,
                end_bits: 0,
                window: None,
            });
            start = end;
        }
        Ok(Self {
            compression: Compression::Uncompressed,
            compressed_size: sizes.compressed,
            uncompressed_size: sizes.uncompressed,
            span_size: info.span_size,
            spans,
        })
    }
}

/// A checkpoint whose numbers are possible ones.
struct Start {
    input: u64,
    output: u64,
    bits: u8,
    /// Relative to the checkpoints' blob.
    window: Option<usize>,
}

impl Start {
    fn checked(index: usize, checkpoint: Checkpoint, sizes: Sizes) -> Result<Self, Error> {
        let order = Error::SpanOrder { span: index };
        let (Ok(input), Ok(output)) = (
            u64::try_from(checkpoint.input),
            u64::try_from(checkpoint.output),
        ) else {
            return Err(order);
        };
        if checkpoint.bits > 7 {
            return Err(Error::CheckpointBits {
                span: index,
                bits: checkpoint.bits,
            });
        }
        let start = Self {
            input,
            output,
            bits: checkpoint.bits,
            window: checkpoint.window,
        };
        if index == 0 && (output != 0 || start.compressed_start() < GZIP_HEADER_SIZE) {
            return Err(Error::FirstCheckpoint { input, output });
        }
        if input > sizes.compressed {
            return Err(Error::SpanBeyondBlob {
                span: index,
                input,
                blob: sizes.compressed,
            });
        }
        Ok(start)
    }

    /// The byte with this checkpoint's bits, where there are some.
    fn compressed_start(&self) -> u64 {
        self.input.saturating_sub(u64::from(self.bits != 0))
    }

    /// The span from here to the next checkpoint, or to the end.
    fn span(
        &self,
        index: usize,
        next: Option<&Self>,
        sizes: Sizes,
        digest: &Digest,
        blob_at: usize,
    ) -> Result<Span, Error> {
        let order = Error::SpanOrder { span: index };
        let compressed_end = next.map_or(sizes.compressed, |next| next.input);
        if next.is_some_and(|next| next.input <= self.input) {
            return Err(order);
        }
        let end = match next {
            // an empty first member or block makes two checkpoints at 0: AWS's tool writes them, its daemon does not take them
            Some(next) if next.output == 0 && self.output == 0 => 0,
            Some(next) if next.output > self.output => next.output,
            Some(_) => return Err(order),
            // data behind the tar's end blocks may have checkpoints of its own: nothing of the last span is part of the tar
            None => sizes.uncompressed.max(self.output),
        };
        let compressed_length = compressed_end.saturating_sub(self.compressed_start());
        if end.saturating_sub(self.output) > compressed_length.saturating_mul(MAX_EXPANSION) {
            return Err(Error::SpanTooLong {
                span: index,
                compressed: compressed_length,
                uncompressed: end.saturating_sub(self.output),
            });
        }
        let window = self
            .window
            .filter(|_| self.output != 0) // nothing stands before the first byte
            .and_then(|window| {
                let from = blob_at.checked_add(window)?;
                Some(from..from.checked_add(WINDOW_SIZE)?)
            });
        Ok(Span {
            compressed: CompressedOffset(self.compressed_start())..CompressedOffset(compressed_end),
            uncompressed: LayerOffset(self.output)..LayerOffset(end),
            digest: *digest,
            bits: self.bits,
            end_bits: next.map_or(0, |next| next.bits),
            window,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spans from 0 to 0, 100, 100 (the last one behind the tar's end).
    fn table() -> SpanTable {
        let digest = crate::oci::digest::Hasher::default().finish();
        let ends = [0, 100, 250, 250];
        let mut start = 0;
        SpanTable {
            compression: Compression::Gzip,
            compressed_size: 100,
            uncompressed_size: 240,
            span_size: 64,
            spans: ends
                .into_iter()
                .map(|end| Span {
                    compressed: CompressedOffset(10)..CompressedOffset(20),
                    uncompressed: LayerOffset(std::mem::replace(&mut start, end))..LayerOffset(end),
                    digest,
                    bits: 0,
                    end_bits: 0,
                    window: None,
                })
                .collect(),
        }
    }

    fn covering(range: Range<u64>) -> Range<u32> {
        let found = table().covering(LayerOffset(range.start)..LayerOffset(range.end));
        found.start.get()..found.end.get()
    }

    #[test]
    fn covering_leaves_out_empty_spans_and_empty_ranges() {
        assert_eq!(covering(0..1), 1..2);
        assert_eq!(covering(0..100), 1..2);
        assert_eq!(covering(99..101), 1..3);
        assert_eq!(covering(100..101), 2..3);
        assert_eq!(covering(249..9999), 2..3);
        assert!(covering(50..50).is_empty());
        assert!(covering(250..9999).is_empty());
        #[expect(clippy::reversed_empty_ranges, reason = "what a caller may pass")]
        let reversed = covering(9..3);
        assert!(reversed.is_empty());
    }

    #[test]
    fn the_blob_s_size_must_be_the_table_s() {
        assert!(table().check_blob_size(100).is_ok());
        assert!(matches!(
            table().check_blob_size(99),
            Err(Error::BlobSize {
                table: 100,
                blob: 99
            })
        ));
    }
}
