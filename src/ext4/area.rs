//! The blocks of metadata that have no fixed place: directories, long symlinks, xattrs, extent trees. They follow the file data.

use super::BLOCK_SIZE;

/// Blocks given one after the other, and their bytes.
#[derive(Debug)]
pub(super) struct Area {
    /// The number of the first.
    start: u32,
    bytes: Vec<u8>,
}

impl Area {
    /// An area that starts at this block.
    pub(super) fn new(start: u32) -> Self {
        Self {
            start,
            bytes: vec![],
        }
    }

    /// Takes as many blocks as `bytes` need, the rest of the last one zero, and returns the number of the first.
    ///
    /// Numbers do not overflow: a disk's blocks are counted against its limit (2^30) after the area is full, and no tree that fits in
    /// memory brings it from there to 2^32.
    pub(super) fn push(&mut self, bytes: &[u8]) -> u32 {
        let block = self.end();
        self.bytes.extend_from_slice(bytes);
        let whole = self.bytes.len().next_multiple_of(BLOCK_SIZE as usize);
        self.bytes.resize(whole, 0);
        block
    }

    /// The number of the block after the last.
    pub(super) fn end(&self) -> u32 {
        self.start + (self.bytes.len() / BLOCK_SIZE as usize) as u32
    }

    /// The bytes of a block that was given before.
    pub(super) fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let at = (block - self.start) as usize * BLOCK_SIZE as usize;
        &mut self.bytes[at..at + BLOCK_SIZE as usize]
    }

    /// All bytes.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}
