//! Which range of the layer goes where on the disk, and that table's own small file format.
//!
//! The table is written beside the disk when the disk is laid out, and read at every later start ([`super::RegionTable`]): a disk is
//! served by the layout that it was made with, whatever a newer version of this program would choose. So its encoding has a version and
//! a check sum, and decoding trusts nothing.
//!
//! ```text
//! "SOCINBDR"  u32 version  u64 size  u64 count                  (little-endian)
//! count times: LEB128 of the gap on the disk since the last region's end, of the gap in the layer, of the length
//! u32 CRC-32 of all that
//! ```

#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        reason = "a test may fail"
    )
)]

pub(super) mod table;

use std::ops::Range;

use crate::units::{DiskOffset, LayerOffset};

pub(super) const MAGIC: &[u8; 8] = b"SOCINBDR";
pub(super) const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 8 + 8;
pub(super) const CRC_BYTES: usize = 4;

/// A contiguous range of a disk whose bytes are a contiguous range of the layer. Sorted by `disk` these do not overlap; sorted by
/// `layer` they are in the same order (tar order).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataRegion {
    /// Where on the disk. A file's data starts on a block; a later segment of a sparse file need not.
    pub disk: Range<DiskOffset>,
    /// Where in the layer; the same length. The rest of the last block is zero.
    pub layer: Range<LayerOffset>,
}

impl DataRegion {
    /// Bytes.
    pub fn length(&self) -> u64 {
        self.disk.end.get().saturating_sub(self.disk.start.get())
    }

    /// The part of this region that lies in `range` of the disk, if any.
    pub fn clip_disk(&self, range: &Range<DiskOffset>) -> Option<Self> {
        let start = self.disk.start.max(range.start).get();
        let end = self.disk.end.min(range.end).get();
        let skip = start.checked_sub(self.disk.start.get())?;
        self.part(skip, end.checked_sub(start)?)
    }

    /// The part of this region that lies in `range` of the layer, if any.
    pub fn clip_layer(&self, range: &Range<LayerOffset>) -> Option<Self> {
        let start = self.layer.start.max(range.start).get();
        let end = self.layer.end.min(range.end).get();
        let skip = start.checked_sub(self.layer.start.get())?;
        self.part(skip, end.checked_sub(start)?)
    }

    fn part(&self, skip: u64, length: u64) -> Option<Self> {
        if length == 0 {
            return None;
        }
        Self::new(
            self.disk.start.checked_add(skip)?,
            self.layer.start.checked_add(skip)?,
            length,
        )
    }

    /// The region of `length` bytes that starts at these places; `None` where an end overflows.
    pub fn new(disk: DiskOffset, layer: LayerOffset, length: u64) -> Option<Self> {
        Some(Self {
            disk: disk..disk.checked_add(length)?,
            layer: layer..layer.checked_add(length)?,
        })
    }
}

/// The region table of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regions {
    size: u64,
    data: Vec<DataRegion>,
}

/// What a region table must not say.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionError {
    /// Not a region table at all.
    #[error("no region table: it does not start with its magic")]
    Magic,
    /// Written by a version of this program that this one does not know.
    #[error("region table of version {found}; this program reads version {VERSION}")]
    Version {
        /// The version that the table states.
        found: u32,
    },
    /// Cut short.
    #[error("region table ends at byte {at}, within a field")]
    Truncated {
        /// Where the bytes end.
        at: usize,
    },
    /// A number that is not as [`Regions::encode`] writes it: above 64 bits, or in more bytes than it needs.
    #[error("region table has no number of 64 bits, in as few bytes as it needs, before byte {at}")]
    Number {
        /// Where it ends.
        at: usize,
    },
    /// Its bytes changed since it was written.
    #[error("region table's check sum is {found:#010x}; its bytes have {computed:#010x}")]
    Checksum {
        /// What the table states.
        found: u32,
        /// What its bytes have.
        computed: u32,
    },
    /// Bytes are left after the last region.
    #[error("region table has {count} bytes after its last region")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// A region that is empty, overlaps the one before, ends beyond the disk, or whose lengths differ.
    #[error("region {index} is empty, out of order, beyond the disk, or of two lengths")]
    Region {
        /// Its number.
        index: usize,
    },
}

impl Regions {
    /// A table of these regions on a disk of `size` bytes. They must not be empty, must be in order and without overlap on the disk
    /// and in the layer, and end within the disk.
    pub fn new(size: u64, data: Vec<DataRegion>) -> Result<Self, RegionError> {
        let mut disk_end = DiskOffset(0);
        let mut layer_end = LayerOffset(0);
        for (index, region) in data.iter().enumerate() {
            let disk_length = region.disk.end.get().checked_sub(region.disk.start.get());
            let layer_length = region.layer.end.get().checked_sub(region.layer.start.get());
            if disk_length.is_none_or(|length| length == 0)
                || disk_length != layer_length
                || region.disk.start < disk_end
                || region.layer.start < layer_end
                || region.disk.end.get() > size
            {
                return Err(RegionError::Region { index });
            }
            disk_end = region.disk.end;
            layer_end = region.layer.end;
        }
        Ok(Self { size, data })
    }

