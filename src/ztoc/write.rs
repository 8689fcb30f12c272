//! A zTOC's bytes, the same as AWS's tool writes.

use super::Compression;
use crate::{oci::Digest, tar::Entry};

/// What a zTOC is made of.
#[derive(Clone, Copy, Debug)]
pub struct ZtocParts<'a> {
    /// `version`; `0.9`.
    pub version: &'a str,
    /// `build_tool_identifier`.
    pub build_tool: &'a str,
    /// The entries, in tar order. None may be sparse.
    pub entries: &'a [Entry],
    /// The blob's size.
    pub compressed_size: u64,
    /// The tar's end: `tar::Archive::end`.
    pub uncompressed_size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// The SHA-256 of each span's compressed bytes: from `in - (bits != 0)` of a checkpoint to `in` of the next, the last to the
    /// blob's end.
    pub digests: &'a [Digest],
    /// `CheckpointsBuilder::finish` or `TarInfo::to_bytes`.
    pub checkpoints: &'a [u8],
}

/// Serialises. Times are written in UTC.
pub fn write(parts: &ZtocParts<'_>) -> Vec<u8> {
    let _ = parts;
    unimplemented!("module ztoc")
}
