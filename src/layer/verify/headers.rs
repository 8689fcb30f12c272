//! The fingerprints of the tar headers of a layer, in the file `headers`: one record of 36 bytes per entry of the table, in tar order, and
//! nothing in memory. A record has the offsets in the layer where the entry's headers start and end, their fingerprint, and a CRC-32 of
//! these. The last record is for the bytes after all entries.

use std::{
    io,
    ops::{ControlFlow, Range},
    os::unix::fs::FileExt as _,
};

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::stored::{
        directory,
        seal::{CRC_BYTES, Damage, crc32},
        stored_file::StoredFile,
    },
    tar::{Entry, EntryKind},
    units::LayerOffset,
    ztoc::{self, EndCheck, HeaderMismatch},
};

const RECORD_BYTES: usize = 36;

/// Records that are read at once.
const BATCH: u64 = 64;

/// Maximum size of one entry's headers: those of a long name, a long link and PAX records, each of at most 1 MiB, and the entry's own
/// header.
const MAX_HEADERS: u64 = 4 << 20;

/// Bytes after the last entry that are checked at once.
const PIECE: u64 = 1 << 20;

/// In the last record, the end of the bytes after the last entry.
const AFTER_ALL: LayerOffset = LayerOffset(u64::MAX);

/// Size of a tar block.
const TAR_BLOCK: u64 = 512;

/// The content of the file for the entries of a zTOC, which are in tar order.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((entries.len() + 1) * RECORD_BYTES);
    let mut start = 0_u64;
    for (entry, fingerprint) in entries.iter().zip(ztoc::fingerprints(entries)) {
        let data = entry.data_offset.get();
        put(&mut bytes, start, data, &fingerprint);
        let length = match entry.kind {
            EntryKind::Regular => entry.size,
            _ => 0,
        };
        // the table's data is within its spans, so this cannot overflow
        start = data
            .saturating_add(length)
            .checked_next_multiple_of(TAR_BLOCK)
            .unwrap_or(u64::MAX);
    }
    put(&mut bytes, start, AFTER_ALL.get(), &[0; 16]);
    bytes
}

/// Adds a record.
fn put(bytes: &mut Vec<u8>, start: u64, end: u64, fingerprint: &[u8; 16]) {
    let record = bytes.len();
    bytes.extend_from_slice(&start.to_le_bytes());
    bytes.extend_from_slice(&end.to_le_bytes());
    bytes.extend_from_slice(fingerprint);
    bytes.extend_from_slice(&crc32(&bytes[record..]).to_le_bytes());
}

/// The header records of a disk.
pub(crate) struct Headers {
    file: StoredFile,
    count: u64,
}

impl Headers {
    /// Opens a file that [`encode`] made. An error that is [`Damage`]: the file is damaged.
    pub(crate) fn open(file: StoredFile) -> io::Result<Self> {
        let length = file.get()?.metadata()?.len();
        let count = length / RECORD_BYTES as u64;
        if count == 0 || !length.is_multiple_of(RECORD_BYTES as u64) {
            return Err(Damage::new(directory::HEADERS, "it is too short").into());
        }
        let headers = Self { file, count };
        let last = headers.batch(count - 1)?;
        match record(&last).0.end {
            AFTER_ALL => Ok(headers),
            _ => Err(Damage::new(directory::HEADERS, "it is too short").into()),
        }
    }

    /// Compares the headers that are complete in these bytes of the layer, which start at `start`, with the table. `entries` reads the
    /// table. Returns the first difference.
    pub(crate) fn check(
        &self,
        start: LayerOffset,
        bytes: &[u8],
        entries: impl FnOnce() -> Result<Vec<Entry>>,
    ) -> Result<Option<HeaderMismatch>> {
        let unread = || "the stored headers cannot be read".to_owned();
        let Some(headers) = self.differing(start, bytes).or_kind(Kind::Io, unread)? else {
            return Ok(None);
        };
        let before = part(bytes, start, &headers).ok_or_else(damaged)?;
        mismatch(&headers, before, entries)
    }

