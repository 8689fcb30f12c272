//! The bytes of a layer that are in no file: tar headers, padding, the data of entries that later ones replace, the tar's end.
//!
//! The disk does not contain them, but the layer's diff ID includes them. So they are stored in the file `rest`, packed in the layer's
//! order, until the whole layer has been checked ([`super::whole_layer`]). Then the file is removed. It has about a kilobyte per entry.

use std::{io, os::unix::fs::FileExt as _};

use crate::{
    buffer::set_length,
    ext4::{DataRegion, RegionTable},
    layer::stored::{seal::crc32, span_table::Spans, stored_file::StoredFile},
    units::{LayerOffset, SpanId},
};

/// Maximum length of the tail that is stored in `rest`: padding after the layer's last span that the table does not count. GNU tar pads up
/// to 10 KiB. If the tail is longer, the span itself is stored (`trailer`).
pub(super) const MAX_TAIL: usize = 1 << 20;

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// The file `rest`, and the offset of each span's part in it.
pub(crate) struct NonFileBytes {
    file: StoredFile,
    /// The start of each span's part, and at last the end of the last part, after which the tail follows.
    starts: Box<[u64]>,
}

impl NonFileBytes {
    pub(crate) fn new(file: StoredFile, spans: &Spans, regions: &RegionTable) -> Self {
        let mut packed = Packed::new(all(regions));
        let spans = (0..spans.count()).map(|span| spans.uncompressed(SpanId(span)));
        let mut end = LayerOffset(0);
        let mut starts: Vec<u64> = spans
            .map(|bytes| {
                end = bytes.end;
                packed.position(bytes.start)
            })
            .collect();
        starts.push(packed.position(end));
        Self {
            file,
            starts: starts.into(),
        }
    }

    /// Stores the bytes of a span that are in no region. `tail` is the tail after the last span. Returns their CRC-32.
    pub(crate) fn write(
        &self,
        span: SpanId,
        start: LayerOffset,
        bytes: &[u8],
        regions: impl Iterator<Item = DataRegion>,
        tail: &[u8],
    ) -> io::Result<u32> {
        let end = LayerOffset(start.get().saturating_add(bytes.len() as u64));
        let mut rest = Vec::new();
        let mut position = 0;
        for region in regions {
            let Some(part) = region.clip_layer(&(start..end)) else {
                continue;
            };
            // inside `bytes`: the part is clipped to them
            let from = (part.layer.start.get() - start.get()) as usize;
            rest.extend_from_slice(&bytes[position..from]);
            position = (part.layer.end.get() - start.get()) as usize;
        }
        rest.extend_from_slice(&bytes[position..]);
        rest.extend_from_slice(tail);
        let position = self.starts[span.get() as usize];
        let file = self.file.get()?;
        file.write_all_at(&rest, position)?;
        if self.is_last(span) {
            // bytes of a previous tail are removed
            file.set_len(position + rest.len() as u64)?;
        }
        Ok(crc32(&rest))
    }

    /// The CRC-32 of the stored bytes of a span.
    pub(crate) fn checksum(&self, span: SpanId) -> io::Result<u32> {
        let start = self.starts[span.get() as usize];
        let end = match self.is_last(span) {
            true => self.length()?.max(start),
            false => self.starts[span.get() as usize + 1],
        };
        let mut crc = flate2::Crc::new();
        let mut buffer = Vec::new();
        let mut position = start;
        while position < end {
            set_length(&mut buffer, (end - position).min(PIECE) as usize);
            self.read(position, &mut buffer)?;
            crc.update(&buffer);
            position += buffer.len() as u64;
        }
        Ok(crc.sum())
    }

    fn is_last(&self, span: SpanId) -> bool {
        span.get() as usize + 2 == self.starts.len()
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.get()?.sync_data()
    }

    /// Length of the file; after the last span was stored, it includes the tail. A file that is longer than possible counts as one byte too
    /// long.
    pub(crate) fn length(&self) -> io::Result<u64> {
        let length = self.file.get()?.metadata()?.len();
        Ok(length.min(self.end().saturating_add(MAX_TAIL as u64 + 1)))
    }

    /// The end of the last span's part, where the tail starts.
    pub(crate) fn end(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Reads bytes at this offset of the file; see [`Packed`].
    pub(crate) fn read(&self, position: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.get()?.read_exact_at(buffer, position)
    }
}

/// All regions.
pub(crate) fn all(regions: &RegionTable) -> impl Iterator<Item = DataRegion> {
    regions.in_layer(&(LayerOffset(0)..LayerOffset(u64::MAX)))
}

/// Maps offsets in the layer, which must ascend, to offsets in the file.
pub(crate) struct Packed<I> {
    regions: I,
    current: Option<DataRegion>,
    /// Bytes of the regions before the current one.
    data: u64,
}

impl<I: Iterator<Item = DataRegion>> Packed<I> {
    /// `regions` are all regions, as [`all`] returns them.
    pub(crate) fn new(mut regions: I) -> Self {
        Self {
            current: regions.next(),
            regions,
            data: 0,
        }
    }

    /// The offset in the file of the first byte at or after `offset` that is in no region.
    pub(crate) fn position(&mut self, offset: LayerOffset) -> u64 {
        while let Some(region) = self.current.take_if(|it| it.layer.end <= offset) {
            self.data += region.length();
            self.current = self.regions.next();
        }
        let inside = self.current.as_ref().map_or(0, |region| {
            offset.get().saturating_sub(region.layer.start.get())
        });
        // regions do not overlap, so they have at most `offset` bytes before `offset`
        offset.get() - self.data - inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::DiskOffset;

    fn regions() -> Vec<DataRegion> {
        let region = |disk: u64, layer: u64, length| {
            DataRegion::new(DiskOffset(disk), LayerOffset(layer), length).unwrap()
        };
        vec![
            region(4096, 512, 100),
            region(8192, 1536, 4000),
            region(12288, 5536, 8),
        ]
    }

    #[test]
    fn positions_count_bytes_in_no_region() {
        let regions = regions();
        let mut expected = 0;
        let mut packed = Packed::new(regions.iter().cloned());
        for offset in 0..6000 {
            assert_eq!(packed.position(LayerOffset(offset)), expected, "{offset}");
            let inside = |region: &DataRegion| region.layer.contains(&LayerOffset(offset));
            expected += u64::from(!regions.iter().any(inside));
        }
    }
}
