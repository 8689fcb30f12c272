//! Extent trees (Documentation/filesystems/ext4/ifork.rst): four entries in the inode, and blocks of 340 below when those are not
//! enough.

use zerocopy::IntoBytes;

use super::{
    BLOCK_SIZE,
    area::Area,
    format::{EXTENT_LENGTH_MAX, EXTENT_MAGIC, Extent, ExtentHeader, ExtentIndex},
};

const HEAD: usize = size_of::<ExtentHeader>();
/// Entries in `i_block`.
const ROOT_ENTRIES: usize = (60 - HEAD) / size_of::<Extent>();
/// Entries in a block of the tree.
const NODE_ENTRIES: usize = (BLOCK_SIZE as usize - HEAD) / size_of::<Extent>();

/// Blocks of a file that are contiguous in the file and on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExtentRun {
    /// The first one's number in the file.
    pub(super) logical: u32,
    /// The first one's number on the disk.
    pub(super) physical: u32,
    /// How many.
    pub(super) count: u32,
}

/// The tree of a file: what stands in its inode, and how many blocks of the area it took.
#[derive(Debug)]
pub(super) struct ExtentTree {
    pub(super) i_block: [u8; 60],
    pub(super) blocks: u32,
}

/// Whether a tree over `runs` needs no block.
pub(super) fn fits_root(runs: &[ExtentRun]) -> bool {
    runs.iter().map(extent_count).sum::<usize>() <= ROOT_ENTRIES
}

/// `i_block` of a tree that needs no block.
pub(super) fn root(runs: &[ExtentRun]) -> [u8; 60] {
    let mut i_block = [0; 60];
    put_node(&mut i_block, 0, ROOT_ENTRIES, runs.iter().flat_map(extents));
    i_block
}

/// Builds the tree over `runs`, sorted by `logical`; blocks of the tree go to `area`.
pub(super) fn tree(runs: &[ExtentRun], area: &mut Area) -> ExtentTree {
    // each entry with the first block of the file that it is about, for the level above
    let mut level: Vec<(u32, [u8; 12])> = runs.iter().flat_map(extents).collect();
    let mut depth = 0;
    let mut blocks = 0;
    while level.len() > ROOT_ENTRIES {
        level = level
            .chunks(NODE_ENTRIES)
            .map(|entries| {
                let mut bytes = vec![0; BLOCK_SIZE as usize];
                put_node(&mut bytes, depth, NODE_ENTRIES, entries.iter().copied());
                let block = area.push(&bytes);
                blocks += 1;
                let (first, _) = entries[0];
                (first, index_entry(first, block))
            })
            .collect();
        depth += 1;
    }
    let mut i_block = [0; 60];
    put_node(&mut i_block, depth, ROOT_ENTRIES, level.into_iter());
    ExtentTree { i_block, blocks }
}

/// How many entries [`extents`] gives.
fn extent_count(run: &ExtentRun) -> usize {
    run.count.div_ceil(EXTENT_LENGTH_MAX) as usize
}

/// The entries for a run: one for each 128 MiB of it.
fn extents(run: &ExtentRun) -> impl Iterator<Item = (u32, [u8; 12])> {
    let run = *run;
    (0..run.count)
        .step_by(EXTENT_LENGTH_MAX as usize)
        .map(move |skip| {
            let length = (run.count - skip).min(EXTENT_LENGTH_MAX);
            let extent = Extent {
                ee_block: (run.logical + skip).into(),
                // at most EXTENT_LENGTH_MAX
                ee_len: (length as u16).into(),
                ee_start_hi: 0.into(),
                ee_start_lo: (run.physical + skip).into(),
            };
            (run.logical + skip, entry_bytes(&extent))
        })
}

fn index_entry(first: u32, block: u32) -> [u8; 12] {
    entry_bytes(&ExtentIndex {
        ei_block: first.into(),
        ei_leaf_lo: block.into(),
        ei_leaf_hi: 0.into(),
        ei_unused: 0.into(),
    })
}

fn entry_bytes(entry: &(impl IntoBytes + zerocopy::Immutable)) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes.copy_from_slice(entry.as_bytes());
    bytes
}

fn put_node(
    out: &mut [u8],
    depth: u16,
    limit: usize,
    entries: impl Iterator<Item = (u32, [u8; 12])>,
) {
    let (head, slots) = out.split_at_mut(HEAD);
    let mut count = 0_u16;
    for (slot, (_, entry)) in slots.as_chunks_mut::<12>().0.iter_mut().zip(entries) {
        *slot = entry;
        count += 1;
    }
    let header = ExtentHeader {
        eh_magic: EXTENT_MAGIC.into(),
        eh_entries: count.into(),
        // at most NODE_ENTRIES
        eh_max: (limit as u16).into(),
        eh_depth: depth.into(),
        eh_generation: 0.into(),
    };
    head.copy_from_slice(header.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth_and_blocks(runs: &[ExtentRun]) -> (u16, u32) {
        let tree = tree(runs, &mut Area::new(100));
        let depth = u16::from_le_bytes([tree.i_block[6], tree.i_block[7]]);
        (depth, tree.blocks)
    }

    fn scattered(count: u32) -> Vec<ExtentRun> {
        (0..count)
            .map(|n| ExtentRun {
                logical: n * 2,
                physical: 5000 + n * 2,
                count: 1,
            })
            .collect()
    }

    #[test]
    fn four_extents_of_128_mib_stand_in_the_inode() {
        let run = |count| {
            [ExtentRun {
                logical: 0,
                physical: 5000,
                count,
            }]
        };
        assert_eq!(depth_and_blocks(&[]), (0, 0));
        assert_eq!(depth_and_blocks(&run(1)), (0, 0));
        assert_eq!(depth_and_blocks(&run(4 << 15)), (0, 0));
        assert_eq!(depth_and_blocks(&run((4 << 15) + 1)), (1, 1));
    }

    #[test]
    fn depth_grows_with_the_number_of_extents() {
        assert_eq!(depth_and_blocks(&scattered(4 * 340)), (1, 4));
        assert_eq!(depth_and_blocks(&scattered(4 * 340 + 1)), (2, 5 + 1));
    }
}
