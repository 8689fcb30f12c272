//! The whole disk: file data, then directories and what else has no fixed place, then inode tables and bitmaps, then zeros.
//!
//! ```text
//! block 0        superblock
//! 1..1025        group descriptors; what they do not need is free
//! 1025..         data of each regular entry in tar order, from a block's start; that of replaced entries is free
//! then           directories, long symlinks, xattr blocks, extent blocks | inode tables | block bitmaps | inode bitmaps
//! then           2 MiB of zero, free
//! ```

use std::{collections::HashMap, ops::Range};

use zerocopy::IntoBytes;

use super::{
    BLOCK_SIZE, DataPlacer, DataRegion, Error, Regions,
    area::Area,
    dir,
    extent::{self, Run},
    format::{
        EXTENTS_FL, FIRST_INO, INDEX_FL, INODE_SIZE, Inode, LINK_MAX, ROOT_INO, SUPERBLOCK_OFFSET,
        XATTR_REFCOUNT_MAX, XattrHeader,
    },
    group::{Geometry, Groups, Usage},
    hash::Hasher,
    inode, superblock, xattr,
};
use crate::{
    tar::{Entry, EntryKind},
    tree::{NodeId, NodeKind, ROOT, Tree, shown},
    units::DiskOffset,
};

/// The longest text of a symlink: with its zero byte it fills a block.
const SYMLINK_LIMIT: usize = BLOCK_SIZE as usize - 1;
/// Blocks are counted in `i_blocks` by 512 bytes.
const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / 512;

/// A disk laid out: where everything is, and the bytes of all metadata.
#[derive(Debug)]
pub struct Layout {
    /// Size of the disk; a multiple of the block size. Its last 2 MiB are zero.
    pub size: u64,
    /// File data, also that of entries which later ones replace.
    pub regions: Vec<DataRegion>,
    /// Metadata: where, and the bytes. Sorted, without overlap, each from a block's start; zeros at the end of the last block of a run
    /// may be left out. All else on the disk is zero.
    pub metadata: Vec<(DiskOffset, Vec<u8>)>,
}

impl Layout {
    /// Lays a layer out. `seed` (the digest of the table) gives UUID and hash seed; the same arguments give the same bytes.
    ///
    /// `entries` are those that `tree` was built from, in tar order: their data must be in that order in the layer too.
    pub fn new(tree: &Tree, entries: &[Entry], seed: &[u8; 32]) -> Result<Self, Error> {
        let data = Data::place(entries)?;
        let identity = superblock::Identity::new(seed);
        let mut writer = Writer {
            tree,
            entries,
            data: &data,
            hasher: Hasher::new(identity.hash_seed),
            // a disk has less than 2^32 blocks
            area: Area::new(data.end as u32),
            inodes: vec![0; inode_count(tree) as usize * INODE_SIZE],
            used: vec![],
            directories: vec![],
            xattr_blocks: HashMap::new(),
        };
        writer.write_inodes()?;
        let area_end = u64::from(writer.area.end());
        let geometry = Geometry::new(area_end, inode_count(tree))?;
        let used = writer.used_blocks(&geometry);
        let Writer {
            area,
            inodes,
            directories,
            ..
        } = writer;

        let usage = Usage {
            blocks: &used,
            inodes: inode_count(tree),
            directories: &directories,
        };
        let groups = Groups::new(&geometry, &usage, &identity.uuid);
        let mut head = vec![0; SUPERBLOCK_OFFSET as usize];
        let superblock = superblock::superblock(&geometry, &groups, &identity);
        head.extend_from_slice(superblock.as_bytes());
        head.resize(BLOCK_SIZE as usize, 0);
        head.extend_from_slice(&groups.descriptors);

        let mut metadata = Runs::default();
        metadata.add(0, head);
        for (block, bytes) in area.into_pieces() {
            metadata.add(block.into(), bytes);
        }
        metadata.add(geometry.inode_tables, inodes);
        for (group, bitmap) in groups.block_bitmaps {
            metadata.add(geometry.block_bitmaps + group, bitmap);
        }
        for (group, bitmap) in groups.inode_bitmaps {
            metadata.add(geometry.inode_bitmaps + group, bitmap);
        }
        let size = geometry.blocks * BLOCK_SIZE;
        // also looks at their order in the layer
        let regions = Regions::new(size, data.regions)?;
        Ok(Self {
            size,
            regions: regions.into_data(),
            metadata: metadata.runs,
        })
    }

