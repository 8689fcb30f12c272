//! The layout of a disk: which bytes of the layer are in which region of the ext4 image, and in which span of the blob.

use std::ops::Range;

use super::span_table::Spans;
use crate::{
    ext4::{self, DataRegion, RegionTable},
    units::{DiskOffset, LayerOffset, SpanId},
};

/// The regions and spans of one disk. They do not change.
pub(crate) struct DiskLayout {
    regions: RegionTable,
    spans: Spans,
}

impl DiskLayout {
    pub(crate) fn new(regions: RegionTable, spans: Spans) -> Self {
        Self { regions, spans }
    }

    /// The regions of the ext4 image.
    pub(crate) fn regions(&self) -> &RegionTable {
        &self.regions
    }

    /// The spans of the blob.
    pub(crate) fn spans(&self) -> &Spans {
        &self.spans
    }

    /// Bytes of the ext4 image.
    pub(crate) fn size(&self) -> u64 {
        self.regions.size()
    }

    /// The part of the ext4 image that has metadata and no file data, without the zeros at the end.
    pub(crate) fn metadata(&self) -> Range<DiskOffset> {
        let end = self.size().saturating_sub(ext4::TAIL_BYTES);
        let start = self.regions.data_end().get();
        let start = start.next_multiple_of(ext4::BLOCK_SIZE).min(end);
        DiskOffset(start)..DiskOffset(end)
    }

    /// Mean length of a span, in bytes of the layer.
    pub(crate) fn mean_span_bytes(&self) -> u64 {
        self.spans.uncompressed_size() / u64::from(self.spans.count()).max(1)
    }

    /// The spans that hold a range of the disk, ascending, each once.
    pub(crate) fn spans_under(&self, range: &Range<DiskOffset>) -> impl Iterator<Item = SpanId> {
        let mut next = 0;
        self.regions
            .in_disk(range)
            .filter_map(|region| region.clip_disk(range))
            .flat_map(move |part| {
                let spans = self.spans.covering(part.layer);
                let start = spans.start.max(next);
                next = next.max(spans.end);
                start..spans.end.max(start)
            })
            .map(SpanId)
    }

    /// The part of the disk from the first to the last byte of adjacent spans; `None`: they hold no file data.
    pub(crate) fn disk_range(&self, spans: &Range<u32>) -> Option<Range<DiskOffset>> {
        let last = spans.end.checked_sub(1)?;
        let layer = self.spans.uncompressed(SpanId(spans.start)).start
            ..self.spans.uncompressed(SpanId(last)).end;
        let (first, last) = first_and_last(self.regions.in_layer(&layer))?;
        Some(first.disk.start..last.disk.end)
    }

    /// The layer's bytes from the start of a range of the disk to its end, and the last file that the range touches.
    pub(crate) fn layer_range(
        &self,
        range: &Range<DiskOffset>,
    ) -> Option<(Range<LayerOffset>, DataRegion)> {
        let (first, last) = first_and_last(self.regions.in_disk(range))?;
        let layer = first.clip_disk(range)?.layer.start..last.clip_disk(range)?.layer.end;
        Some((layer, last))
    }

    /// Length of a span in the blob, in compressed bytes.
    pub(crate) fn compressed_span(&self, span: u32) -> u64 {
        self.compressed_length(&(span..span + 1))
    }

    /// Length of adjacent spans in the blob, in compressed bytes. There is at least one.
    pub(crate) fn compressed_length(&self, run: &Range<u32>) -> u64 {
        let start = self.spans.compressed(SpanId(run.start)).start;
        let end = self.spans.compressed(SpanId(run.end - 1)).end;
        end.get() - start.get()
    }
}

/// The two ends of a sequence of regions, which may be one region.
fn first_and_last(
    mut regions: impl Iterator<Item = DataRegion>,
) -> Option<(DataRegion, DataRegion)> {
    let first = regions.next()?;
    let last = regions.last().unwrap_or_else(|| first.clone());
    Some((first, last))
}
