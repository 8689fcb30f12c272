//! What of a layer is in no file: tar headers, padding, the data of entries that later ones replace, the tar's end.
//!
//! The disk has no place for it, and the layer's diff ID is over it. So it is kept in a file of its own, `rest`, packed in the layer's
//! order, until the whole layer has been checked ([`super::whole_layer`]); then it goes. It is about a kilobyte for each entry.

use std::{io, os::unix::fs::FileExt as _};

use crate::{
    ext4::{DataRegion, RegionTable},
    layer::stored::{seal::crc32, span_table::Spans, stored_file::StoredFile},
    units::{LayerOffset, SpanId},
};

/// What may stand behind the layer's last span and is kept: padding that the table does not count. GNU tar fills up to 10 KiB. Where there
/// is more, the span itself is kept (`tail`).
pub(super) const MAX_TAIL: usize = 1 << 20;

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// The file, and where in it the spans' parts are.
pub(crate) struct NonFileBytes {
    file: StoredFile,
    /// Where each span's part starts; and the end of the last one, behind which there is the tail.
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
                packed.place(bytes.start)
            })
            .collect();
        starts.push(packed.place(end));
        Self {
            file,
            starts: starts.into(),
        }
    }

    /// Keeps what of a span's bytes no region has; `tail` is what stands behind the last span. Gives its CRC-32.
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
            // inside `bytes`, for it is clipped to them
            let from = (part.layer.start.get() - start.get()) as usize;
            rest.extend_from_slice(&bytes[position..from]);
            position = (part.layer.end.get() - start.get()) as usize;
        }
        rest.extend_from_slice(&bytes[position..]);
        rest.extend_from_slice(tail);
        let place = self.starts[span.get() as usize];
        let file = self.file.get()?;
        file.write_all_at(&rest, place)?;
        if self.is_last(span) {
            // what stands there from before is no tail
            file.set_len(place + rest.len() as u64)?;
        }
        Ok(crc32(&rest))
    }

    /// The CRC-32 of what is kept of a span.
    pub(crate) fn checksum(&self, span: SpanId) -> io::Result<u32> {
        let start = self.starts[span.get() as usize];
        let end = match self.is_last(span) {
            true => self.length()?.max(start),
            false => self.starts[span.get() as usize + 1],
        };
        let mut crc = flate2::Crc::new();
        let mut buffer = Vec::new();
        let mut place = start;
        while place < end {
            buffer.resize((end - place).min(PIECE) as usize, 0);
            self.read(place, &mut buffer)?;
            crc.update(&buffer);
            place += buffer.len() as u64;
        }
        Ok(crc.sum())
    }

    fn is_last(&self, span: SpanId) -> bool {
        span.get() as usize + 2 == self.starts.len()
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.get()?.sync_data()
    }

    /// Bytes of the file; once the last span has come, with the tail.
    pub(crate) fn length(&self) -> io::Result<u64> {
        Ok(self.file.get()?.metadata()?.len())
    }

    /// Where the last span's part ends, and the tail begins.
    pub(crate) fn end(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Reads bytes that stand at this place in the file; see [`Packed`].
    pub(crate) fn read(&self, place: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.get()?.read_exact_at(buffer, place)
    }
}

/// All regions.
pub(crate) fn all(regions: &RegionTable) -> impl Iterator<Item = DataRegion> {
    regions.in_layer(&(LayerOffset(0)..LayerOffset(u64::MAX)))
}

/// Places in the file for offsets in the layer, which must ascend.
pub(crate) struct Packed<I> {
    regions: I,
    current: Option<DataRegion>,
    /// Bytes of the regions before the current one.
    data: u64,
}

impl<I: Iterator<Item = DataRegion>> Packed<I> {
    /// `regions` are all, as [`all`] gives them.
    pub(crate) fn new(mut regions: I) -> Self {
        Self {
            current: regions.next(),
            regions,
            data: 0,
        }
    }

    /// The place of the first byte at or behind `offset` that is in no region.
    pub(crate) fn place(&mut self, offset: LayerOffset) -> u64 {
        while let Some(region) = self.current.take_if(|it| it.layer.end <= offset) {
            self.data += region.length();
            self.current = self.regions.next();
        }
        let inside = self.current.as_ref().map_or(0, |region| {
            offset.get().saturating_sub(region.layer.start.get())
        });
        // regions do not overlap: no more of them are before an offset than it has bytes before it
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
    fn places_count_what_no_region_has() {
        let regions = regions();
        let mut slow = 0;
        let mut packed = Packed::new(regions.iter().cloned());
        for offset in 0..6000 {
            assert_eq!(packed.place(LayerOffset(offset)), slow, "{offset}");
            let inside = |region: &DataRegion| region.layer.contains(&LayerOffset(offset));
            slow += u64::from(!regions.iter().any(inside));
        }
    }
}
