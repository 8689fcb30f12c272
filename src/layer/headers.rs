//! What a table says of each entry, as the disk keeps it to hold the tar's headers against: 32 bytes an entry in the file `headers`, in
//! tar order, and nothing in memory. A record is where the entry's headers start in the layer, where they end, and their fingerprint.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _};

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    tar::{Entry, EntryKind},
    units::LayerOffset,
    ztoc::{self, HeaderMismatch},
};

const RECORD_BYTES: usize = 32;

/// Records read at once.
const BATCH: u64 = 64;

/// Bytes of a tar's block.
const TAR_BLOCK: u64 = 512;

/// The bytes of the file for a zTOC's entries, which are in tar order.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * RECORD_BYTES);
    let mut start = 0_u64;
    for entry in entries {
        let data = entry.data_offset.get();
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(&data.to_le_bytes());
        bytes.extend_from_slice(&ztoc::fingerprint(entry));
        let length = match entry.kind {
            EntryKind::Regular => entry.size,
            _ => 0,
        };
        // the table's data is within its spans: this cannot overflow
        start = data
            .saturating_add(length)
            .checked_next_multiple_of(TAR_BLOCK)
            .unwrap_or(u64::MAX);
    }
    bytes
}

/// The entries of a disk.
pub(super) struct Headers {
    file: File,
    count: u64,
}

impl Headers {
    /// `None`: the file is not one that [`encode`] made.
    pub(super) fn open(file: File) -> io::Result<Option<Self>> {
        let length = file.metadata()?.len();
        let whole = length.is_multiple_of(RECORD_BYTES as u64);
        let count = length / RECORD_BYTES as u64;
        Ok(whole.then_some(Self { file, count }))
    }

    /// Holds the headers that lie whole in these bytes of the layer, which start at `start`, against the table; `entries` reads it.
    /// Gives the first that differs.
    pub(super) fn check(
        &self,
        start: LayerOffset,
        bytes: &[u8],
        entries: impl FnOnce() -> Result<Vec<Entry>>,
    ) -> Result<Option<HeaderMismatch>> {
        let unread = || "the stored table of headers cannot be read".to_owned();
        let Some(headers) = self.differing(start, bytes).or_kind(Kind::Io, unread)? else {
            return Ok(None);
        };
        // rare, and the table has the last word: its fields are compared one by one, and the one that differs gets its name
        let entries = entries()?;
        let entry = entries
            .iter()
            .find(|entry| entry.data_offset == headers.end);
        let (Some(entry), Some(before)) = (entry, part(bytes, start, &headers)) else {
            return Err(Error::new(
                Kind::Io,
                "the stored table of headers is damaged",
            ));
        };
        Ok(ztoc::check_header(entry, headers.start, before).err())
    }

    /// The first headers that do not have their fingerprint.
    fn differing(
        &self,
        start: LayerOffset,
        bytes: &[u8],
    ) -> io::Result<Option<Range<LayerOffset>>> {
        let mut next = self.first_after(start)?;
        while next < self.count {
            let count = (self.count - next).min(BATCH);
            let mut batch = vec![0; count as usize * RECORD_BYTES]; // at most BATCH
            self.file
                .read_exact_at(&mut batch, next * RECORD_BYTES as u64)?;
            for record in batch.chunks_exact(RECORD_BYTES) {
                let headers = LayerOffset(u64_at(record, 0))..LayerOffset(u64_at(record, 8));
                if headers.end.get() - start.get() > bytes.len() as u64 {
                    return Ok(None);
                }
                let Some(before) = part(bytes, start, &headers) else {
                    continue; // it starts in the span before
                };
                let found = ztoc::header_fingerprint(headers.end, headers.start, before);
                if found.is_none_or(|found| found[..] != record[16..]) {
                    return Ok(Some(headers));
                }
            }
            next += count;
        }
        Ok(None)
    }

    /// The first record whose headers end after `start`.
    fn first_after(&self, start: LayerOffset) -> io::Result<u64> {
        let mut range = 0..self.count;
        while range.start < range.end {
            let middle = range.start + (range.end - range.start) / 2;
            let mut end = [0; 8];
            self.file
                .read_exact_at(&mut end, middle * RECORD_BYTES as u64 + 8)?;
            if u64::from_le_bytes(end) <= start.get() {
                range.start = middle + 1;
            } else {
                range.end = middle;
            }
        }
        Ok(range.start)
    }
}

/// The bytes of a range of the layer, of those that start at `start`; `None` where they are not all there.
fn part<'a>(bytes: &'a [u8], start: LayerOffset, range: &Range<LayerOffset>) -> Option<&'a [u8]> {
    let from = range.start.get().checked_sub(start.get())?;
    let to = range.end.get().checked_sub(start.get())?;
    bytes.get(usize::try_from(from).ok()?..usize::try_from(to).ok()?)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn entries(bytes: &[u8]) -> Vec<Entry> {
        let mut reader = crate::tar::Reader::new();
        let mut rest = bytes;
        while reader.next(&mut rest).unwrap().is_some() {}
        reader.finish().unwrap().entries
    }

    /// A tar of files with these names; long ones have headers of their own before them.
    fn tar(names: &[String]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (number, name) in names.iter().enumerate() {
            let mut header = tar::Header::new_gnu();
            header.set_size(number as u64);
            header.set_mode(0o644);
            header.set_mtime(7);
            let bytes = vec![b'x'; number];
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn open(bytes: &[u8]) -> Headers {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Headers::open(file).unwrap().unwrap()
    }

    /// Where the first headers that differ end.
    fn differing(headers: &Headers, layer: &[u8], range: Range<usize>) -> Option<u64> {
        let start = LayerOffset(range.start as u64);
        let found = headers.differing(start, &layer[range]).unwrap();
        found.map(|headers| headers.end.get())
    }

    #[test]
    fn each_header_is_looked_at_wherever_the_spans_end() {
        let names: Vec<String> = (0..200)
            .map(|number| format!("{}{number}", "d/".repeat(number)))
            .collect();
        let layer = tar(&names);
        let entries = entries(&layer);
        let true_ones = open(&encode(&entries));
        for size in [512, 513, 10_000, layer.len()] {
            let mut start = 0;
            while start < layer.len() {
                let end = layer.len().min(start + size);
                assert_eq!(differing(&true_ones, &layer, start..end), None);
                start = end;
            }
        }
        for number in [0, 1, 77, 198, 199] {
            let mut lying = entries.clone();
            lying[number].mode |= 0o4000;
            let lying = open(&encode(&lying));
            let data = entries[number].data_offset.get();
            assert_eq!(differing(&lying, &layer, 0..layer.len()), Some(data));
            // just its headers, and one byte less at either side
            let start = number.checked_sub(1).map_or(0, |before| {
                let before = &entries[before];
                (before.data_offset.get() + before.size).next_multiple_of(512) as usize
            });
            let headers = start..data as usize;
            assert_eq!(differing(&lying, &layer, headers.clone()), Some(data));
            assert_eq!(differing(&lying, &layer, start + 1..headers.end), None);
            assert_eq!(differing(&lying, &layer, start..headers.end - 1), None);
        }
    }

    #[test]
    fn half_a_record_is_none() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; RECORD_BYTES + 1]).unwrap();
        assert!(Headers::open(file).unwrap().is_none());
    }
}
