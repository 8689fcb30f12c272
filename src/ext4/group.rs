//! Block groups: how many there are, which blocks and inodes are in use, and their descriptors and bitmaps
//! (Documentation/filesystems/ext4/group_descr.rst, bitmaps.rst).
//!
//! With the feature `flex_bg` a group's bitmaps and inode table may be anywhere: here all are at the end of the disk, each kind in
//! one piece. Bitmaps of groups with nothing in use stay holes, as the descriptor's flags allow with `gdt_csum`.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::{
    BLOCK_SIZE, Error, TAIL_BYTES,
    format::{
        BG_BLOCK_UNINIT, BG_INODE_UNINIT, BG_INODE_ZEROED, FIRST_INO, GroupDescriptor, INODE_SIZE,
    },
    place::{BLOCK_LIMIT, too_large},
};

/// Blocks of a group, and the most inodes: the bits of a block.
pub(super) const GROUP_BLOCKS: u64 = BLOCK_SIZE * 8;
const TAIL_BLOCKS: u64 = TAIL_BYTES / BLOCK_SIZE;
pub(super) const INODES_PER_BLOCK: u64 = BLOCK_SIZE / INODE_SIZE as u64;
const DESCRIPTORS_PER_BLOCK: u64 = BLOCK_SIZE / size_of::<GroupDescriptor>() as u64;

/// The sizes of a disk, and where its tables are. Blocks are counted from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    /// First block of the inode tables, one after the other.
    pub(super) inode_tables: u64,
    /// First block of the block bitmaps.
    pub(super) block_bitmaps: u64,
    /// First block of the inode bitmaps.
    pub(super) inode_bitmaps: u64,
}

impl Geometry {
    /// A disk whose data and directories end before block `end`, with `inodes` in use, the reserved ones counted.
    pub(super) fn new(end: u64, inodes: u64) -> Result<Self, Error> {
        let mut groups = inodes.div_ceil(GROUP_BLOCKS).max(1);
        loop {
            let per_group = inodes
                .div_ceil(groups)
                .max(FIRST_INO.into())
                .next_multiple_of(INODES_PER_BLOCK);
            let block_bitmaps = end + groups * (per_group / INODES_PER_BLOCK);
            let inode_bitmaps = block_bitmaps + groups;
            let used = inode_bitmaps + groups + TAIL_BLOCKS;
            // where inodes need more groups than blocks do, the last group has at least as much as the tail
            let blocks = used.max((groups - 1) * GROUP_BLOCKS + TAIL_BLOCKS);
            if blocks > BLOCK_LIMIT {
                return Err(too_large());
            }
            let needed = blocks.div_ceil(GROUP_BLOCKS);
            if needed == groups {
                return Ok(Self {
                    blocks,
                    groups,
                    inodes_per_group: per_group,
                    inode_tables: end,
                    block_bitmaps,
                    inode_bitmaps,
                });
            }
            groups = needed;
        }
    }

    /// Blocks that the group descriptors take.
    pub(super) fn descriptor_blocks(&self) -> u64 {
        self.groups.div_ceil(DESCRIPTORS_PER_BLOCK)
    }

    /// Blocks of one group's inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    /// The block after the last that is in use.
    pub(super) fn used_end(&self) -> u64 {
        self.inode_bitmaps + self.groups
    }

    /// The blocks of group `group`.
    fn group(&self, group: u64) -> Range<u64> {
        let start = group * GROUP_BLOCKS;
        start..(start + GROUP_BLOCKS).min(self.blocks)
    }
}

/// Descriptors and bitmaps of all groups.
#[derive(Debug)]
pub(super) struct Groups {
    pub(super) descriptors: Vec<u8>,
    /// For each block bitmap that is on the disk the group and the bits; groups in order.
    pub(super) block_bitmaps: Vec<(u64, Vec<u8>)>,
    /// The same for inode bitmaps.
    pub(super) inode_bitmaps: Vec<(u64, Vec<u8>)>,
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
}

/// What is in use on a disk.
pub(super) struct Usage<'a> {
    /// Blocks, in order and without overlap.
    pub(super) blocks: &'a [Range<u64>],
    /// Inodes, the reserved ones counted; they are the first ones.
    pub(super) inodes: u64,
    /// Numbers of the inodes that are directories, from 1, in order.
    pub(super) directories: &'a [u32],
}

impl Groups {
    /// Lays out all groups.
    pub(super) fn new(geometry: &Geometry, usage: &Usage<'_>, uuid: &[u8; 16]) -> Self {
        let mut this = Self {
            descriptors: Vec::new(),
            block_bitmaps: Vec::new(),
            inode_bitmaps: Vec::new(),
            free_blocks: 0,
            free_inodes: 0,
        };
        for group in 0..geometry.groups {
            let descriptor = this.group(geometry, usage, uuid, group);
            this.descriptors.extend_from_slice(descriptor.as_bytes());
        }
        this
    }

