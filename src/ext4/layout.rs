//! The whole disk: file data, then directories and what else has no fixed place, then inode tables and bitmaps, then zeros.
//!
//! ```text
//! block 0        superblock
//! 1..1025        group descriptors; what they do not need is free
//! 1025..         data of each regular entry in tar order, from a block's start; that of replaced entries is free
//! then           directories, long symlinks, xattr blocks, extent blocks | inode tables | block bitmaps | inode bitmaps
//! then           2 MiB of zero, free
//! ```

mod data;
mod placed;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use zerocopy::IntoBytes;

use self::{
    data::Data,
    placed::{Body, Placed},
};
use super::{
    BLOCK_SIZE, DataRegion, Error, Regions,
    area::Area,
    dir,
    extent::{self, ExtentRun},
    format::{
        EXTENTS_FL, FIRST_INO, INDEX_FL, INODE_SIZE, LINK_MAX, ROOT_INO, SUPERBLOCK_OFFSET,
        XATTR_REFCOUNT_MAX, XattrHeader,
    },
    group::{Geometry, Groups, INODES_PER_BLOCK, Usage},
    hash::Hasher,
    inode, superblock, xattr,
};
use crate::{
    tar::{Entry, Segment},
    tree::{NodeId, NodeKind, ROOT, Tree, shown},
    units::DiskOffset,
};

/// The longest text of a symlink: with its zero byte it fills a block.
const SYMLINK_LIMIT: usize = BLOCK_SIZE as usize - 1;
/// Blocks are counted in `i_blocks` by 512 bytes.
const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / 512;

/// A disk laid out: where everything is, and the bytes of all metadata but the inodes', which are made as they are written
/// ([`Layout::write_metadata`]): a disk of 100,000 files has 25 MB of them.
#[derive(Debug)]
pub struct Layout<'a> {
    /// Size of the disk; a multiple of the block size. Its last 2 MiB are zero.
    pub size: u64,
    /// File data, also that of entries which later ones replace.
    pub regions: Vec<DataRegion>,
    tree: &'a Tree<'a>,
    geometry: Geometry,
    /// Superblock and group descriptors.
    head: Vec<u8>,
    area: Area,
    inodes: Inodes,
    groups: Groups,
}

impl<'a> Layout<'a> {
    /// Lays a layer out. `seed` (the digest of the table) gives UUID and hash seed; the same arguments give the same bytes.
    ///
    /// `entries` are those that `tree` was built from, in tar order: their data must be in that order in the layer too.
    pub fn new(tree: &'a Tree<'a>, entries: &[Entry], seed: &[u8; 32]) -> Result<Self, Error> {
        let data = Data::place(entries)?;
        let identity = superblock::Identity::new(seed);
        let mut writer = Writer {
            tree,
            entries,
            data: &data,
            hasher: Hasher::new(identity.hash_seed),
            // a disk has less than 2^32 blocks
            area: Area::new(data.end as u32),
            inodes: Inodes::default(),
            used: vec![],
            directories: vec![],
            xattr_blocks: HashMap::new(),
        };
        writer.place_inodes()?;
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

        let size = geometry.blocks * BLOCK_SIZE;
        // also looks at their order in the layer
        let regions = Regions::new(size, data.regions)?;
        Ok(Self {
            size,
            regions: regions.into_data(),
            tree,
            geometry,
            head,
            area,
            inodes,
            groups,
        })
    }

