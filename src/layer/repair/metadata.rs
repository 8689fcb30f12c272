//! The checksum of the disk's metadata, which is all that is not file data, and its repair. The kernel parses the metadata, so it is
//! checked whenever a disk is opened again, before a mount.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _};

use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    buffer::Buffer,
    ext4::{BLOCK_SIZE, RegionTable},
    layer::verify::non_file_bytes,
};

const BLOCK: usize = BLOCK_SIZE as usize;

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// CRC-32 of the metadata blocks that are not zero, each with its offset. Holes are not read.
pub(crate) fn checksum(disk: &File, regions: &RegionTable) -> io::Result<u32> {
    let mut crc = flate2::Crc::new();
    each_piece(disk, regions, |start, bytes| {
        for (block, offset) in bytes.chunks(BLOCK).zip((start..).step_by(BLOCK)) {
            if !is_zero(block) {
                crc.update(&offset.to_le_bytes());
                crc.update(block);
            }
        }
        Ok(())
    })?;
    Ok(crc.sum())
}

/// Replaces the metadata of `disk` by that of `right`. Returns the number of blocks that differed.
pub(super) fn restore(disk: &File, right: &File, regions: &RegionTable) -> io::Result<u64> {
    let mut changed = 0;
    let mut expected = Vec::new();
    let mut correct = |start: u64, bytes: &[u8], expected: &[u8]| -> io::Result<()> {
        let pairs = bytes.chunks(BLOCK).zip(expected.chunks(BLOCK));
        for ((found, right), offset) in pairs.zip((start..).step_by(BLOCK)) {
            if found != right {
                disk.write_all_at(right, offset)?;
                changed += 1;
            }
        }
        Ok(())
    };
    // first the blocks that `disk` has, then those that only `right` has
    each_piece(disk, regions, |start, bytes| {
        expected.resize(bytes.len(), 0);
        right.read_exact_at(&mut expected, start)?;
        correct(start, bytes, &expected)
    })?;
    let mut found = Vec::new();
    each_piece(right, regions, |start, bytes| {
        found.resize(bytes.len(), 0);
        disk.read_exact_at(&mut found, start)?;
        correct(start, &found, bytes)
    })?;
    disk.sync_data()?;
    Ok(changed)
}

/// Passes the stored metadata, in pieces of whole blocks, ascending.
fn each_piece(
    disk: &File,
    regions: &RegionTable,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = Buffer::lend();
    for gap in gaps(regions) {
        let mut position = gap.start;
        while let Some(stored) = next_stored(disk, position..gap.end) {
            position = stored.start;
            while position < stored.end {
                let end = stored.end.min(position + PIECE);
                let bytes = buffer.of_length((end - position) as usize); // at most PIECE
                disk.read_exact_at(bytes, position)?;
                take(position, bytes)?;
                position = end;
            }
        }
    }
    Ok(())
}

/// The ranges of the disk between the blocks of its regions.
fn gaps(regions: &RegionTable) -> impl Iterator<Item = Range<u64>> {
    let mut position = 0;
    let ends = non_file_bytes::all(regions)
        .map(|region| {
            let end = region.disk.end.get().next_multiple_of(BLOCK_SIZE);
            (region.disk.start.get(), end)
        })
        .chain([(regions.size(), regions.size())]);
    ends.map(move |(start, end)| {
        let gap = position..start;
        position = end;
        gap
    })
    .filter(|gap| gap.start < gap.end)
}

/// The first part of a range, in whole blocks, that is not a hole.
fn next_stored(disk: &File, range: Range<u64>) -> Option<Range<u64>> {
    if range.is_empty() {
        return None;
    }
    let data = match rustix::fs::seek(disk, SeekFrom::Data(range.start)) {
        Ok(data) => (data - data % BLOCK_SIZE).max(range.start),
        Err(Errno::NXIO) => return None,
        // the file system does not support SEEK_DATA
        Err(_) => return Some(range),
    };
    let hole = rustix::fs::seek(disk, SeekFrom::Hole(data)).unwrap_or(range.end);
    let end = hole.next_multiple_of(BLOCK_SIZE).min(range.end);
    (data < end).then_some(data..end)
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ext4::{DataRegion, Regions},
        units::{DiskOffset, LayerOffset},
    };

    /// Metadata in blocks 0, 2, and 300 to 319; data in block 1 and in 3 to 5.
    fn disk() -> (File, RegionTable) {
        let region = |block: u64, layer: u64, length| {
            DataRegion::new(DiskOffset(block * BLOCK_SIZE), LayerOffset(layer), length).unwrap()
        };
        let regions = vec![region(1, 512, 100), region(3, 2048, 9000)];
        let regions = Regions::new(320 * BLOCK_SIZE, regions).unwrap();
        let regions = RegionTable::decode(&regions.encode()).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(320 * BLOCK_SIZE).unwrap();
        for block in [0, 2, 300, 310] {
            file.write_all_at(&[7; BLOCK], block * BLOCK_SIZE).unwrap();
        }
        (file, regions)
    }

    #[test]
    fn the_checksum_has_each_bit_of_the_metadata_and_no_file_data() {
        let (right, regions) = disk();
        let crc = checksum(&right, &regions).unwrap();
        for offset in [
            0,
            2 * BLOCK_SIZE + 5,
            250 * BLOCK_SIZE,
            320 * BLOCK_SIZE - 1,
        ] {
            let (file, _) = disk();
            assert_eq!(checksum(&file, &regions).unwrap(), crc);
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
            assert_ne!(checksum(&file, &regions).unwrap(), crc, "{offset}");
            assert_eq!(restore(&file, &right, &regions).unwrap(), 1);
            assert_eq!(checksum(&file, &regions).unwrap(), crc);
        }
        let (file, _) = disk();
        file.write_all_at(&[9; 3 * BLOCK], 3 * BLOCK_SIZE).unwrap();
        file.write_all_at(&[0; BLOCK], 310 * BLOCK_SIZE).unwrap();
        assert_ne!(checksum(&file, &regions).unwrap(), crc);
        assert_eq!(restore(&file, &right, &regions).unwrap(), 1);
        assert_eq!(checksum(&file, &regions).unwrap(), crc);
        // explicit zeros count as a hole
        file.write_all_at(&[0; BLOCK], 200 * BLOCK_SIZE).unwrap();
        assert_eq!(checksum(&file, &regions).unwrap(), crc);
    }
}
