//! The `checkpoints` blob of a zTOC: for gzip soci's "zinfo", for plain tars a FlatBuffer of their sizes.

use crate::units::{CompressedOffset, LayerOffset};

/// Bytes of a checkpoint's window: deflate's whole history.
pub const WINDOW_SIZE: usize = 32 * 1024;

/// Collects the checkpoints of a gzip layer in their stored form (version 2), so that a builder keeps each window once.
#[derive(Clone, Debug)]
pub struct CheckpointsBuilder {}

impl CheckpointsBuilder {
    /// No checkpoint yet. `span_size` is the one that was asked for.
    pub fn new(span_size: u64) -> Self {
        let _ = span_size;
        unimplemented!("module ztoc")
    }

    /// Adds a checkpoint. `input` is the blob's first whole byte after it, `bits` (0 to 7) how many bits of the byte before belong to
    /// the block that starts here; `window` the last output before it, at most [`WINDOW_SIZE`], oldest first (a shorter one is
    /// zero-filled at its front). A checkpoint with the same `output` as the last one replaces it: AWS's daemon refuses empty spans.
    pub fn push(&mut self, input: CompressedOffset, output: LayerOffset, bits: u8, window: &[u8]) {
        let _ = (input, output, bits, window);
        unimplemented!("module ztoc")
    }

    /// How many checkpoints there are: the spans of the layer.
    pub fn len(&self) -> usize {
        unimplemented!("module ztoc")
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The blob.
    pub fn finish(self) -> Vec<u8> {
        unimplemented!("module ztoc")
    }
}

/// The `TarZinfo` of a plain tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TarInfo {
    /// Bytes a span; not 0.
    pub span_size: u64,
    /// The tar's size.
    pub size: u64,
}

impl TarInfo {
    /// The blob.
    pub fn to_bytes(self) -> Vec<u8> {
        unimplemented!("module ztoc")
    }
}