    /// Compares all headers of the layer, whose spans end at `end`, with the table: the headers of an entry are the bytes from the end of
    /// the previous entry to its data, and after the last entry there are none. `read` returns bytes of the layer that belong to no file,
    /// at ascending offsets. `beyond` passes the bytes after the spans. Returns the first difference and its range.
    pub(super) fn check_whole(
        &self,
        end: LayerOffset,
        mut read: impl FnMut(&Range<LayerOffset>) -> io::Result<Vec<u8>>,
        beyond: impl FnOnce(&mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()>,
        entries: impl FnOnce() -> Result<Vec<Entry>>,
    ) -> Result<Option<(Range<LayerOffset>, HeaderMismatch)>> {
        let unread = || "the stored headers cannot be read".to_owned();
        for first in (0..self.count).step_by(BATCH as usize) {
            let batch = self.batch(first).or_kind(Kind::Io, unread)?;
            for (headers, fingerprint) in batch.chunks_exact(RECORD_BYTES).map(record) {
                if headers.end == AFTER_ALL {
                    return check_end(headers.start, end, read, beyond).or_kind(Kind::Io, unread);
                }
                let bytes = match headers.end.get().saturating_sub(headers.start.get()) {
                    ..=MAX_HEADERS => read(&headers).or_kind(Kind::Io, unread)?,
                    _ => Vec::new(), // too long: its fingerprint cannot match
                };
                let found = ztoc::header_fingerprint(headers.end, headers.start, &bytes);
                if found.is_none_or(|found| found[..] != *fingerprint) {
                    let mismatch = mismatch(&headers, &bytes, entries)?.ok_or_else(damaged)?;
                    return Ok(Some((headers, mismatch)));
                }
            }
        }
        Err(damaged())
    }

    /// The first headers that do not have their fingerprint.
    fn differing(
        &self,
        start: LayerOffset,
        bytes: &[u8],
    ) -> io::Result<Option<Range<LayerOffset>>> {
        let mut next = self.first_after(start)?;
        while next < self.count {
            let batch = self.batch(next)?;
            for (headers, fingerprint) in batch.chunks_exact(RECORD_BYTES).map(record) {
                if headers.end.get() - start.get() > bytes.len() as u64 {
                    return Ok(None);
                }
                let Some(before) = part(bytes, start, &headers) else {
                    continue; // its headers start in the previous span
                };
                let found = ztoc::header_fingerprint(headers.end, headers.start, before);
                if found.is_none_or(|found| found[..] != *fingerprint) {
                    return Ok(Some(headers));
                }
            }
            next += BATCH;
        }
        Ok(None)
    }

    /// The records from the `first`-th on, at most [`BATCH`].
    fn batch(&self, first: u64) -> io::Result<Vec<u8>> {
        self.read(first, (self.count - first).min(BATCH))
    }

    /// This many records; each has its checksum.
    fn read(&self, first: u64, count: u64) -> io::Result<Vec<u8>> {
        let mut records = vec![0; count as usize * RECORD_BYTES]; // at most BATCH
        self.file
            .get()?
            .read_exact_at(&mut records, first * RECORD_BYTES as u64)
            .map_err(|error| match Damage::found(directory::HEADERS, &error) {
                Some(damage) => damage.into(),
                None => error,
            })?;
        let is_whole = |record: &[u8]| {
            let whole = record.split_last_chunk::<CRC_BYTES>();
            whole.is_some_and(|(body, crc)| crc32(body) == u32::from_le_bytes(*crc))
        };
        match records.chunks_exact(RECORD_BYTES).all(is_whole) {
            true => Ok(records),
            false => Err(Damage::check(directory::HEADERS).into()),
        }
    }

    /// The first record whose headers end after `start`.
    fn first_after(&self, start: LayerOffset) -> io::Result<u64> {
        let mut range = 0..self.count;
        while range.start < range.end {
            let middle = range.start + (range.end - range.start) / 2;
            if record(&self.read(middle, 1)?).0.end <= start {
                range.start = middle + 1;
            } else {
                range.end = middle;
            }
        }
        Ok(range.start)
    }
}

/// The content of a record: the range of the headers, and their fingerprint.
fn record(bytes: &[u8]) -> (Range<LayerOffset>, &[u8]) {
    let headers = LayerOffset(u64_at(bytes, 0))..LayerOffset(u64_at(bytes, 8));
    (headers, &bytes[16..32])
}

/// The difference between the table and these headers. This is rare, so the table is read here: its fields are compared one by one, and the
/// error names the one that differs.
fn mismatch(
    headers: &Range<LayerOffset>,
    before: &[u8],
    entries: impl FnOnce() -> Result<Vec<Entry>>,
) -> Result<Option<HeaderMismatch>> {
    let entries = entries()?;
    let entry = entries
        .iter()
        .find(|entry| entry.data_offset == headers.end);
    let entry = entry.ok_or_else(damaged)?;
    Ok(ztoc::check_header(entry, headers.start, before).err())
}

/// Whether another entry follows the data of the last one before the end of the layer, in whole blocks.
fn check_end(
    start: LayerOffset,
    end: LayerOffset,
    mut read: impl FnMut(&Range<LayerOffset>) -> io::Result<Vec<u8>>,
    beyond: impl FnOnce(&mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()>,
) -> io::Result<Option<(Range<LayerOffset>, HeaderMismatch)>> {
    let mut check = EndCheck::new(start);
    let mut position = start;
    while position < end {
        let next = end.min(LayerOffset(position.get().saturating_add(PIECE)));
        if let Err(mismatch) = check.read(&read(&(position..next))?) {
            return Ok(Some((start..next, mismatch)));
        }
        position = next;
    }
    let mut found = None;
    beyond(&mut |piece| match check.read(piece) {
        Ok(()) => ControlFlow::Continue(()),
        Err(mismatch) => {
            found = Some((start..AFTER_ALL, mismatch));
            ControlFlow::Break(())
        }
    })?;
    Ok(found)
}

fn damaged() -> Error {
    Error::new(
        Kind::Io,
        "the stored headers are damaged; `socinbd check` repairs them",
    )
}

/// A range of the layer within the bytes that start at `start`; `None` if they do not have all of it.
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

    use super::*;

    fn entries(bytes: &[u8]) -> Vec<Entry> {
        let mut reader = crate::tar::Reader::new();
        let mut rest = bytes;
        while reader.next(&mut rest).unwrap().is_some() {}
        reader.finish().unwrap().entries
    }

    /// A tar of files with these names; long names have headers of their own.
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
        Headers::open(StoredFile::of_test(bytes).0).unwrap()
    }

