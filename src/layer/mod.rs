//! The disk folder of a layer, `<root>/layers/sha256/<layer>/<table>/`: spans, bitmap, fetch, verify, inflate, scatter; and the stream
//! that fills the disk of a layer without a zTOC.

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use bytes::Bytes;

use crate::{
    error::{Error, Result},
    oci::{Digest, Packing},
    source::Source,
    units::DiskOffset,
};

/// A layer as its image's manifest and configuration name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob {
    /// The blob's digest.
    pub digest: Digest,
    /// The blob's size.
    pub size: u64,
    /// How it is packed.
    pub packing: Packing,
    /// Digest of the uncompressed tar, from the image's configuration.
    pub diff_id: Digest,
}

/// The folder of all disks below a root. One a root, by a lock.
pub struct Store {}

impl Store {
    /// Opens (and makes, 0700) the store; an error of kind `Busy` when another process has it.
    pub fn open(root: &Path) -> Result<Arc<Self>> {
        let _ = root;
        unimplemented!("module layer")
    }

    /// The disk of a layer for this zTOC (by its digest): the one in memory, the one on disk, or a new one made from `ztoc`.
    /// Adds `source` to the disk's sources.
    pub async fn indexed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        table: &Digest,
        ztoc: Bytes,
        source: &Source,
    ) -> Result<Arc<Disk>> {
        let _ = (layer, table, ztoc, source);
        unimplemented!("module layer")
    }

    /// A complete disk of this layer whose bytes were checked in full against the layer's digest, if there is one: it may serve any
    /// image.
    pub fn verified(self: &Arc<Self>, layer: &LayerBlob) -> Result<Option<Arc<Disk>>> {
        let _ = layer;
        unimplemented!("module layer")
    }

    /// The disk of a layer that has no zTOC: streamed once, indexed as it passes, complete at the end. `progress` is called with the
    /// compressed bytes so far. One stream a layer, however many ask.
    pub async fn streamed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        source: &Source,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Arc<Disk>> {
        let _ = (layer, source, progress);
        unimplemented!("module layer")
    }
}

/// What a range of a disk is, for NBD's BLOCK_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Metadata, or present data.
    Present,
    /// Data that has to be fetched first.
    Absent,
    /// Zero, and stays so.
    Zero,
}

/// Paths of a layer that matter for stacking, kept with the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StackingFacts {
    /// The layer's root is opaque.
    pub opaque_root: bool,
    /// Directories that the tar only implies.
    pub implied: Vec<Vec<u8>>,
    /// Paths that are whiteouts.
    pub whiteouts: Vec<Vec<u8>>,
}

/// Counters of a disk since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Ranged GETs made.
    pub fetches: u64,
    /// Compressed bytes fetched.
    pub fetched_bytes: u64,
}

/// One layer's disk, open.
pub struct Disk {}

impl Disk {
    /// The layer.
    pub fn layer(&self) -> &LayerBlob {
        unimplemented!("module layer")
    }

    /// The digest of the table that it was laid out from.
    pub fn table(&self) -> &Digest {
        unimplemented!("module layer")
    }

    /// Bytes of the ext4 image.
    pub fn size(&self) -> u64 {
        unimplemented!("module layer")
    }

    /// `disk.ext4`.
    pub fn path(&self) -> &Path {
        unimplemented!("module layer")
    }

    /// `disk.ext4`, open for reading.
    pub fn file(&self) -> &File {
        unimplemented!("module layer")
    }

    /// Whether every span is present (and, where that is known, verified as a whole).
    pub fn is_complete(&self) -> bool {
        unimplemented!("module layer")
    }

    /// Spans present, and spans in all.
    pub fn span_counts(&self) -> (u32, u32) {
        unimplemented!("module layer")
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> Counters {
        unimplemented!("module layer")
    }

    /// What stacking has to know.
    pub fn stacking(&self) -> Result<StackingFacts> {
        unimplemented!("module layer")
    }

    /// Why the disk is degraded at the moment, if it is.
    pub fn degraded(&self) -> Option<String> {
        unimplemented!("module layer")
    }

    /// Whether a read of this range needs no fetch. Cheap: no lock, no system call.
    pub fn is_present(&self, range: Range<DiskOffset>) -> bool {
        let _ = range;
        unimplemented!("module layer")
    }

    /// Reads a range that is present, without leaving it in the page cache where the kernel can do that.
    pub fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> std::io::Result<()> {
        let _ = (offset, buffer);
        unimplemented!("module layer")
    }

    /// Makes a range present: one fetch a span however many wait, adjacent missing spans in one GET.
    pub async fn make_present(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
    ) -> Result<(), Arc<Error>> {
        let _ = range;
        unimplemented!("module layer")
    }

    /// The extents of a range, merged.
    pub fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        let _ = range;
        unimplemented!("module layer")
    }
}
