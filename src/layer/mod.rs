//! The disk folder of a layer, `<root>/layers/sha256/<layer>/<table>/`: spans, bitmap, fetch, verify, inflate, scatter; and the stream
//! that fills the disk of a layer without a zTOC.
//!
//! The way of a read that misses: [`Disk::make_present`] (`demand`) finds the spans under the range (`regions`, `spans`), joins or starts their
//! fetches (`flight`), which take the compressed bytes from one of the layer's sources (`fetch`, `sources`), verify and inflate them
//! on threads of their own (`decode`), hold them against what else the table says (`truth`, `headers`), and write them where they belong
//! in `disk.ext4` (`scatter`). The span's bit is set in memory at once, and its record in the file after the data is on the disk (`bitmap`, `span_check`,
//! `sync`). When all are there the layer is checked as a whole (`check`), for which what is in no file was kept (`rest`).
//!
//! Each file carries checks (`seal`); what does not have them is made again (`mend`, `metadata`), and so are spans that the local disk has not
//! kept (`local`). `scrub` looks at all of it.

mod allocation;
mod arrivals;
mod bitmap;
mod check;
mod cost;
mod decode;
mod demand;
mod disk;
mod disowned;
mod entry_table;
mod fetch;
mod flight;
mod folder;
mod gather;
mod headers;
mod health;
mod import;
mod local;
mod mend;
mod metadata;
mod pieces;
mod place;
mod prefetch;
mod proof;
mod race;
mod readahead;
mod rest;
mod scatter;
mod scrub;
mod seal;
mod served;
mod source_health;
mod sources;
mod span_check;
mod spans;
mod state;
mod store;
mod stored_file;
mod stream;
mod stream_sink;
mod sync;
mod tail;
mod touches;
mod traffic;
mod truth;
mod uncached;
mod unkept;
mod upcoming;
mod wanted;
mod whole;
mod windows;

pub use disk::{Disk, DiskKey};
pub use folder::make_private;
pub use health::Reason;
pub use prefetch::Listed;
pub use scrub::ScrubReport;
pub use served::ServedDisk;
pub use source_health::SourceDown;
pub use store::{Options, Store};
pub use stored_file::close_spare_files;
pub use touches::Touch;
pub use wanted::TableBytes;
pub use windows::Before;

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
pub enum Progress {
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
pub struct Counters {
    /// Ranged GETs made.
    pub fetches: u64,
    /// Compressed bytes fetched.
    pub fetched_bytes: u64,
}
