//! Writes the bytes of a span to the blocks of its files.

use std::{
    fs::File,
    io::{self, IoSlice},
};

use crate::{
    ext4::{BLOCK_SIZE, DataRegion},
    units::LayerOffset,
};

const ZEROS: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];
/// IOV_MAX.
const MAX_SLICES: usize = 1024;

/// Writes the bytes of the layer at `start` to those of `regions` that contain them. It writes exactly these bytes, and zeros from the end
/// of a file to the start of the next one in the same write. Returns their CRC-32, in the layer's order.
///
/// Small files are adjacent both in the layer and on the disk, so one system call writes many of them.
pub(crate) fn scatter(
    disk: &File,
    regions: impl Iterator<Item = DataRegion>,
    start: LayerOffset,
    bytes: &[u8],
) -> io::Result<u32> {
    let end = LayerOffset(start.get().saturating_add(bytes.len() as u64));
    let mut crc = flate2::Crc::new();
    let mut run = AdjacentWrite::default();
    for region in regions {
        let Some(part) = region.clip_layer(&(start..end)) else {
            continue;
        };
        run.continue_at(disk, part.disk.start.get())?;
        // inside `bytes`: the part is clipped to them
        let from = (part.layer.start.get() - start.get()) as usize;
        let to = (part.layer.end.get() - start.get()) as usize;
        crc.update(&bytes[from..to]);
        run.push(&bytes[from..to]);
    }
    run.write(disk)?;
    Ok(crc.sum())
}

/// Slices for adjacent ranges of the disk.
#[derive(Default)]
struct AdjacentWrite<'a> {
    position: u64,
    length: u64,
    slices: Vec<IoSlice<'a>>,
}

impl<'a> AdjacentWrite<'a> {
    /// Continues at `position`: with zeros if only the rest of a block is between, otherwise with a new run.
    fn continue_at(&mut self, disk: &File, position: u64) -> io::Result<()> {
        let end = self.position + self.length;
        let padding = position.wrapping_sub(end);
        let same_block_end = position == end.next_multiple_of(BLOCK_SIZE);
        if self.length > 0
            && self.slices.len() + 2 <= MAX_SLICES
            && (padding == 0 || same_block_end)
        {
            self.push(&ZEROS[..padding as usize]); // less than a block
        } else {
            self.write(disk)?;
            self.position = position;
        }
        Ok(())
    }

    fn push(&mut self, bytes: &'a [u8]) {
        if !bytes.is_empty() {
            self.slices.push(IoSlice::new(bytes));
            self.length += bytes.len() as u64;
        }
    }

    fn write(&mut self, disk: &File) -> io::Result<()> {
        let mut slices = self.slices.as_mut_slice();
        let mut position = self.position;
        while !slices.is_empty() {
            match rustix::io::pwritev(disk, slices, position) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    position += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.slices.clear();
        self.length = 0;
        Ok(())
    }
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]
mod tests {
    use std::{ops::Range, os::unix::fs::FileExt as _};

    use super::*;
    use crate::units::DiskOffset;

    fn region(disk: u64, layer: u64, length: u64) -> DataRegion {
        DataRegion {
            disk: DiskOffset(disk)..DiskOffset(disk + length),
            layer: LayerOffset(layer)..LayerOffset(layer + length),
        }
    }

    /// Scatters the spans of a layer, in this order, over a disk filled with 0xee, and returns the disk.
    fn scattered(regions: &[DataRegion], layer: &[u8], spans: &[Range<usize>]) -> Vec<u8> {
        let disk = tempfile::tempfile().unwrap();
        let size = regions.iter().map(|region| region.disk.end.get()).max();
        let size = size.unwrap().next_multiple_of(BLOCK_SIZE) as usize;
        disk.write_all_at(&vec![0xee; size], 0).unwrap();
        for span in spans {
            let start = LayerOffset(span.start as u64);
            let regions = regions.iter().cloned();
            scatter(&disk, regions, start, &layer[span.clone()]).unwrap();
        }
        let mut bytes = vec![0; size];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn layer(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index % 251) as u8).collect()
    }

    #[test]
    fn each_region_gets_its_bytes_and_other_ranges_do_not_change() {
        // the second region follows in the next block, the third after a hole
        let regions = [
            region(4096, 512, 100),
            region(8192, 1536, 5000),
            region(40960, 7168, 4096),
        ];
        let layer = layer(20000);
        let disk = scattered(&regions, &layer, &[0..20000]);
        for region in &regions {
            let at = region.disk.start.get() as usize..region.disk.end.get() as usize;
            let from = region.layer.start.get() as usize..region.layer.end.get() as usize;
            assert_eq!(disk[at], layer[from]);
        }
        assert!(disk[..4096].iter().all(|byte| *byte == 0xee));
        assert!(disk[4196..8192].iter().all(|byte| *byte == 0), "padding");
        assert!(disk[13192..40960].iter().all(|byte| *byte == 0xee));
    }

    #[test]
    fn a_span_that_ends_inside_a_file_does_not_write_the_rest_of_the_block() {
        let regions = [region(0, 512, 4000), region(4096, 5120, 300)];
        let layer = layer(6000);
        let disk = scattered(&regions, &layer, &[0..600]);
        assert_eq!(disk[..88], layer[512..600]);
        assert!(disk[88..].iter().all(|byte| *byte == 0xee));
        // the other half first: the bytes of the first write stay
        let disk = scattered(&regions, &layer, &[600..6000, 0..600]);
        assert_eq!(disk[..4000], layer[512..4512]);
        assert_eq!(disk[4096..4396], layer[5120..5420]);
    }

    #[test]
    fn more_files_than_one_system_call_writes() {
        let regions: Vec<_> = (0..3000)
            .map(|index| region(index * 4096, index * 1024 + 512, 500))
            .collect();
        let layer = layer(3000 * 1024);
        let disk = scattered(&regions, &layer, &[0..layer.len()]);
        for region in &regions {
            let at = region.disk.start.get() as usize;
            let from = region.layer.start.get() as usize;
            assert_eq!(disk[at..at + 500], layer[from..from + 500]);
        }
    }
}
