//! A layer's ext4 image: from a tree to a layout (pure), from a layout to bytes.
//!
//! Data comes first and metadata last, so that a layer can be written to its disk while it streams by, before its tree is known:
//! the data of the n-th regular entry has its place by rule ([`DataPlacer`]), whatever the tree turns out to be.

use crate::{tar::Entry, tree::Tree, units::DiskOffset};

pub mod format;
mod region;

pub use region::{DataRegion, RegionError, Regions};

/// Bytes of a block.
pub const BLOCK_SIZE: u64 = 4096;

/// Gives the data of each regular entry its place, in tar order.
#[derive(Debug, Default)]
pub struct DataPlacer {}

impl DataPlacer {
    /// The disk offset for an entry with `size` bytes of data (a sparse file: its full size); call once for each regular entry with
    /// `size > 0`, in tar order.
    pub fn place(&mut self, size: u64) -> Result<DiskOffset, Error> {
        let _ = size;
        unimplemented!("module ext4")
    }
}

/// A disk laid out: where everything is, and the bytes of all metadata.
#[derive(Debug)]
pub struct Layout {
    /// Size of the disk; a multiple of the block size. Its last 2 MiB are zero.
    pub size: u64,
    /// File data.
    pub regions: Vec<DataRegion>,
    /// Blocks of metadata: where, and their bytes. Sorted. All else on the disk is zero.
    pub metadata: Vec<(DiskOffset, Vec<u8>)>,
}

impl Layout {
    /// Lays a layer out. `seed` (the digest of the table) gives UUID and hash seed; the same arguments give the same bytes.
    pub fn new(tree: &Tree, entries: &[Entry], seed: &[u8; 32]) -> Result<Self, Error> {
        let _ = (tree, entries, seed);
        unimplemented!("module ext4")
    }
}

/// What ext4 cannot hold: the path and the limit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
