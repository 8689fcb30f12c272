//! The region table of a disk that is served: as small in memory as it is in its file.
//!
//! An open disk keeps the bytes of the file, six or so a region, and the place of every sixteenth region in them. A lookup finds the
//! place by bisection and decodes from there. (A hundred layers of 10,000 files are 8 MB so; as [`DataRegion`]s they are 32.)

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

use std::ops::Range;

use super::{CRC_BYTES, DataRegion, MAGIC, RegionError, VERSION, crc32, length_u64};
use crate::units::{DiskOffset, LayerOffset};

/// The fewest bytes that a region takes: three numbers of one byte.
const MIN_REGION_BYTES: u64 = 3;

/// Regions from one mark to the next.
const STRIDE: usize = 16;

/// A region table, checked and in its file's format.
#[derive(Debug, PartialEq, Eq)]
pub struct RegionTable {
    size: u64,
    /// The encoded regions.
    bytes: Box<[u8]>,
    /// Where decoding can begin: before the first region, and before every sixteenth that follows.
    marks: Box<[Mark]>,
}

/// What decoding a region needs to know of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    disk_end: DiskOffset,
    layer_end: LayerOffset,
    at: usize,
}

impl RegionTable {
    /// Reads what [`crate::ext4::Regions::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, RegionError> {
        let mut input = Reader { bytes, at: 0 };
        if input.array::<8>()? != *MAGIC {
            return Err(RegionError::Magic);
        }
        let found = u32::from_le_bytes(input.array()?);
        if found != VERSION {
            return Err(RegionError::Version { found });
        }
        let Some((body, tail)) = bytes.split_last_chunk::<CRC_BYTES>() else {
            return Err(RegionError::Truncated { at: bytes.len() });
        };
        let found = u32::from_le_bytes(*tail);
        let computed = crc32(body);
        if found != computed {
            return Err(RegionError::Checksum { found, computed });
        }
        input.bytes = body;
        let size = u64::from_le_bytes(input.array()?);
        let count = u64::from_le_bytes(input.array()?);
        let room = length_u64(input.left()) / MIN_REGION_BYTES;
        if count > room {
            return Err(RegionError::Truncated { at: body.len() });
        }
        let regions = body.get(input.at..).unwrap_or_default();
        let mut input = Reader {
            bytes: regions,
            at: 0,
        };
        let mut mark = Mark {
            disk_end: DiskOffset(0),
            layer_end: LayerOffset(0),
            at: 0,
        };
        let mut marks = Vec::new();
        // at most as many as there are bytes
        for index in 0..usize::try_from(count).unwrap_or(usize::MAX) {
            if index.is_multiple_of(STRIDE) {
                marks.push(mark);
            }
            let region = input.region(&mark)?;
            let region = region.filter(|region| region.length() > 0);
            let region = region.filter(|region| region.disk.end.get() <= size);
            let region = region.ok_or(RegionError::Region { index })?;
            mark = Mark {
                disk_end: region.disk.end,
                layer_end: region.layer.end,
                at: input.at,
            };
        }
        if input.left() > 0 {
            return Err(RegionError::TrailingBytes {
                count: input.left(),
            });
        }
        Ok(Self {
            size,
            bytes: regions.into(),
            marks: marks.into(),
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the last region ends on the disk: only metadata and zeros stand behind it.
    pub fn data_end(&self) -> DiskOffset {
        let last = self.from(|_| true).last();
        last.map_or(DiskOffset(0), |region| region.disk.end)
    }

    /// The regions that share at least one byte with `range` of the disk, in order. What of `range` no region has is metadata or zero.
    pub fn in_disk(&self, range: &Range<DiskOffset>) -> impl Iterator<Item = DataRegion> {
        let Range { start, end } = *range;
        self.from(|mark| mark.disk_end <= start)
            .skip_while(move |region| region.disk.end <= start)
            .take_while(move |region| region.disk.start < end)
    }

    /// The regions that share at least one byte with `range` of the layer, in order. What of `range` no region has is tar headers and
    /// padding.
    pub fn in_layer(&self, range: &Range<LayerOffset>) -> impl Iterator<Item = DataRegion> {
        let Range { start, end } = *range;
        self.from(|mark| mark.layer_end <= start)
            .skip_while(move |region| region.layer.end <= start)
            .take_while(move |region| region.layer.start < end)
    }

    /// All regions from the last mark on that `is_before` holds for.
    fn from(&self, is_before: impl Fn(&Mark) -> bool) -> Decoded<'_> {
        let after = self.marks.partition_point(is_before);
        let mark = after.checked_sub(1).and_then(|last| self.marks.get(last));
        Decoded {
            bytes: &self.bytes,
            mark: mark.copied(),
        }
    }
}

/// Regions, decoded one after the other.
struct Decoded<'a> {
    bytes: &'a [u8],
    mark: Option<Mark>,
}