    /// The region table of this layout.
    pub fn table(&self) -> Regions {
        Regions::of_layout(self.size, self.regions.clone())
    }
}

/// Inodes in use: 10 reserved ones, of which the root is one, and those of the other nodes.
fn inode_count(tree: &Tree) -> u64 {
    u64::from(FIRST_INO - 1) + tree.nodes.len().saturating_sub(1) as u64
}

/// A node's inode. There are fewer nodes than 2^32 by more than the reserved ones: a tree's limit.
fn inode_number(node: NodeId) -> u32 {
    match node {
        ROOT => ROOT_INO,
        other => other + FIRST_INO - 1,
    }
}

/// Where the data of all entries is.
struct Data {
    /// For each entry the first block of its data; 0 where it has none.
    starts: Vec<u32>,
    regions: Vec<DataRegion>,
    /// The block after the last.
    end: u64,
}

impl Data {
    fn place(entries: &[Entry]) -> Result<Self, Error> {
        let mut placer = DataPlacer::default();
        let mut starts = vec![0; entries.len()];
        let mut regions = vec![];
        for (index, entry) in entries.iter().enumerate() {
            if entry.kind != EntryKind::Regular || entry.size == 0 {
                continue;
            }
            let disk = placer.place(entry.size)?;
            starts[index] = (disk.get() / BLOCK_SIZE) as u32;
            let beyond = || Error::DataBeyondLayer {
                path: shown(&entry.name),
            };
            let Some(segments) = &entry.sparse else {
                let region = DataRegion::new(disk, entry.data_offset, entry.size);
                regions.push(region.ok_or_else(beyond)?);
                continue;
            };
            let mut file_end = 0;
            for segment in segments.iter().filter(|segment| segment.length > 0) {
                let end = segment.file_offset.checked_add(segment.length);
                if segment.file_offset < file_end || end.is_none_or(|end| end > entry.size) {
                    return Err(Error::SparseSegment {
                        path: shown(&entry.name),
                        offset: segment.file_offset,
                    });
                }
                file_end = segment.file_offset + segment.length;
                let region = disk
                    .checked_add(segment.file_offset)
                    .and_then(|disk| DataRegion::new(disk, segment.layer_offset, segment.length));
                regions.push(region.ok_or_else(beyond)?);
            }
        }
        Ok(Self {
            starts,
            regions,
            end: placer.end(),
        })
    }
}

/// Writes inodes one after the other, and with each what it has in the area.
struct Writer<'a> {
    tree: &'a Tree,
    entries: &'a [Entry],
    data: &'a Data,
    hasher: Hasher,
    area: Area,
    /// The inode tables of all groups, as far as inodes are in use.
    inodes: Vec<u8>,
    /// Blocks of file data in use.
    used: Vec<Range<u64>>,
    /// Inodes of directories.
    directories: Vec<u32>,
    /// Blocks of xattrs that inodes can share, and how many do.
    xattr_blocks: HashMap<Vec<u8>, (u32, u32)>,
}

/// What an inode has by its place.
#[derive(Default)]
struct Body {
    i_block: Option<[u8; 60]>,
    size: u64,
    blocks: u64,
    flags: u32,
}

