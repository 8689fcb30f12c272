//! Where file data goes: by rule, in tar order, so that it can be written before the tree is known.

use super::{BLOCK_SIZE, Error};
use crate::units::DiskOffset;

/// Blocks before the first file's data: the superblock, and 4 MiB in which the group descriptors grow with the tree.
///
/// They are holes but for what is used. As many descriptors as 32-bit block numbers can ever need fit there (16 TiB), and the probes
/// of `blkid`, which look for superblocks at 1 and 2 MiB too, meet no data that would have to be fetched.
pub(super) const RESERVED_BLOCKS: u64 = 1 + 1024;

/// The most blocks of a disk, 4 TiB: some forty times the largest layers there are. A table may state any size in a few bytes, and a
/// disk's block bitmaps take a 32,768th of it (128 MiB at this limit) in memory while it is laid out.
pub(super) const BLOCK_LIMIT: u64 = 1 << 30;

/// Gives the data of each regular entry its place, in tar order: contiguous, from a block's start.
#[derive(Clone, Debug, Default)]
pub struct DataPlacer {
    /// Blocks given so far.
    blocks: u64,
}

impl DataPlacer {
    /// The disk offset for an entry with `size` bytes of data (a sparse file: its full size); call once for each regular entry with
    /// `size > 0`, in tar order.
    pub fn place(&mut self, size: u64) -> Result<DiskOffset, Error> {
        let start = self.end();
        let end = start.saturating_add(size.div_ceil(BLOCK_SIZE));
        if end > BLOCK_LIMIT {
            return Err(too_large());
        }
        self.blocks = end - RESERVED_BLOCKS;
        Ok(DiskOffset(start * BLOCK_SIZE))
    }

    /// The block after the last that was given.
    pub(super) fn end(&self) -> u64 {
        RESERVED_BLOCKS + self.blocks
    }
}

pub(super) fn too_large() -> Error {
    Error::DiskTooLarge {
        limit: BLOCK_LIMIT * BLOCK_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_contiguous_and_start_on_blocks() {
        let mut placer = DataPlacer::default();
        let start = RESERVED_BLOCKS * BLOCK_SIZE;
        assert_eq!(placer.place(1).unwrap(), DiskOffset(start));
        assert_eq!(placer.place(4096).unwrap(), DiskOffset(start + 4096));
        assert_eq!(placer.place(4097).unwrap(), DiskOffset(start + 8192));
        assert_eq!(placer.place(1).unwrap(), DiskOffset(start + 16384));
    }

    #[test]
    fn a_disk_ends_at_its_limit() {
        let mut placer = DataPlacer::default();
        let most = (BLOCK_LIMIT - RESERVED_BLOCKS) * BLOCK_SIZE;
        for size in [most + 1, u64::MAX, 1 << 62] {
            assert!(matches!(
                placer.clone().place(size),
                Err(Error::DiskTooLarge { limit }) if limit == 4 << 40
            ));
        }
        placer.place(most).unwrap();
        assert!(placer.place(1).is_err());
    }
}
