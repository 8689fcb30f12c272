//! Files' data, written to their places on a disk while the layer passes.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _};

use crate::{
    ext4::{self, BLOCK_SIZE, DataPlacer, Regions},
    soci::build::LayerSink,
    tar::{Entry, EntryKind},
    units::DiskOffset,
};

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// Why data could not be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("a file has no place on the disk")]
    Place(#[source] ext4::Error),
    #[error("the disk cannot be written")]
    Write(#[source] io::Error),
}

/// Writes each regular entry's data where [`DataPlacer`] says.
pub(super) struct DiskSink {
    placer: DataPlacer,
    /// Where the data of the entry that is passing starts.
    start: u64,
    /// The place of each regular entry with data, in order.
    placed: Vec<Range<DiskOffset>>,
    disk: File,
    position: u64,
    buffer: Vec<u8>,
}

impl DiskSink {
    pub(super) fn new(disk: File) -> Self {
        Self {
            placer: DataPlacer::default(),
            start: 0,
            placed: Vec::new(),
            disk,
            position: 0,
            buffer: Vec::with_capacity(BUFFER_BYTES),
        }
    }

    /// Writes what is left, and gives back the disk. Data that `regions` has no use for (an entry that a later one of the same name
    /// replaced) is taken away again: all on the disk that is neither metadata nor a file's data is zero.
    pub(super) fn finish(mut self, regions: &Regions) -> io::Result<File> {
        self.write_buffer()?;
        for place in &self.placed {
            if !regions.in_disk(place).is_empty() {
                continue;
            }
            let start = place.start.get();
            let end = place.end.get().next_multiple_of(BLOCK_SIZE);
            punch(&self.disk, start, end - start)?;
        }
        Ok(self.disk)
    }

    fn write_at(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let end = self.position + self.buffer.len() as u64;
        if position != end {
            let next_block = end.next_multiple_of(BLOCK_SIZE) == position;
            if next_block && !self.buffer.is_empty() {
                // the rest of the last file's block
                self.buffer.resize((position - self.position) as usize, 0);
            } else {
                self.write_buffer()?;
                self.position = position;
            }
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.write_buffer()?;
        }
        Ok(())
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        // zeros stay a hole
        if self.buffer.iter().any(|byte| *byte != 0) {
            self.disk.write_all_at(&self.buffer, self.position)?;
        }
        self.position += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl LayerSink for DiskSink {
    type Error = Error;

    fn entry(&mut self, _index: usize, entry: &Entry) -> Result<(), Error> {
        if entry.kind == EntryKind::Regular && entry.size > 0 {
            let start = self.placer.place(entry.size).map_err(Error::Place)?;
            self.start = start.get();
            let end = DiskOffset(start.get().saturating_add(entry.size));
            self.placed.push(start..end);
        }
        Ok(())
    }

    fn data(&mut self, _index: usize, file_offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.write_at(self.start.saturating_add(file_offset), bytes)
            .map_err(Error::Write)
    }
}

fn punch(disk: &File, start: u64, length: u64) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(disk, mode, start, length)?)
}
