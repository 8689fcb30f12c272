//! Blocks of directories: one block of entries in the order of their names, or an index by hash over blocks of entries
//! (Documentation/filesystems/ext4/directory.rst).

use zerocopy::IntoBytes;

use super::{
    BLOCK_SIZE,
    format::{DX_HASH_HALF_MD4, DirEntry2, DxCountLimit, DxEntry, DxRootInfo, FT_DIR},
    hash::{Hasher, NameHash},
};

const BLOCK: usize = BLOCK_SIZE as usize;
const HEAD: usize = size_of::<DirEntry2>();
/// Bytes of the first block of a hashed directory before its index entries: `.`, `..` and the description of the index.
const ROOT_HEAD: usize = 12 + 12 + size_of::<DxRootInfo>();
/// Index entries in the first block.
const ROOT_ENTRIES: usize = (BLOCK - ROOT_HEAD) / size_of::<DxEntry>();
/// Index entries in another block of the index: an entry that fills the block for those who do not know of indexes comes first.
const NODE_ENTRIES: usize = (BLOCK - HEAD) / size_of::<DxEntry>();
/// The most blocks of entries: an index of two levels (three need the `large_dir` feature). With the longest names, 3.9 million
/// entries.
pub(super) const LEAF_LIMIT: usize = ROOT_ENTRIES * NODE_ENTRIES;

/// An entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) inode: u32,
    /// `FT_*`.
    pub(super) file_type: u8,
}

impl Name<'_> {
    /// Bytes that the entry takes.
    fn size(&self) -> usize {
        (HEAD + self.name.len()).next_multiple_of(4)
    }
}

/// The blocks of a directory, the last one perhaps without zeros at its end, and whether they have an index.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) bytes: Vec<u8>,
    pub(super) indexed: bool,
}

/// A directory needs more than [`LEAF_LIMIT`] blocks.
#[derive(Debug)]
pub(super) struct TooManyNames;

/// Lays out the directory with inode `this` below `parent`. `names` come in bytewise order.
pub(super) fn lay_out(
    this: u32,
    parent: u32,
    names: &[Name<'_>],
    hasher: Hasher,
) -> Result<Blocks, TooManyNames> {
    let dots = dots(this, parent);
    let linear: usize = names.iter().map(Name::size).sum::<usize>() + 2 * dots[0].size();
    if linear <= BLOCK {
        // the rest of the block, which belongs to the last entry, is zero
        let mut bytes = vec![0; linear];
        fill(&mut bytes, dots.iter().chain(names));
        return Ok(Blocks {
            bytes,
            indexed: false,
        });
    }
    hashed(dots, names, hasher).map(|bytes| Blocks {
        bytes,
        indexed: true,
    })
}

fn dots(this: u32, parent: u32) -> [Name<'static>; 2] {
    [(&b"."[..], this), (b"..", parent)].map(|(name, inode)| Name {
        name,
        inode,
        file_type: FT_DIR,
    })
}

/// Writes entries one after the other; the last one's length goes to the end of the block, also if `block` is only its beginning.
fn fill<'n>(block: &mut [u8], entries: impl Iterator<Item = &'n Name<'n>>) {
    let mut entries = entries.peekable();
    let mut at = 0;
    while let Some(entry) = entries.next() {
        let length = match entries.peek() {
            Some(_) => entry.size(),
            None => BLOCK - at,
        };
        put(&mut block[at..], entry, length);
        at += length;
    }
}

fn put(out: &mut [u8], entry: &Name<'_>, rec_len: usize) {
    let head = DirEntry2 {
        inode: entry.inode.into(),
        // both fit: a block has 4096 bytes, and the tree takes no name over 255
        rec_len: (rec_len as u16).into(),
        name_len: entry.name.len() as u8,
        file_type: entry.file_type,
    };
    out[..HEAD].copy_from_slice(head.as_bytes());
    out[HEAD..HEAD + entry.name.len()].copy_from_slice(entry.name);
}

