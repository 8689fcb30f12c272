//! Types that describe a layer and its disk.

use crate::oci::{Digest, Packing};

/// A layer as its image's manifest and configuration name it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

/// How far a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskProgress {
    /// Some spans are absent; what is asked for is fetched.
    Lazy,
    /// Most of the layer is wanted: all absent spans are being fetched.
    Filling,
    /// Every span is present. The layer is being checked as a whole.
    Full,
    /// And it has been checked: the disk is an ordinary ext4 image.
    Complete,
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

/// A disk as it lies in the store, open or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDisk {
    /// The layer.
    pub layer: LayerBlob,
    /// The digest of the table that it was laid out from.
    pub table: Digest,
    /// Bytes of the ext4 image.
    pub size: u64,
    /// Every span is present, and it is verified.
    pub complete: bool,
    /// The layer was checked in full against its digest or diff ID.
    pub verified: bool,
    /// Spans present; of a disk that is not open, as far as was noted.
    pub spans_present: u32,
    /// Spans in all.
    pub spans: u32,
}

/// Counters of a disk since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskCounters {
    /// Ranged GETs made.
    pub fetches: u64,
    /// Compressed bytes fetched.
    pub fetched_bytes: u64,
}

/// A number that no other open disk has.
pub type DiskKey = usize;