    /// Gives the metadata to `sink`, piece by piece: where, and the bytes. In order, without overlap, each from a block's start; zeros
    /// at the end of the last block of a piece may be left out. All else on the disk is zero.
    pub fn write_metadata<E>(
        &self,
        mut sink: impl FnMut(DiskOffset, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut put = |block: u64, bytes: &[u8]| sink(DiskOffset(block * BLOCK_SIZE), bytes);
        put(0, &self.head)?;
        for (block, bytes) in self.area.pieces() {
            put(block.into(), bytes)?;
        }
        let mut table = [0; BLOCK_SIZE as usize];
        let blocks = inode_count(self.tree).div_ceil(INODES_PER_BLOCK);
        for block in 0..blocks {
            // inodes are counted from 1, in 32 bits
            let first = (block * INODES_PER_BLOCK + 1) as u32;
            let (slots, _) = table.as_chunks_mut::<INODE_SIZE>();
            for (slot, number) in slots.iter_mut().zip(first..) {
                self.put_inode(slot, number);
            }
            put(self.geometry.inode_tables + block, &table)?;
        }
        for (group, bitmap) in &self.groups.block_bitmaps {
            put(self.geometry.block_bitmaps + group, bitmap)?;
        }
        for (group, bitmap) in &self.groups.inode_bitmaps {
            put(self.geometry.inode_bitmaps + group, bitmap)?;
        }
        Ok(())
    }

    /// The inode of that number, which may be none of a node's.
    fn put_inode(&self, slot: &mut [u8; INODE_SIZE], number: u32) {
        let id = node_of_inode(number);
        let found = id.and_then(|id| Some((id, self.tree.nodes.get(id as usize)?)));
        let Some((id, node)) = found else {
            slot.fill(0);
            return;
        };
        let mut inode = inode::inode(node);
        let placed = &self.inodes.placed[id as usize];
        let sectors = u64::from(placed.blocks) * SECTORS_PER_BLOCK;
        inode.i_blocks_lo = (sectors as u32).into();
        inode.l_i_blocks_high = ((sectors >> 32) as u16).into();
        inode.i_size_lo = (placed.size as u32).into();
        inode.i_size_high = ((placed.size >> 32) as u32).into();
        inode.i_flags = placed.flags.into();
        inode.i_block = placed.i_block();
        inode.i_file_acl_lo = placed.xattr_block.into();
        if let Some(body) = self.inodes.xattrs.get(&id) {
            inode.body = *body;
        }
        slot.copy_from_slice(inode.as_bytes());
    }

    /// The region table of this layout.
    pub fn table(&self) -> Regions {
        Regions::of_layout(self.size, self.regions.clone())
    }
}

/// What the nodes' inodes have by their places.
#[derive(Debug, Default)]
struct Inodes {
    /// For each node.
    placed: Vec<Placed>,
    /// Xattrs in inodes, where there are any.
    xattrs: BTreeMap<NodeId, [u8; xattr::BODY]>,
}

/// Inodes in use: 10 reserved ones, of which the root is one, and those of the other nodes.
fn inode_count(tree: &Tree<'_>) -> u64 {
    u64::from(FIRST_INO - 1) + tree.nodes.len().saturating_sub(1) as u64
}

/// A node's inode. There are fewer nodes than 2^32 by more than the reserved ones: a tree's limit.
fn inode_number(node: NodeId) -> u32 {
    match node {
        ROOT => ROOT_INO,
        other => other + FIRST_INO - 1,
    }
}

/// The node of an inode, or one that no tree has; `None` for the other reserved ones.
fn node_of_inode(number: u32) -> Option<NodeId> {
    match number {
        ROOT_INO => Some(ROOT),
        other => Some(other.checked_sub(FIRST_INO)? + 1),
    }
}

/// Places inodes one after the other, and with each what it has in the area.
struct Writer<'a> {
    tree: &'a Tree<'a>,
    entries: &'a [Entry],
    data: &'a Data,
    hasher: Hasher,
    area: Area,
    inodes: Inodes,
    /// Blocks of file data in use.
    used: Vec<Range<u64>>,
    /// Inodes of directories.
    directories: Vec<u32>,
    /// Blocks of xattrs that inodes can share, and how many do.
    xattr_blocks: HashMap<Vec<u8>, (u32, u32)>,
}

