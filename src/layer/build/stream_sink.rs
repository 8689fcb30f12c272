//! Writes the data of files to their positions on a disk while the layer is streamed.

use std::{fs::File, io, ops::Range};

use super::buffered_writer::BufferedWriter;
use crate::{
    ext4::{self, BLOCK_SIZE, DataPlacer, Regions},
    soci::build::LayerSink,
    tar::{Entry, EntryKind},
    units::DiskOffset,
};

/// The reason why data could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("a file does not fit on the disk")]
    Place(#[source] ext4::Error),
    #[error("the disk cannot be written")]
    Write(#[source] io::Error),
}

/// Writes the data of each regular entry to the position that [`DataPlacer`] returns.
pub(crate) struct DiskSink {
    placer: DataPlacer,
    /// The position of the current entry's data.
    start: u64,
    /// The position of each regular entry with data, in order.
    placed: Vec<Range<DiskOffset>>,
    disk: BufferedWriter,
}

impl DiskSink {
    pub(crate) fn new(disk: File) -> Self {
        Self {
            placer: DataPlacer::default(),
            start: 0,
            placed: Vec::new(),
            disk: BufferedWriter::new(disk),
        }
    }

    /// Writes the rest, and returns the disk. Data outside of `regions` (of entries that later ones with the same name replace) is removed
    /// again: a disk is zero wherever it has neither metadata nor file data.
    pub(crate) fn finish(self, regions: &Regions) -> io::Result<File> {
        let disk = self.disk.finish()?;
        for place in &self.placed {
            if !regions.in_disk(place).is_empty() {
                continue;
            }
            let start = place.start.get();
            let end = place.end.get().next_multiple_of(BLOCK_SIZE);
            punch(&disk, start, end - start)?;
        }
        Ok(disk)
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
        let at = DiskOffset(self.start.saturating_add(file_offset));
        self.disk.write_at(at, bytes).map_err(Error::Write)
    }
}

fn punch(disk: &File, start: u64, length: u64) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(disk, mode, start, length)?)
}