    /// The table of a layout, whose regions have been through [`Regions::new`].
    pub(super) fn of_layout(size: u64, data: Vec<DataRegion>) -> Self {
        Self { size, data }
    }

    /// The regions alone.
    pub fn into_data(self) -> Vec<DataRegion> {
        self.data
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All regions, in the order of the disk, which is also that of the layer.
    pub fn data(&self) -> &[DataRegion] {
        &self.data
    }

    /// The regions that share at least one byte with `range` of the disk. What of `range` no region has is metadata or zero.
    pub fn in_disk(&self, range: &Range<DiskOffset>) -> &[DataRegion] {
        let first = self.data.partition_point(|r| r.disk.end <= range.start);
        let rest = self.data.get(first..).unwrap_or_default();
        let count = rest.partition_point(|r| r.disk.start < range.end);
        rest.get(..count).unwrap_or_default()
    }

    /// The table's file format.
    pub fn encode(&self) -> Vec<u8> {
        let regions = self.data.len().saturating_mul(8);
        let mut out = Vec::with_capacity(regions.saturating_add(HEADER_BYTES + CRC_BYTES));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&length_u64(self.data.len()).to_le_bytes());
        let mut disk_end = 0;
        let mut layer_end = 0;
        for region in &self.data {
            // `new` has checked that neither gap nor length is negative
            put_leb128(&mut out, region.disk.start.get().saturating_sub(disk_end));
            put_leb128(&mut out, region.layer.start.get().saturating_sub(layer_end));
            put_leb128(&mut out, region.length());
            disk_end = region.disk.end.get();
            layer_end = region.layer.end.get();
        }
        out.extend_from_slice(&crc32(&out).to_le_bytes());
        out
    }
}

/// A length in memory, which is never longer than this.
pub(super) fn length_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn put_leb128(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(disk: u64, layer: u64, length: u64) -> DataRegion {
        DataRegion::new(DiskOffset(disk), LayerOffset(layer), length).unwrap()
    }

    fn sample() -> Regions {
        Regions::new(
            1 << 20,
            vec![
                region(4096, 512, 10),
                region(8192, 1536, 4096),
                region(12288, 9000, 1),
            ],
        )
        .unwrap()
    }

    #[test]
    fn lookups_give_exactly_the_regions_that_overlap() {
        let table = sample();
        let disk = |a, b| table.in_disk(&(DiskOffset(a)..DiskOffset(b))).to_vec();
        assert_eq!(disk(0, 4096), []);
        assert_eq!(disk(0, 4097), [region(4096, 512, 10)]);
        assert_eq!(disk(4105, 8192), [region(4096, 512, 10)]);
        assert_eq!(disk(4106, 8192), []);
        assert_eq!(disk(4105, 8193).len(), 2);
        assert_eq!(disk(12287, 12289).len(), 2);
        assert_eq!(disk(12289, u64::MAX), []);
    }

    #[test]
    fn clipping_keeps_both_sides_in_step() {
        let whole = region(8192, 1536, 4096);
        assert_eq!(
            whole.clip_disk(&(DiskOffset(8200)..DiskOffset(8210))),
            Some(region(8200, 1544, 10))
        );
        assert_eq!(
            whole.clip_layer(&(LayerOffset(0)..LayerOffset(1537))),
            Some(region(8192, 1536, 1))
        );
        assert_eq!(whole.clip_disk(&(DiskOffset(0)..DiskOffset(8192))), None);
        assert_eq!(
            whole.clip_layer(&(LayerOffset(5632)..LayerOffset(u64::MAX))),
            None
        );
    }

    #[test]
    fn disorder_is_refused() {
        let bad = |data| Regions::new(1 << 20, data).unwrap_err();
        let of = |index| RegionError::Region { index };
        assert_eq!(bad(vec![region(0, 0, 0)]), of(0));
        assert_eq!(bad(vec![region(0, 0, 9), region(8, 9, 1)]), of(1));
        assert_eq!(bad(vec![region(0, 0, 9), region(9, 8, 1)]), of(1));
        assert_eq!(bad(vec![region((1 << 20) - 1, 0, 2)]), of(0));
        let mut two_lengths = region(0, 0, 9);
        two_lengths.layer.end = LayerOffset(8);
        assert_eq!(bad(vec![two_lengths]), of(0));
    }
}