impl Writer<'_> {
    fn place_inodes(&mut self) -> Result<(), Error> {
        let parents = self.parents();
        self.inodes.placed.reserve_exact(self.tree.nodes.len());
        // in the order of the inodes, for the directories' counts
        for node in 0..self.tree.nodes.len() as NodeId {
            let placed = self.place_inode(node, parents[node as usize])?;
            self.inodes.placed.push(placed);
        }
        Ok(())
    }

    /// For each directory the one that it is in; the root is in itself.
    fn parents(&self) -> Vec<NodeId> {
        let mut parents = vec![ROOT; self.tree.nodes.len()];
        for (node, parent) in self.tree.nodes.iter().zip(0..) {
            if let NodeKind::Directory(names) = &node.kind {
                for &(_, child) in names {
                    parents[child as usize] = parent;
                }
            }
        }
        parents
    }

    fn place_inode(&mut self, id: NodeId, parent: NodeId) -> Result<Placed, Error> {
        let tree = self.tree;
        let node = tree.node(id);
        let mut placed = match &node.kind {
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
                Placed::bare(i_block, 0)
            }
            NodeKind::Fifo => Placed::bare([0; 60], 0),
        };
        let is_directory = matches!(node.kind, NodeKind::Directory(_));
        if node.links > LINK_MAX && !is_directory {
            return Err(Error::TooManyLinks {
                path: self.path(id),
                links: node.links,
                limit: LINK_MAX,
            });
        }
        if !node.xattrs.is_empty() {
            self.place_xattrs(id, &mut placed)?;
        }
        Ok(placed)
    }

    fn place_xattrs(&mut self, id: NodeId, placed: &mut Placed) -> Result<(), Error> {
        let node = self.tree.node(id);
        let is_directory = matches!(node.kind, NodeKind::Directory(_));
        let xattrs = xattr::lay_out(&node.xattrs, node.mode, is_directory)
            .map_err(|refused| self.xattr_error(id, refused))?;
        self.inodes.xattrs.insert(id, xattrs.body);
        if let Some(block) = xattrs.block {
            placed.xattr_block = self.share_xattr_block(block);
            placed.blocks += 1;
        }
        Ok(())
    }

    fn file(&mut self, entry: usize, size: u64) -> Placed {
        if size == 0 {
            return self.mapped(&[], 0, 0);
        }
        match &self.entries[entry].sparse {
            None => self.on_disk(&[self.run(entry, 0..size.div_ceil(BLOCK_SIZE))], size),
            Some(segments) => self.on_disk(&self.data_runs(entry, segments), size),
        }
    }

    /// A file whose data has these blocks.
    fn on_disk(&mut self, runs: &[ExtentRun], size: u64) -> Placed {
        for run in runs {
            let start = u64::from(run.physical);
            let end = start + u64::from(run.count);
            match self.used.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => self.used.push(start..end),
            }
        }
        self.mapped(runs, size, 0)
    }

    /// These blocks of a file.
    fn run(&self, entry: usize, blocks: Range<u64>) -> ExtentRun {
        // a file is smaller than the disk, which has less than 2^32 blocks
        ExtentRun {
            logical: blocks.start as u32,
            physical: self.data.starts[entry] + blocks.start as u32,
            count: (blocks.end - blocks.start) as u32,
        }
    }

    /// The blocks of a sparse file that have a byte of data. They stand as far from the first as in the file, so that it has the same
    /// place whether its map is known or not.
    fn data_runs(&self, entry: usize, segments: &[Segment]) -> Vec<ExtentRun> {
        let mut ranges: Vec<Range<u64>> = vec![];
        for segment in segments.iter().filter(|segment| segment.length > 0) {
            let first = segment.file_offset / BLOCK_SIZE;
            let end = (segment.file_offset + segment.length).div_ceil(BLOCK_SIZE);
            match ranges.last_mut() {
                Some(last) if last.end >= first => last.end = end,
                _ => ranges.push(first..end),
            }
        }
        let runs = ranges.into_iter().map(|blocks| self.run(entry, blocks));
        runs.collect()
    }

    /// An inode with an extent tree over `runs`.
    fn mapped(&mut self, runs: &[ExtentRun], size: u64, flags: u32) -> Placed {
        let (body, tree_blocks) = match runs {
            [run] if extent::fits_root(runs) => (Body::Run(*run), 0),
            _ => {
                let tree = extent::tree(runs, &mut self.area);
                (Body::Other(tree.i_block.into()), tree.blocks)
            }
        };
        let data_blocks: u32 = runs.iter().map(|run| run.count).sum();
        Placed {
            body,
            flags: flags | EXTENTS_FL,
            size,
            blocks: data_blocks + tree_blocks,
            xattr_block: 0,
        }
    }

    /// An inode with these bytes in the area.
    fn stored(&mut self, bytes: &[u8], size: u64, flags: u32) -> Placed {
        let block = self.area.push(bytes);
        let run = ExtentRun {
            logical: 0,
            physical: block,
            count: bytes.len().div_ceil(BLOCK_SIZE as usize) as u32,
        };
        self.mapped(&[run], size, flags)
    }

    fn directory(
        &mut self,
        id: NodeId,
        parent: NodeId,
        names: &[(&[u8], NodeId)],
    ) -> Result<Placed, Error> {
        let names: Vec<dir::Name<'_>> = names
            .iter()
            .map(|&(name, child)| {
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

    fn symlink(&mut self, id: NodeId, text: &[u8]) -> Result<Placed, Error> {
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
        Ok(Placed::bare(i_block, text.len() as u64))
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
