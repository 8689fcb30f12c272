//! What a table says of each entry, as the disk keeps it to hold the tar's headers against: 36 bytes an entry in the file `headers`, in
//! tar order, and nothing in memory. A record is where the entry's headers start in the layer, where they end, their fingerprint, and a
//! CRC-32 of these. The last record is of what stands behind all entries.

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

/// Records read at once.
const BATCH: u64 = 64;

/// Bytes that one entry's headers have at most: those of a long name, a long link and PAX records, each of at most 1 MiB, and their own.
const MAX_HEADERS: u64 = 4 << 20;

/// Bytes that are looked at at once behind the last entry.
const PIECE: u64 = 1 << 20;

/// The end of what stands behind the last entry, in the last record.
const AFTER_ALL: LayerOffset = LayerOffset(u64::MAX);

/// Bytes of a tar's block.
const TAR_BLOCK: u64 = 512;

/// The bytes of the file for a zTOC's entries, which are in tar order.
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
        // the table's data is within its spans: this cannot overflow
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

/// The entries of a disk.
pub(crate) struct Headers {
    file: StoredFile,
    count: u64,
}

impl Headers {
    /// Opens a file that [`encode`] made. An error that is [`Damage`]: it is none.
    pub(crate) fn open(file: StoredFile) -> io::Result<Self> {
        let length = file.get()?.metadata()?.len();
        let count = length / RECORD_BYTES as u64;
        if count == 0 || !length.is_multiple_of(RECORD_BYTES as u64) {
            return Err(Damage::new(directory::HEADERS, "it is cut").into());
        }
        let headers = Self { file, count };
        let last = headers.batch(count - 1)?;
        match record(&last).0.end {
            AFTER_ALL => Ok(headers),
            _ => Err(Damage::new(directory::HEADERS, "it is cut").into()),
        }
    }

    /// Holds the headers that lie whole in these bytes of the layer, which start at `start`, against the table; `entries` reads it.
    /// Gives the first that differs.
    pub(crate) fn check(
        &self,
        start: LayerOffset,
        bytes: &[u8],
        entries: impl FnOnce() -> Result<Vec<Entry>>,
    ) -> Result<Option<HeaderMismatch>> {
        let unread = || "the stored table of headers cannot be read".to_owned();
        let Some(headers) = self.differing(start, bytes).or_kind(Kind::Io, unread)? else {
            return Ok(None);
        };
        let before = part(bytes, start, &headers).ok_or_else(damaged)?;
        mismatch(&headers, before, entries)
    }

    /// Holds all headers of the layer, whose spans end at `end`, against the table: each entry's lead from the end of the one before to
    /// its data, and behind the last there is none. `read` gives bytes of the layer that are no file's data, at offsets that ascend;
    /// `beyond` all that stands behind the spans. Gives the first difference, and where it is.
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
                    _ => Vec::new(), // no entry has so many: none is found in them
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
                    continue; // it starts in the span before
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

    /// So many records, of which each is whole.
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

/// What a record says: where the headers are, and their fingerprint.
fn record(bytes: &[u8]) -> (Range<LayerOffset>, &[u8]) {
    let headers = LayerOffset(u64_at(bytes, 0))..LayerOffset(u64_at(bytes, 8));
    (headers, &bytes[16..32])
}

/// What the table says and these headers do not. That is rare, and the table has the last word: its fields are compared one by one, and
/// the one that differs gets its name.
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

/// Whether another entry stands behind the last one's data, in whole blocks, up to the layer's end.
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
    Error::new(Kind::Io, "the stored table of headers is damaged")
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
        Headers::open(StoredFile::of_test(bytes).0).unwrap()
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
    fn damage_is_found_and_convicts_nobody() {
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
    fn a_cut_file_is_none() {
        let layer = tar(&["a".to_owned(), "b".to_owned()]);
        let bytes = encode(&entries(&layer));
        assert_eq!(bytes.len(), 3 * RECORD_BYTES);
        for length in 0..bytes.len() {
            let file = StoredFile::of_test(&bytes[..length]).0;
            assert!(Headers::open(file).is_err(), "{length} bytes");
        }
    }
}