    fn group(
        &mut self,
        geometry: &Geometry,
        usage: &Usage<'_>,
        uuid: &[u8; 16],
        group: u64,
    ) -> GroupDescriptor {
        let blocks = geometry.group(group);
        let mut flags = BG_INODE_ZEROED;

        let (bitmap, used_blocks) = block_bitmap(usage.blocks, &blocks);
        let free_blocks = blocks.end - blocks.start - used_blocks;
        // the last group's has bits beyond the disk, which must be set
        if used_blocks == 0 && group + 1 < geometry.groups {
            flags |= BG_BLOCK_UNINIT;
        } else {
            self.block_bitmaps.push((group, bitmap));
        }

        let first_inode = group * geometry.inodes_per_group;
        let used_inodes = usage
            .inodes
            .saturating_sub(first_inode)
            .min(geometry.inodes_per_group);
        let free_inodes = geometry.inodes_per_group - used_inodes;
        if used_inodes == 0 {
            flags |= BG_INODE_UNINIT;
        } else {
            let bitmap = inode_bitmap(used_inodes, geometry.inodes_per_group);
            self.inode_bitmaps.push((group, bitmap));
        }
        let before = |end: u64| {
            usage
                .directories
                .partition_point(|&inode| u64::from(inode) <= end)
        };
        let directories = before(first_inode + geometry.inodes_per_group) - before(first_inode);

        self.free_blocks += free_blocks;
        self.free_inodes += free_inodes;
        // a disk has less than 2^32 blocks, a group no more than 2^15 blocks and inodes
        let mut descriptor = GroupDescriptor {
            bg_block_bitmap_lo: ((geometry.block_bitmaps + group) as u32).into(),
            bg_inode_bitmap_lo: ((geometry.inode_bitmaps + group) as u32).into(),
            bg_inode_table_lo: ((geometry.inode_tables + group * geometry.table_blocks()) as u32)
                .into(),
            bg_free_blocks_count_lo: (free_blocks as u16).into(),
            bg_free_inodes_count_lo: (free_inodes as u16).into(),
            bg_used_dirs_count_lo: (directories as u16).into(),
            bg_flags: flags.into(),
            bg_itable_unused_lo: (free_inodes as u16).into(),
            ..GroupDescriptor::default()
        };
        let bytes = descriptor.as_bytes();
        let covered = &bytes[..bytes.len() - size_of::<u16>()];
        // groups are counted in 32 bits
        let parts = [&uuid[..], &(group as u32).to_le_bytes(), covered];
        descriptor.bg_checksum = crc16(&parts).into();
        descriptor
    }
}

/// The bitmap of a group, and how many of its blocks are in use.
fn block_bitmap(used: &[Range<u64>], group: &Range<u64>) -> (Vec<u8>, u64) {
    let mut bitmap = vec![0; BLOCK_SIZE as usize];
    let first = used.partition_point(|range| range.end <= group.start);
    let mut count = 0;
    for range in used[first..].iter().take_while(|r| r.start < group.end) {
        let start = range.start.max(group.start) - group.start;
        let end = range.end.min(group.end) - group.start;
        set(&mut bitmap, start..end);
        count += end - start;
    }
    set(&mut bitmap, group.end - group.start..GROUP_BLOCKS);
    (bitmap, count)
}

fn inode_bitmap(used: u64, per_group: u64) -> Vec<u8> {
    let mut bitmap = vec![0; BLOCK_SIZE as usize];
    set(&mut bitmap, 0..used);
    set(&mut bitmap, per_group..GROUP_BLOCKS);
    bitmap
}

/// Sets bits, whole bytes at once.
fn set(bitmap: &mut [u8], bits: Range<u64>) {
    let (start, end) = (bits.start as usize, bits.end as usize);
    let (whole_start, whole_end) = (start.next_multiple_of(8), end / 8 * 8);
    if whole_start < whole_end {
        bitmap[whole_start / 8..whole_end / 8].fill(0xff);
    }
    let single = (start..end.min(whole_start)).chain(whole_end.max(whole_start).max(start)..end);
    for bit in single {
        bitmap[bit / 8] |= 1 << (bit % 8);
    }
}

/// CRC-16 with the polynomial 0x8005, reflected, from all ones (`lib/crc16.c`).
fn crc16(parts: &[&[u8]]) -> u16 {
    let bytes = parts.iter().flat_map(|part| part.iter());
    bytes.fold(0xffff, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xA001 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_sum_is_crc_16_modbus() {
        assert_eq!(crc16(&[b"1234", b"56789"]), 0x4B37);
    }

    #[test]
    fn bits_are_set_exactly() {
        for start in 0..40u64 {
            for end in start..40 {
                let mut bitmap = [0; 5];
                set(&mut bitmap, start..end);
                let bits: Vec<u64> = (0..40)
                    .filter(|&bit| bitmap[bit as usize / 8] >> (bit % 8) & 1 == 1)
                    .collect();
                assert_eq!(bits, (start..end).collect::<Vec<_>>(), "{start}..{end}");
            }
        }
    }

    #[test]
    fn a_geometry_has_room_for_everything_and_a_zero_end() {
        let ends = [
            1025,
            32_000,
            32_200,
            32_254,
            32_255,
            32_256,
            32_768,
            1 << 20,
        ];
        for end in ends {
            for inodes in [11, 16, 17, 32_768, 32_769, 100_000, 3_000_000] {
                let g = Geometry::new(end, inodes).unwrap();
                assert!(g.groups * g.inodes_per_group >= inodes);
                assert!(g.inodes_per_group <= GROUP_BLOCKS);
                assert_eq!(g.groups, g.blocks.div_ceil(GROUP_BLOCKS));
                assert_eq!(g.inode_tables, end);
                assert_eq!(
                    g.block_bitmaps,
                    end + g.groups * g.inodes_per_group * 256 / 4096
                );
                assert!(g.used_end() + 512 <= g.blocks);
                assert!(g.descriptor_blocks() <= 1024);
            }
        }
    }

    #[test]
    fn a_disk_over_the_limit_is_refused() {
        assert!(Geometry::new(BLOCK_LIMIT, 11).is_err());
        assert!(Geometry::new(1025, 1 << 31).is_err());
        let most = Geometry::new(BLOCK_LIMIT - 200_000, 11).unwrap();
        assert_eq!(most.descriptor_blocks(), 256);
    }
}