    /// The end of the first headers that differ.
    fn differing(headers: &Headers, layer: &[u8], range: Range<usize>) -> Option<u64> {
        let start = LayerOffset(range.start as u64);
        let found = headers.differing(start, &layer[range]).unwrap();
        found.map(|headers| headers.end.get())
    }

    #[test]
    fn each_header_is_checked_wherever_the_spans_end() {
        let names: Vec<String> = (0..200)
            .map(|number| format!("{}{number}", "d/".repeat(number)))
            .collect();
        let layer = tar(&names);
        let entries = entries(&layer);
        let correct = open(&encode(&entries));
        for size in [512, 513, 10_000, layer.len()] {
            let mut start = 0;
            while start < layer.len() {
                let end = layer.len().min(start + size);
                assert_eq!(differing(&correct, &layer, start..end), None);
                start = end;
            }
        }
        for number in [0, 1, 77, 198, 199] {
            let mut wrong = entries.clone();
            wrong[number].mode |= 0o4000;
            let wrong = open(&encode(&wrong));
            let data = entries[number].data_offset.get();
            assert_eq!(differing(&wrong, &layer, 0..layer.len()), Some(data));
            // exactly its headers, and one byte less on either side
            let start = number.checked_sub(1).map_or(0, |before| {
                let before = &entries[before];
                (before.data_offset.get() + before.size).next_multiple_of(512) as usize
            });
            let headers = start..data as usize;
            assert_eq!(differing(&wrong, &layer, headers.clone()), Some(data));
            assert_eq!(differing(&wrong, &layer, start + 1..headers.end), None);
            assert_eq!(differing(&wrong, &layer, start..headers.end - 1), None);
        }
    }

    #[test]
    fn damage_is_detected_and_is_not_a_contradiction() {
        let layer = tar(&["a".to_owned(), "b".to_owned()]);
        let bytes = encode(&entries(&layer));
        let open = |bytes: &[u8]| Headers::open(StoredFile::of_test(bytes).0);
        let is_damage = |error: io::Error| error.get_ref().unwrap().is::<Damage>();
        for length in [0, 1, RECORD_BYTES, RECORD_BYTES + 1, 2 * RECORD_BYTES] {
            assert!(is_damage(open(&bytes[..length]).err().unwrap()));
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            let found = open(&bytes).and_then(|headers| {
                let start = LayerOffset(0);
                headers.differing(start, &layer)
            });
            assert!(is_damage(found.unwrap_err()), "{at}");
        }
    }

    #[test]
    fn a_truncated_file_is_not_opened() {
        let layer = tar(&["a".to_owned(), "b".to_owned()]);
        let bytes = encode(&entries(&layer));
        assert_eq!(bytes.len(), 3 * RECORD_BYTES);
        for length in 0..bytes.len() {
            let file = StoredFile::of_test(&bytes[..length]).0;
            assert!(Headers::open(file).is_err(), "{length} bytes");
        }
    }
}
