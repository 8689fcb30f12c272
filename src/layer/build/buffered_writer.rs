//! Buffers the writes to a disk that is being made: adjacent blocks are one write.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use crate::{ext4::BLOCK_SIZE, units::DiskOffset};

/// Size of a write. The bytes of the buffer are still in the processor's cache when the kernel copies them, and the page cache allocates
/// small pieces for them (for a write of megabytes it allocates pages of 2 MiB, which a virtual machine may have to request from its host).
pub(crate) const WRITE_BYTES: usize = 256 << 10;

/// Writes bytes at ascending offsets.
pub(crate) struct BufferedWriter {
    disk: File,
    /// Offset of `buffer` on the disk.
    position: u64,
    buffer: Vec<u8>,
}

impl BufferedWriter {
    pub(crate) fn new(disk: File) -> Self {
        Self {
            disk,
            position: 0,
            buffer: Vec::with_capacity(WRITE_BYTES),
        }
    }

    /// Writes these bytes at an offset, now or later.
    pub(super) fn write_at(&mut self, at: DiskOffset, mut bytes: &[u8]) -> io::Result<()> {
        let end = self.position + self.buffer.len() as u64;
        if at.get() != end {
            let is_next_block = end.next_multiple_of(BLOCK_SIZE) == at.get();
            if is_next_block && !self.buffer.is_empty() {
                // the rest of the last block is zero: the buffer grows by less than a block
                let length = (at.get() - self.position) as usize;
                self.buffer.resize(length, 0);
                self.write_if_full()?;
            } else {
                self.write_buffer()?;
                self.position = at.get();
            }
        }
        while !bytes.is_empty() {
            let room = WRITE_BYTES - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            self.write_if_full()?;
            bytes = later;
        }
        Ok(())
    }

    /// Writes the rest of the buffer, and returns the disk.
    pub(crate) fn finish(mut self) -> io::Result<File> {
        self.write_buffer()?;
        Ok(self.disk)
    }

    fn write_if_full(&mut self) -> io::Result<()> {
        match self.buffer.len() {
            WRITE_BYTES.. => self.write_buffer(),
            _ => Ok(()),
        }
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        // blocks of zeros stay holes
        if self.buffer.iter().any(|byte| *byte != 0) {
            self.disk.write_all_at(&self.buffer, self.position)?;
        }
        self.position += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