/// Block 0 with the index's root, then the index's other blocks if one is not enough, then the blocks of entries, full and in the
/// order of their hashes.
fn hashed(
    dots: [Name<'_>; 2],
    names: &[Name<'_>],
    hasher: Hasher,
) -> Result<Vec<u8>, TooManyNames> {
    let mut sorted: Vec<(NameHash, u32)> = names
        .iter()
        .zip(0..)
        .map(|(entry, position)| (hasher.hash(entry.name), position))
        .collect();
    sorted.sort_unstable();
    let leaves = split(names, &sorted);
    if leaves.len() > LEAF_LIMIT {
        return Err(TooManyNames);
    }
    let node_count = match leaves.len() {
        0..=ROOT_ENTRIES => 0,
        more => more.div_ceil(NODE_ENTRIES),
    };
    let first_leaf = 1 + node_count;
    let mut bytes = vec![0; (first_leaf + leaves.len()) * BLOCK];
    let (blocks, _) = bytes.as_chunks_mut::<BLOCK>();
    let (index, entry_blocks) = blocks.split_at_mut(first_leaf);
    for (block, leaf) in entry_blocks.iter_mut().zip(&leaves) {
        let entries = sorted[leaf.entries.clone()].iter();
        fill(block, entries.map(|&(_, at)| &names[at as usize]));
    }
    // LEAF_LIMIT blocks have 32-bit numbers
    let bottom: Vec<DxEntry> = leaves
        .iter()
        .zip(first_leaf as u32..)
        .map(|(leaf, block)| dx_entry(leaf.hash, block))
        .collect();
    let (root, nodes) = index.split_at_mut(1);
    put_root_head(&mut root[0], dots, node_count > 0);
    if node_count == 0 {
        put_index(&mut root[0][ROOT_HEAD..], ROOT_ENTRIES, &bottom);
        return Ok(bytes);
    }
    let mut top = Vec::with_capacity(node_count);
    for ((node, entries), block) in nodes.iter_mut().zip(bottom.chunks(NODE_ENTRIES)).zip(1..) {
        let empty = Name {
            name: b"",
            inode: 0,
            file_type: 0,
        };
        put(node, &empty, BLOCK);
        put_index(&mut node[HEAD..], NODE_ENTRIES, entries);
        top.push(dx_entry(entries[0].hash.get(), block));
    }
    put_index(&mut root[0][ROOT_HEAD..], ROOT_ENTRIES, &top);
    Ok(bytes)
}

/// A block of entries to be.
struct Leaf {
    /// Which of the sorted entries.
    entries: std::ops::Range<usize>,
    /// The hash of its first, with the lowest bit set if the block before ends with the same.
    hash: u32,
}

fn split(names: &[Name<'_>], sorted: &[(NameHash, u32)]) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = vec![];
    let mut used = BLOCK;
    let mut previous = None;
    for (position, &(hash, at)) in sorted.iter().enumerate() {
        let size = names[at as usize].size();
        match leaves.last_mut() {
            Some(leaf) if used + size <= BLOCK => leaf.entries.end = position + 1,
            _ => {
                let goes_on = previous == Some(hash.major);
                leaves.push(Leaf {
                    entries: position..position + 1,
                    hash: hash.major | u32::from(goes_on),
                });
                used = 0;
            }
        }
        used += size;
        previous = Some(hash.major);
    }
    leaves
}

fn put_root_head(block: &mut [u8], dots: [Name<'_>; 2], has_nodes: bool) {
    let at = dots[0].size();
    put(block, &dots[0], at);
    put(&mut block[at..], &dots[1], BLOCK - at);
    let info = DxRootInfo {
        reserved_zero: 0.into(),
        hash_version: DX_HASH_HALF_MD4,
        info_length: size_of::<DxRootInfo>() as u8,
        indirect_levels: u8::from(has_nodes),
        unused_flags: 0,
    };
    block[ROOT_HEAD - size_of::<DxRootInfo>()..ROOT_HEAD].copy_from_slice(info.as_bytes());
}

fn dx_entry(hash: u32, block: u32) -> DxEntry {
    DxEntry {
        hash: hash.into(),
        block: block.into(),
    }
}

/// Index entries; in place of the first one's hash, which the level above has, stand how many there are and could be.
fn put_index(out: &mut [u8], limit: usize, entries: &[DxEntry]) {
    let all = entries.as_bytes();
    out[..all.len()].copy_from_slice(all);
    let counts = DxCountLimit {
        limit: (limit as u16).into(),
        count: (entries.len() as u16).into(),
    };
    out[..size_of::<DxCountLimit>()].copy_from_slice(counts.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize, length: usize) -> Vec<Vec<u8>> {
        (0..count)
            .map(|n| format!("{n:0length$}").into_bytes())
            .collect()
    }

    fn laid_out(names: &[Vec<u8>]) -> Result<Blocks, TooManyNames> {
        let names: Vec<Name<'_>> = names
            .iter()
            .zip(11..)
            .map(|(name, inode)| Name {
                name,
                inode,
                file_type: 1,
            })
            .collect();
        lay_out(2, 2, &names, Hasher::new([7; 16]))
    }

    /// Inodes of all entries of the blocks from `first` on.
    fn inodes(bytes: &[u8], first: usize) -> Vec<u32> {
        let mut found = vec![];
        for block in bytes.chunks(BLOCK).skip(first) {
            let mut at = 0;
            while at < BLOCK {
                found.push(u32::from_le_bytes(block[at..at + 4].try_into().unwrap()));
                at += usize::from(u16::from_le_bytes(
                    block[at + 4..at + 6].try_into().unwrap(),
                ));
            }
            assert_eq!(at, BLOCK);
        }
        found.sort_unstable();
        found
    }

    #[test]
    fn one_block_is_filled_to_its_end_before_there_is_an_index() {
        // 24 bytes of `.` and `..`, and 254 entries of 16 bytes, leave 8
        let full = laid_out(&names(254, 8)).unwrap();
        assert_eq!((full.bytes.len(), full.indexed), (BLOCK - 8, false));
        let over = laid_out(&names(255, 8)).unwrap();
        assert!(over.indexed);
        assert_eq!(inodes(&over.bytes, 1), (11..266).collect::<Vec<_>>());
    }

    #[test]
    fn a_second_level_begins_where_the_first_is_full() {
        // 255 bytes: 15 entries a block
        let one_level = laid_out(&names(15 * ROOT_ENTRIES, 255)).unwrap();
        assert_eq!(one_level.bytes.len(), (1 + ROOT_ENTRIES) * BLOCK);
        let count = 15 * ROOT_ENTRIES + 1;
        let two_levels = laid_out(&names(count, 255)).unwrap();
        assert_eq!(two_levels.bytes.len(), (1 + 1 + ROOT_ENTRIES + 1) * BLOCK);
        let expected: Vec<u32> = (11..).take(count).collect();
        assert_eq!(inodes(&two_levels.bytes, 2), expected);
    }

    #[test]
    fn names_of_one_hash_in_two_blocks_are_marked() {
        let names = names(100, 100);
        let names: Vec<Name<'_>> = names
            .iter()
            .map(|name| Name {
                name,
                inode: 11,
                file_type: 1,
            })
            .collect();
        let hash = |major| NameHash { major, minor: 0 };
        let sorted: Vec<(NameHash, u32)> = (0..100).map(|n| (hash(n / 90 * 2), n)).collect();
        let hashes: Vec<u32> = split(&names, &sorted).iter().map(|l| l.hash).collect();
        assert_eq!(hashes, [0, 1, 1]);
    }
}