impl Iterator for Decoded<'_> {
    type Item = DataRegion;

    fn next(&mut self) -> Option<DataRegion> {
        let mark = self.mark.as_mut()?;
        let mut input = Reader {
            bytes: self.bytes,
            at: mark.at,
        };
        if input.left() == 0 {
            return None;
        }
        // `decode` has been here: there is no error
        let region = input.region(mark).ok().flatten()?;
        *mark = Mark {
            disk_end: region.disk.end,
            layer_end: region.layer.end,
            at: input.at,
        };
        Some(region)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RegionError> {
        let field = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.first_chunk::<N>())
            .ok_or(RegionError::Truncated {
                at: self.bytes.len(),
            })?;
        self.at = self.at.saturating_add(N);
        Ok(*field)
    }

    /// The region after those that `mark` tells of; `None` where its place overflows.
    fn region(&mut self, mark: &Mark) -> Result<Option<DataRegion>, RegionError> {
        let disk = mark.disk_end.checked_add(self.leb128()?);
        let layer = mark.layer_end.checked_add(self.leb128()?);
        let length = self.leb128()?;
        Ok(disk
            .zip(layer)
            .and_then(|(disk, layer)| DataRegion::new(disk, layer, length)))
    }

    fn leb128(&mut self) -> Result<u64, RegionError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            // the tenth byte has room for one bit only; a last byte without any should not be there
            if (shift == 63 && bits > 1) || (shift > 0 && byte == 0) {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(RegionError::Number { at: self.at })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ext4::Regions;

    fn region(disk: u64, layer: u64, length: u64) -> DataRegion {
        DataRegion::new(DiskOffset(disk), LayerOffset(layer), length).unwrap()
    }

    fn sample() -> Regions {
        let regions = vec![
            region(4096, 512, 10),
            region(8192, 1536, 4096),
            region(12288, 9000, 1),
        ];
        Regions::new(1 << 20, regions).unwrap()
    }

    fn all(table: &RegionTable) -> Vec<DataRegion> {
        table
            .in_disk(&(DiskOffset(0)..DiskOffset(u64::MAX)))
            .collect()
    }

    #[test]
    fn a_table_comes_back_from_its_bytes() {
        for regions in [sample(), Regions::new(0, vec![]).unwrap()] {
            let table = RegionTable::decode(&regions.encode()).unwrap();
            assert_eq!(table.size(), regions.size());
            let end = all(&table).last().map_or(DiskOffset(0), |it| it.disk.end);
            assert_eq!(table.data_end(), end);
            assert_eq!(all(&table), regions.into_data());
        }
    }

    #[test]
    fn lookups_give_exactly_the_regions_that_overlap() {
        let table = RegionTable::decode(&sample().encode()).unwrap();
        let disk = |a, b| -> Vec<_> { table.in_disk(&(DiskOffset(a)..DiskOffset(b))).collect() };
        assert_eq!(disk(0, 4096), []);
        assert_eq!(disk(0, 4097), [region(4096, 512, 10)]);
        assert_eq!(disk(4105, 8192), [region(4096, 512, 10)]);
        assert_eq!(disk(4106, 8192), []);
        assert_eq!(disk(4105, 8193).len(), 2);
        assert_eq!(disk(12287, 12289).len(), 2);
        assert_eq!(disk(12289, u64::MAX), []);
        let layer = |a, b| -> Vec<_> {
            let range = LayerOffset(a)..LayerOffset(b);
            table.in_layer(&range).collect()
        };
        assert_eq!(layer(0, 512), []);
        assert_eq!(layer(521, 1537).len(), 2);
        assert_eq!(layer(522, 1536), []);
        assert_eq!(layer(0, u64::MAX).len(), 3);
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(RegionTable::decode(&changed).is_err(), "byte {at}");
            assert!(RegionTable::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut newer = bytes;
        newer[8] = 2;
        assert_eq!(
            RegionTable::decode(&newer),
            Err(RegionError::Version { found: 2 })
        );
    }

    #[test]
    fn a_number_has_one_form() {
        let number = |bytes: &[u8]| Reader { bytes, at: 0 }.leb128();
        assert_eq!(number(&[0x80, 0x01]), Ok(0x80));
        assert_eq!(number(&[0x81, 0x00]), Err(RegionError::Number { at: 2 }));
        let max = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(number(&max), Ok(u64::MAX));
        let above = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        assert_eq!(number(&above), Err(RegionError::Number { at: 10 }));
    }

    #[test]
    fn a_region_takes_few_bytes() {
        let regions = (0..10_000).map(|file| region(file * 8192, file * 7168 + 512, 6000));
        let regions = Regions::new(1 << 30, regions.collect()).unwrap();
        let table = RegionTable::decode(&regions.encode()).unwrap();
        let bytes = table.bytes.len() + size_of_val(&*table.marks);
        assert!(bytes < 80_000, "{bytes} bytes for 10,000 files");
    }

    proptest! {
        #[test]
        fn any_table_gives_what_a_plain_search_finds(
            gaps in proptest::collection::vec((0u64..9000, 0u64..9000, 1u64..9000), 0..100),
            range in (0u64..1_000_000, 0u64..50_000),
        ) {
            let (mut disk, mut layer) = (0, 0);
            let mut regions = Vec::new();
            for (disk_gap, layer_gap, length) in gaps {
                regions.push(region(disk + disk_gap, layer + layer_gap, length));
                disk += disk_gap + length;
                layer += layer_gap + length;
            }
            let table = Regions::new(1 << 30, regions.clone()).unwrap();
            let table = RegionTable::decode(&table.encode()).unwrap();
            let on_disk = DiskOffset(range.0)..DiskOffset(range.0 + range.1);
            let found: Vec<_> = table.in_disk(&on_disk).collect();
            let wanted = regions.iter().filter(|region| region.clip_disk(&on_disk).is_some());
            if range.1 > 0 {
                prop_assert_eq!(found, wanted.cloned().collect::<Vec<_>>());
            }
            let in_layer = LayerOffset(range.0)..LayerOffset(range.0 + range.1);
            let found: Vec<_> = table.in_layer(&in_layer).collect();
            let wanted = regions.iter().filter(|region| region.clip_layer(&in_layer).is_some());
            if range.1 > 0 {
                prop_assert_eq!(found, wanted.cloned().collect::<Vec<_>>());
            }
        }

        #[test]
        fn hostile_bodies_with_a_right_check_sum_give_an_error_or_a_sound_table(
            body in proptest::collection::vec(any::<u8>(), 0..64),
            count in prop_oneof![0u64..8, any::<u64>()],
        ) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&VERSION.to_le_bytes());
            bytes.extend_from_slice(&u64::MAX.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&body);
            let crc = crc32(&bytes);
            bytes.extend_from_slice(&crc.to_le_bytes());
            if let Ok(table) = RegionTable::decode(&bytes) {
                let regions = all(&table);
                prop_assert_eq!(regions.len() as u64, count);
                let regions = Regions::new(table.size(), regions).unwrap();
                prop_assert_eq!(RegionTable::decode(&regions.encode()), Ok(table));
            }
        }
    }
}
