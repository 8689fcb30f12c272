//! The kinds of a disk's ranges, for NBD's BLOCK_STATUS.

use std::{fs::File, ops::Range};

use rustix::fs::SeekFrom;

use super::Disk;
use crate::{
    ext4::BLOCK_SIZE,
    layer::types::Allocation,
    units::{DiskOffset, SpanId},
};

impl Disk {
    /// The extents of a range, merged. They end at block boundaries, except at the ends of the range.
    pub fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        let end = range.end.min(DiskOffset(self.size()));
        let mut extents = Extents::new(range.start);
        let mut position = range.start;
        // the rest of a file's last block is zeros; the file system is not asked, because tmpfs walks over pages for an answer
        let mut slack = range.start;
        for region in self.layout().regions().in_disk(&(range.start..end)) {
            let Some(part) = region.clip_disk(&(range.start..end)) else {
                continue;
            };
            let gap_end = part.disk.start;
            extents.push(slack.min(gap_end), Allocation::Zero);
            push_stored(self.file(), position.max(slack)..gap_end, &mut extents);
            for span in self.layout().spans().covering(part.layer.clone()) {
                let span = SpanId(span);
                let bytes = self.layout().spans().uncompressed(span);
                let Some(piece) = part.clip_layer(&bytes) else {
                    continue;
                };
                let present = self.reader.has(span);
                extents.push(
                    piece.disk.end,
                    if present {
                        Allocation::Present
                    } else {
                        Allocation::Absent
                    },
                );
            }
            // a streamed disk has no spans
            extents.push(part.disk.end, Allocation::Present);
            position = part.disk.end;
            slack = DiskOffset(position.get().next_multiple_of(BLOCK_SIZE));
        }
        extents.push(slack.min(end), Allocation::Zero);
        push_stored(self.file(), position.max(slack)..end, &mut extents);
        extents.finish(end)
    }
}

/// Collects extents. If two kinds meet inside a block, the block has the kind of higher rank: absent before present before zero.
pub(crate) struct Extents {
    start: u64,
    end: u64,
    done: Vec<(u64, Allocation)>,
}

impl Extents {
    pub(crate) fn new(start: DiskOffset) -> Self {
        Self {
            start: start.get(),
            end: start.get(),
            done: Vec::new(),
        }
    }

    /// The range from the last end to `end` is of this kind.
    pub(crate) fn push(&mut self, end: DiskOffset, kind: Allocation) {
        if end.get() <= self.end {
            return;
        }
        match self.done.last().copied() {
            Some((_, last)) if last == kind => {}
            Some((length, last)) if rank(last) < rank(kind) => {
                // the block where they meet gets the new kind
                let meet = (self.end - self.end % BLOCK_SIZE).max(self.end - length);
                let back = self.end - meet;
                self.shorten(back);
                self.end = meet;
                self.done.push((0, kind));
            }
            Some(_) => {
                let meet = self.end.next_multiple_of(BLOCK_SIZE).min(end.get());
                self.lengthen(meet);
                if meet == end.get() {
                    return;
                }
                self.done.push((0, kind));
            }
            None => self.done.push((0, kind)),
        }
        self.lengthen(end.get());
    }

    fn lengthen(&mut self, end: u64) {
        if let Some((length, _)) = self.done.last_mut() {
            *length += end - self.end;
        }
        self.end = end;
    }

    fn shorten(&mut self, back: u64) {
        if let Some((length, _)) = self.done.last_mut() {
            *length -= back;
            if *length == 0 {
                self.done.pop();
            }
        }
    }

    /// The extents up to `end`.
    pub(crate) fn finish(self, end: DiskOffset) -> Vec<(u64, Allocation)> {
        debug_assert_eq!(
            self.done.iter().map(|(length, _)| length).sum::<u64>(),
            end.get().saturating_sub(self.start)
        );
        let mut merged: Vec<(u64, Allocation)> = Vec::with_capacity(self.done.len());
        for (length, kind) in self.done {
            match merged.last_mut() {
                Some((sum, last)) if *last == kind => *sum += length,
                _ => merged.push((length, kind)),
            }
        }
        merged
    }
}

fn rank(kind: Allocation) -> u8 {
    match kind {
        Allocation::Zero => 0,
        Allocation::Present => 1,
        Allocation::Absent => 2,
    }
}

/// Adds the extents of a range without file data: allocated metadata, and zero for holes of the file.
pub(crate) fn push_stored(disk: &File, range: Range<DiskOffset>, extents: &mut Extents) {
    let end = range.end.get();
    let mut position = range.start.get();
    while position < end {
        // an error of SEEK_DATA: there is no more data (ENXIO), or the file system does not support it; then all is data
        let data = match rustix::fs::seek(disk, SeekFrom::Data(position)) {
            Ok(data) => data.min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => position,
        };
        extents.push(DiskOffset(data), Allocation::Zero);
        if data >= end {
            return;
        }
        let hole = rustix::fs::seek(disk, SeekFrom::Hole(data)).unwrap_or(end);
        position = hole.clamp(data + 1, end);
        extents.push(DiskOffset(position), Allocation::Present);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn extents(start: u64, pieces: &[(u64, Allocation)]) -> Vec<(u64, Allocation)> {
        let mut extents = Extents::new(DiskOffset(start));
        let mut end = start;
        for (length, kind) in pieces {
            end += length;
            extents.push(DiskOffset(end), *kind);
        }
        extents.finish(DiskOffset(end))
    }

    use Allocation::{Absent, Present, Zero};

    #[test]
    fn a_block_of_two_kinds_has_the_kind_of_higher_rank() {
        assert_eq!(
            extents(0, &[(5000, Present), (5000, Absent), (2288, Zero)]),
            [(4096, Present), (8192, Absent)]
        );
        assert_eq!(
            extents(0, &[(5000, Absent), (5000, Present), (10480, Zero)]),
            [(8192, Absent), (4096, Present), (8192, Zero)]
        );
        // shorter than a block, all in one block
        assert_eq!(
            extents(
                0,
                &[(100, Present), (100, Absent), (100, Present), (3796, Zero)]
            ),
            [(4096, Absent)]
        );
    }

    #[test]
    fn extents_stay_inside_a_range_that_starts_inside_a_block() {
        assert_eq!(
            extents(1000, &[(10, Zero), (20, Present), (30, Absent)]),
            [(60, Absent)]
        );
        assert_eq!(extents(1000, &[(10, Zero)]), [(10, Zero)]);
        assert_eq!(extents(1000, &[]), []);
    }

    #[test]
    fn holes_of_the_file_are_zero() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 65536).unwrap();
        let mut extents = Extents::new(DiskOffset(0));
        push_stored(&file, DiskOffset(0)..DiskOffset(1 << 20), &mut extents);
        assert_eq!(
            extents.finish(DiskOffset(1 << 20)),
            [
                (65536, Zero),
                (4096, Present),
                ((1 << 20) - 65536 - 4096, Zero)
            ]
        );
    }
}
