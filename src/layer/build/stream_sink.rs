//! Files' data, written to their places on a disk while the layer passes.

use std::{fs::File, io, ops::Range};

use super::buffered_writer::BufferedWriter;
use crate::{
    ext4::{self, BLOCK_SIZE, DataPlacer, Regions},
    soci::build::LayerSink,
    tar::{Entry, EntryKind},
    units::DiskOffset,
};

/// Why data could not be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("a file has no place on the disk")]
    Place(#[source] ext4::Error),
    #[error("the disk cannot be written")]
    Write(#[source] io::Error),
}

/// Writes each regular entry's data where [`DataPlacer`] says.
pub(crate) struct DiskSink {
    placer: DataPlacer,
    /// Where the data of the entry that is passing starts.
    start: u64,
    /// The place of each regular entry with data, in order.
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

    /// Writes what is left, and gives back the disk. Data that `regions` has no use for (an entry that a later one of the same name
    /// replaced) is taken away again: all on the disk that is neither metadata nor a file's data is zero.
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
