//! The present spans. The bits in memory are current; the file `spans` has the spans that are known to be on the disk, with their checksums
//! ([`super::span_record`]).
//!
//! The file is preallocated and written with pwrite, and not mapped: a store into a hole of a mapping is SIGBUS on a full file system. For
//! a crash the order is data, fdatasync, record, so the file is behind the memory.

use std::{
    io::{self, Read as _},
    os::unix::fs::FileExt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use super::{
    directory,
    seal::Damage,
    span_record::{self, RECORD_BYTES, SpanCheck, SpanRecord},
    stored_file::StoredFile,
};
use crate::units::SpanId;

const WORD_BITS: u32 = u64::BITS;

/// Bits in memory and their file.
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    count: u32,
    present: AtomicU32,
    file: StoredFile,
    /// Held while records are written.
    writing: Mutex<()>,
}

impl Bitmap {
    /// Reads the file. A damaged record is replaced by `lost`; the second value is the number of damaged records.
    pub(crate) fn open(file: StoredFile, count: u32, lost: SpanRecord) -> io::Result<(Self, u32)> {
        let length = span_record::file_size(count);
        let mut bytes = Vec::new();
        let open = file.get()?;
        io::Read::take(&*open, length).read_to_end(&mut bytes)?;
        let words = (0..count.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0));
        let bitmap = Self {
            words: words.collect(),
            count,
            present: AtomicU32::new(0),
            file,
            writing: Mutex::default(),
        };
        let mut damaged = Vec::new();
        for (span, record) in (0..)
            .map(SpanId)
            .zip(span_record::decode_all(&bytes, count))
        {
            if record.is_none() {
                damaged.push((span, lost));
            }
            if record.unwrap_or(lost).is_present() {
                bitmap.set(span);
            }
        }
        if open.metadata()?.len() != length {
            open.set_len(length)?;
        }
        bitmap.write(&bitmap.lock(), &damaged)?;
        Ok((bitmap, damaged.len() as u32)) // at most `count`
    }

    /// Number of all spans.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Number of present spans.
    pub(crate) fn present(&self) -> u32 {
        self.present.load(Ordering::Acquire)
    }

    /// Whether every span is present.
    pub(crate) fn is_full(&self) -> bool {
        self.present() == self.count
    }

    /// Whether this span is present. Then its data, which was written before [`Self::set`], is visible.
    pub(crate) fn get(&self, span: SpanId) -> bool {
        let (word, mask) = place(span);
        self.words[word].load(Ordering::Acquire) & mask != 0
    }

    /// Sets the bit in memory.
    pub(crate) fn set(&self, span: SpanId) {
        let (word, mask) = place(span);
        if self.words[word].fetch_or(mask, Ordering::AcqRel) & mask == 0 {
            self.present.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Clears the bit in memory: the span's data did not reach the local disk.
    pub(crate) fn clear(&self, span: SpanId) {
        let (word, mask) = place(span);
        if self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0 {
            self.present.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Makes spans absent, in memory and in the file: their data is lost, or was shown to be wrong. The records are synced: they must not
    /// be present again after a power cut.
    pub(crate) fn revoke(&self, spans: &[SpanId]) -> io::Result<()> {
        if spans.is_empty() {
            return Ok(());
        }
        // in this order: `save` reads the bit in memory under the lock
        spans.iter().for_each(|span| self.clear(*span));
        let absent: Vec<_> = spans
            .iter()
            .map(|span| (*span, SpanRecord::Absent))
            .collect();
        self.write(&self.lock(), &absent)?;
        self.sync()
    }

    /// Writes the records of these spans to the file, if they are still present. Their data is synced before. The records are not synced
    /// here: a lost record costs one fetch.
    pub(crate) fn save(&self, spans: &[(SpanId, SpanCheck)]) -> io::Result<()> {
        let writing = self.lock();
        let present: Vec<_> = spans
            .iter()
            .filter(|(span, _)| self.get(*span))
            .map(|(span, check)| (*span, SpanRecord::Present(*check)))
            .collect();
        self.write(&writing, &present)
    }

    /// The record of a span in the file.
    pub(crate) fn record(&self, span: SpanId) -> io::Result<SpanRecord> {
        let mut bytes = [0; RECORD_BYTES];
        self.file
            .get()?
            .read_exact_at(&mut bytes, span_record::place(span))?;
        SpanRecord::decode(&bytes, span).ok_or_else(|| Damage::check(directory::SPANS).into())
    }

    /// Writes records; those of adjacent spans in one write.
    fn write(
        &self,
        _writing: &MutexGuard<'_, ()>,
        records: &[(SpanId, SpanRecord)],
    ) -> io::Result<()> {
        let runs =
            records.chunk_by(|(one, _), (other, _)| one.get().wrapping_add(1) == other.get());
        for run in runs {
            let bytes: Vec<u8> = run
                .iter()
                .flat_map(|(span, record)| record.encode(*span))
                .collect();
            self.file
                .get()?
                .write_all_at(&bytes, span_record::place(run[0].0))?; // no run is empty
        }
        Ok(())
    }

    /// Syncs the records.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.get()?.sync_data()
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(span: SpanId) -> (usize, u64) {
    (
        (span.get() / WORD_BITS) as usize,
        1 << (span.get() % WORD_BITS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: SpanCheck = SpanCheck {
        data: 1,
        rest: 2,
        has_last: false,
    };

    fn stored(file: &tempfile::NamedTempFile) -> StoredFile {
        StoredFile::new(file.path().to_owned(), file.reopen().unwrap()).unwrap()
    }

    fn open(file: &tempfile::NamedTempFile, count: u32) -> Bitmap {
        let opened = Bitmap::open(stored(file), count, SpanRecord::Absent);
        opened.unwrap().0
    }

    fn bitmap(count: u32) -> (tempfile::NamedTempFile, Bitmap) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bitmap = open(&file, count);
        assert_eq!(
            file.as_file().metadata().unwrap().len(),
            span_record::file_size(count)
        );
        (file, bitmap)
    }

    #[test]
    fn a_span_is_in_the_file_only_after_save() {
        let (file, bitmap) = bitmap(130);
        for span in [0, 63, 64, 129] {
            assert!(!bitmap.get(SpanId(span)));
            bitmap.set(SpanId(span));
            bitmap.set(SpanId(span));
            assert!(bitmap.get(SpanId(span)));
        }
        assert_eq!(bitmap.present(), 4);
        assert!(!bitmap.is_full());
        (0..129).for_each(|span| bitmap.set(SpanId(span)));
        bitmap.clear(SpanId(100));
        assert!(!bitmap.is_full(), "one is missing");
        bitmap.set(SpanId(100));
        assert!(bitmap.is_full());
        bitmap
            .save(&[(SpanId(63), CHECK), (SpanId(129), CHECK)])
            .unwrap();

        let again = open(&file, 130);
        assert_eq!(again.present(), 2);
        assert!(again.get(SpanId(63)) && again.get(SpanId(129)));
        assert!(!again.get(SpanId(0)) && !again.get(SpanId(64)));
        let record = again.record(SpanId(63)).unwrap();
        assert_eq!(record, SpanRecord::Present(CHECK));
    }

    #[test]
    fn clear_takes_a_bit_back() {
        let (_file, bitmap) = bitmap(1);
        bitmap.set(SpanId(0));
        assert!(bitmap.is_full());
        bitmap.clear(SpanId(0));
        bitmap.clear(SpanId(0));
        assert_eq!((bitmap.get(SpanId(0)), bitmap.present()), (false, 0));
    }

    #[test]
    fn a_span_that_is_disowned_does_not_come_back() {
        let (file, bitmap) = bitmap(3);
        for span in 0..3 {
            bitmap.set(SpanId(span));
        }
        bitmap
            .save(&[(SpanId(0), CHECK), (SpanId(1), CHECK)])
            .unwrap();
        bitmap.revoke(&[SpanId(1)]).unwrap();
        bitmap.revoke(&[SpanId(2)]).unwrap();
        // a sync that began before the revocation
        bitmap
            .save(&[(SpanId(1), CHECK), (SpanId(2), CHECK)])
            .unwrap();
        for bits in [bitmap, open(&file, 3)] {
            assert_eq!(
                [0, 1, 2].map(|span| bits.get(SpanId(span))),
                [true, false, false]
            );
        }
    }

    #[test]
    fn what_is_damaged_is_lost_and_nothing_else() {
        let (file, bitmap) = bitmap(4);
        let all = [0, 1, 2, 3].map(|span| (SpanId(span), CHECK));
        all.iter().for_each(|(span, _)| bitmap.set(*span));
        bitmap.save(&all).unwrap();
        let (bytes, length) = (std::fs::read(file.path()).unwrap(), 4 * RECORD_BYTES);
        let opened = |bytes: &[u8], lost| {
            std::fs::write(file.path(), bytes).unwrap();
            let (bits, damaged) = Bitmap::open(stored(&file), 4, lost).unwrap();
            assert_eq!(file.as_file().metadata().unwrap().len(), length as u64);
            (bits.present(), damaged)
        };
        let mut flipped = bytes.clone();
        flipped[20] ^= 1;
        let longer = [&bytes[..], b"more"].concat();
        assert_eq!(opened(&bytes, SpanRecord::Absent), (4, 0));
        assert_eq!(opened(&flipped, SpanRecord::Absent), (3, 1));
        assert_eq!(opened(&bytes[..40], SpanRecord::Absent), (2, 2));
        assert_eq!(opened(&longer, SpanRecord::Absent), (4, 0));
        assert_eq!(opened(&[], SpanRecord::Absent), (0, 4));
        assert_eq!(opened(&flipped, SpanRecord::Unchecked), (4, 1));
        // the damaged record was replaced
        let again = Bitmap::open(stored(&file), 4, SpanRecord::Absent).unwrap();
        assert_eq!((again.0.present(), again.1), (4, 0));
        let record = again.0.record(SpanId(1)).unwrap();
        assert_eq!(record, SpanRecord::Unchecked);
    }
}
