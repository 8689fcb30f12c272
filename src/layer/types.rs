//! Types that describe a layer and its disk.

use crate::oci::{Digest, Packing};

/// A layer as its image's manifest and configuration name it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LayerBlob {
    /// The blob's digest.
    pub digest: Digest,
    /// The blob's size.
    pub size: u64,
    /// How the blob is packed.
    pub packing: Packing,
    /// Digest of the uncompressed tar, from the image's configuration.
    pub diff_id: Digest,
}

/// The kind of a range of a disk, for NBD's BLOCK_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Metadata, or present data.
    Present,
    /// Data that has to be fetched first.
    Absent,
    /// Always zero.
    Zero,
}

/// The progress of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskProgress {
    /// Some spans are absent and are fetched when they are read.
    Lazy,
    /// Most of the layer was read: all absent spans are being fetched.
    Filling,
    /// All spans are present. The layer is being checked as a whole.
    Full,
    /// The layer has passed the check: the disk is an ordinary ext4 image.
    Complete,
}

/// Paths of a layer that matter for stacking, stored with the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StackingFacts {
    /// The layer's root is opaque.
    pub opaque_root: bool,
    /// Directories that the tar only implies.
    pub implied: Vec<Vec<u8>>,
    /// Paths that are whiteouts.
    pub whiteouts: Vec<Vec<u8>>,
}

/// A disk in the store, open or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDisk {
    /// The layer.
    pub layer: LayerBlob,
    /// The digest of the table that it was laid out from.
    pub table: Digest,
    /// Size of the ext4 image.
    pub size: u64,
    /// All spans are present and the layer is verified.
    pub complete: bool,
    /// The layer was checked in full against its digest or diff ID.
    pub verified: bool,
    /// Number of present spans. For a disk that is not open: as stored.
    pub spans_present: u32,
    /// Number of all spans.
    pub spans: u32,
}

/// What waits and what is in use in a store at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreLoad {
    /// Reads that wait for a fetch.
    pub reads_waiting: u64,
    /// Fetches in the background.
    pub background_fetches: u64,
    /// Spans that have arrived and wait for a decoding thread.
    pub decodes_waiting: u64,
    /// Compressed bytes in flight.
    pub fetch_memory_bytes: u64,
    /// Bytes of the spans that are held in memory because the local disk has rejected them.
    pub held_bytes: u64,
}

/// Counters of a disk since it was opened.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
pub struct DiskCounters {
    /// Reads that were answered. Reads of a complete disk are not counted once its device is a loop device.
    pub reads: u64,
    /// Bytes of these reads.
    pub read_bytes: u64,
    /// Reads that have waited for a fetch.
    pub waits: u64,
    /// Time that these reads have waited, in milliseconds; reads that wait at the same time each count.
    pub wait_ms: u64,
    /// Ranged GETs that were made.
    pub fetches: u64,
    /// Compressed bytes fetched.
    pub fetched_bytes: u64,
}

impl std::ops::Add for DiskCounters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            waits: self.waits + other.waits,
            wait_ms: self.wait_ms + other.wait_ms,
            fetches: self.fetches + other.fetches,
            fetched_bytes: self.fetched_bytes + other.fetched_bytes,
        }
    }
}

/// Identifies a disk among all open disks.
pub type DiskKey = usize;