impl Writer<'_> {
    fn write_inodes(&mut self) -> Result<(), Error> {
        let parents = self.parents();
        // in the order of the inodes, for the directories' counts
        for node in 0..self.tree.nodes.len() as NodeId {
            self.write_inode(node, parents[node as usize])?;
        }
        Ok(())
    }

    /// For each directory the one that it is in; the root is in itself.
    fn parents(&self) -> Vec<NodeId> {
        let mut parents = vec![ROOT; self.tree.nodes.len()];
        for (node, parent) in self.tree.nodes.iter().zip(0..) {
            if let NodeKind::Directory(names) = &node.kind {
                for &child in names.values() {
                    parents[child as usize] = parent;
                }
            }
        }
        parents
    }

    fn write_inode(&mut self, id: NodeId, parent: NodeId) -> Result<(), Error> {
        let tree = self.tree;
        let node = tree.node(id);
        let body = match &node.kind {
            NodeKind::File { entry, size } => self.file(*entry, *size),
            NodeKind::Directory(names) => {
                self.directories.push(inode_number(id));
                self.directory(id, parent, names)?
            }
            NodeKind::Symlink(text) => self.symlink(id, text)?,
            NodeKind::Char(major, minor) | NodeKind::Block(major, minor) => {
                let i_block = inode::device(*major, *minor);
                let i_block = i_block.ok_or_else(|| Error::DeviceNumber {
                    path: self.path(id),
                    major: *major,
                    minor: *minor,
                })?;
                Body {
                    i_block: Some(i_block),
                    ..Body::default()
                }
            }
            NodeKind::Fifo => Body::default(),
        };
        let is_directory = matches!(node.kind, NodeKind::Directory(_));
        if node.links > LINK_MAX && !is_directory {
            return Err(Error::TooManyLinks {
                path: self.path(id),
                links: node.links,
                limit: LINK_MAX,
            });
        }
        let xattrs = xattr::lay_out(&node.xattrs, node.mode, is_directory)
            .map_err(|refused| self.xattr_error(id, refused))?;
        let mut inode = inode::inode(node);
        inode.body = xattrs.body;
        let mut blocks = body.blocks;
        if let Some(block) = xattrs.block {
            inode.i_file_acl_lo = self.share_xattr_block(block).into();
            blocks += 1;
        }
        let sectors = blocks * SECTORS_PER_BLOCK;
        inode.i_blocks_lo = (sectors as u32).into();
        inode.l_i_blocks_high = ((sectors >> 32) as u16).into();
        inode.i_size_lo = (body.size as u32).into();
        inode.i_size_high = ((body.size >> 32) as u32).into();
        inode.i_flags = body.flags.into();
        inode.i_block = body.i_block.unwrap_or([0; 60]);
        self.put(id, &inode);
        Ok(())
    }

    fn put(&mut self, id: NodeId, inode: &Inode) {
        let at = (inode_number(id) - 1) as usize * INODE_SIZE;
        self.inodes[at..at + INODE_SIZE].copy_from_slice(inode.as_bytes());
    }

    fn file(&mut self, entry: usize, size: u64) -> Body {
        let runs = if size == 0 {
            vec![]
        } else {
            self.data_runs(entry, size)
        };
        for run in &runs {
            let start = u64::from(run.physical);
            let end = start + u64::from(run.count);
            match self.used.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => self.used.push(start..end),
            }
        }
        let data_blocks: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        self.mapped(&runs, data_blocks, size, 0)
    }

    /// The blocks of a file: all of it, or of a sparse file those that have a byte of data. They stand as far from the first as in the
    /// file, so that a sparse file has the same place whether its map is known or not.
    fn data_runs(&self, entry: usize, size: u64) -> Vec<Run> {
        let start = self.data.starts[entry];
        // a file is smaller than the disk, which has less than 2^32 blocks
        let run = |blocks: Range<u64>| Run {
            logical: blocks.start as u32,
            physical: start + blocks.start as u32,
            count: (blocks.end - blocks.start) as u32,
        };
        let Some(segments) = &self.entries[entry].sparse else {
            return vec![run(0..size.div_ceil(BLOCK_SIZE))];
        };
        let mut ranges: Vec<Range<u64>> = vec![];
        for segment in segments.iter().filter(|segment| segment.length > 0) {
            let first = segment.file_offset / BLOCK_SIZE;
            let end = (segment.file_offset + segment.length).div_ceil(BLOCK_SIZE);
            match ranges.last_mut() {
                Some(last) if last.end >= first => last.end = end,
                _ => ranges.push(first..end),
            }
        }
        ranges.into_iter().map(run).collect()
    }

    /// A body with an extent tree over `runs`.
    fn mapped(&mut self, runs: &[Run], data_blocks: u64, size: u64, flags: u32) -> Body {
        let tree = extent::tree(runs, &mut self.area);
        Body {
            i_block: Some(tree.i_block),
            size,
            blocks: data_blocks + tree.blocks,
            flags: flags | EXTENTS_FL,
        }
    }

    /// A body with these bytes in the area.
    fn stored(&mut self, bytes: &[u8], size: u64, flags: u32) -> Body {
        let block = self.area.push(bytes);
        let count = bytes.len().div_ceil(BLOCK_SIZE as usize) as u32;
        let run = Run {
            logical: 0,
            physical: block,
            count,
        };
        self.mapped(&[run], count.into(), size, flags)
    }

    fn directory(
        &mut self,
        id: NodeId,
        parent: NodeId,
        names: &std::collections::BTreeMap<Vec<u8>, NodeId>,
    ) -> Result<Body, Error> {
        let names: Vec<dir::Name<'_>> = names
            .iter()
            .map(|(name, &child)| {
                let (_, file_type) = inode::types(&self.tree.node(child).kind);
                dir::Name {
                    name,
                    inode: inode_number(child),
                    file_type,
                }
            })
            .collect();
        let (this, parent) = (inode_number(id), inode_number(parent));
        let blocks =
            dir::lay_out(this, parent, &names, self.hasher).map_err(|_| Error::TooManyNames {
                path: self.path(id),
                names: names.len(),
                limit: dir::LEAF_LIMIT,
            })?;
        let flags = if blocks.indexed { INDEX_FL } else { 0 };
        let size = (blocks.bytes.len() as u64).next_multiple_of(BLOCK_SIZE);
        Ok(self.stored(&blocks.bytes, size, flags))
    }

    fn symlink(&mut self, id: NodeId, text: &[u8]) -> Result<Body, Error> {
        if text.len() > SYMLINK_LIMIT {
            return Err(Error::SymlinkTooLong {
                path: self.path(id),
                length: text.len(),
                limit: SYMLINK_LIMIT,
            });
        }
        if text.len() >= inode::FAST_SYMLINK_LIMIT {
            return Ok(self.stored(text, text.len() as u64, 0));
        }
        let mut i_block = [0; 60];
        i_block[..text.len()].copy_from_slice(text);
        Ok(Body {
            i_block: Some(i_block),
            size: text.len() as u64,
            ..Body::default()
        })
    }

    /// The block with these xattrs: one that another inode has, or a new one.
    fn share_xattr_block(&mut self, bytes: Vec<u8>) -> u32 {
        if let Some((block, references)) = self.xattr_blocks.get_mut(&bytes)
            && *references < XATTR_REFCOUNT_MAX
        {
            *references += 1;
            let field = std::mem::offset_of!(XattrHeader, h_refcount);
            self.area.patch(*block, field, &references.to_le_bytes());
            return *block;
        }
        let block = self.area.push(&bytes);
        self.xattr_blocks.insert(bytes, (block, 1));
        block
    }

    /// All blocks in use, in order.
    fn used_blocks(&mut self, geometry: &Geometry) -> Vec<Range<u64>> {
        let mut used = std::mem::take(&mut self.used);
        // a superblock and the descriptors; from the end of the data to the tail all is in use
        used.push(0..1 + geometry.descriptor_blocks());
        used.push(self.data.end..geometry.used_end());
        used.sort_unstable_by_key(|range| range.start);
        used
    }

    fn path(&self, id: NodeId) -> String {
        shown(&self.tree.path_of(id))
    }

    fn xattr_error(&self, id: NodeId, refused: xattr::Refused) -> Error {
        let path = self.path(id);
        match refused {
            xattr::Refused::TooLarge { bytes, limit } => {
                Error::XattrsTooLarge { path, bytes, limit }
            }
            xattr::Refused::Name { name, limit } => Error::XattrNameTooLong {
                path,
                name: shown(&name),
                limit,
            },
            xattr::Refused::Acl { name } => Error::Acl {
                path,
                name: shown(&name),
            },
        }
    }
}

/// Runs of bytes; neighbours are joined while they are small.
#[derive(Default)]
struct Runs {
    runs: Vec<(DiskOffset, Vec<u8>)>,
}

/// A run of this size is worth a write of its own: copying it to join it to its neighbour is not.
const JOIN_LIMIT: usize = 1 << 20;

impl Runs {
    fn add(&mut self, block: u64, bytes: Vec<u8>) {
        let start = block * BLOCK_SIZE;
        match self.runs.last_mut() {
            Some((last_start, last))
                if last_start.get() + last.len() as u64 == start && bytes.len() < JOIN_LIMIT =>
            {
                last.extend_from_slice(&bytes);
            }
            _ if bytes.is_empty() => {}
            _ => self.runs.push((DiskOffset(start), bytes)),
        }
    }
}
