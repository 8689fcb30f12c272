//! The bitmap of present spans: in memory what is present now, in the file `spans` what is known to be on the disk.
//!
//! The file is preallocated and written with pwrite, never through a mapping: a store into a hole of a mapping is SIGBUS on a full
//! disk. The order that a crash relies on is data, fdatasync, bit; the file lags behind the memory.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::units::SpanId;

const WORD_BITS: u32 = u64::BITS;
const WORD_BYTES: usize = size_of::<u64>();

/// Bits in memory and their file.
pub(super) struct Bitmap {
    words: Box<[AtomicU64]>,
    count: u32,
    present: AtomicU32,
    file: File,
    /// What the file says.
    saved: Mutex<Box<[u64]>>,
}

/// Bytes of the file for this many spans.
pub(super) fn file_size(count: u32) -> u64 {
    u64::from(count.div_ceil(WORD_BITS)) * WORD_BYTES as u64
}

impl Bitmap {
    /// Reads the file. `None`: it is not a bitmap of this many spans.
    pub(super) fn open(file: File, count: u32) -> io::Result<Option<Self>> {
        if file.metadata()?.len() != file_size(count) {
            return Ok(None);
        }
        let mut bytes = vec![0; count.div_ceil(WORD_BITS) as usize * WORD_BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let saved: Box<[u64]> = bytes
            .chunks_exact(WORD_BYTES)
            .map(|word| {
                let mut bytes = [0; WORD_BYTES];
                bytes.copy_from_slice(word);
                u64::from_le_bytes(bytes)
            })
            .collect();
        let tail = count % WORD_BITS;
        if tail != 0 && saved.last().is_some_and(|word| word >> tail != 0) {
            return Ok(None);
        }
        Ok(Some(Self {
            words: saved.iter().map(|word| AtomicU64::new(*word)).collect(),
            count,
            present: AtomicU32::new(saved.iter().map(|word| word.count_ones()).sum()),
            file,
            saved: Mutex::new(saved),
        }))
    }

    /// Spans in all.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Spans present.
    pub(super) fn present(&self) -> u32 {
        self.present.load(Ordering::Acquire)
    }

    /// Whether every span is present.
    pub(super) fn is_full(&self) -> bool {
        self.present() == self.count
    }

    /// Whether this span is present; its data, written before [`Self::set`], is then seen.
    pub(super) fn get(&self, span: SpanId) -> bool {
        let (word, mask) = place(span);
        self.words[word].load(Ordering::Acquire) & mask != 0
    }

    /// Sets the bit in memory.
    pub(super) fn set(&self, span: SpanId) {
        let (word, mask) = place(span);
        if self.words[word].fetch_or(mask, Ordering::AcqRel) & mask == 0 {
            self.present.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Clears the bit in memory: the span's data did not reach the disk.
    pub(super) fn clear(&self, span: SpanId) {
        let (word, mask) = place(span);
        if self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0 {
            self.present.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Takes spans back, in memory and in the file: their data is not what it was taken for.
    pub(super) fn disown(&self, spans: &[SpanId]) -> io::Result<()> {
        // in this order: `save` looks at the bit in memory under the lock
        spans.iter().for_each(|span| self.clear(*span));
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let mut words = Vec::new();
        for span in spans {
            let (word, mask) = place(*span);
            if saved[word] & mask != 0 {
                saved[word] &= !mask;
                words.push(word);
            }
        }
        self.write(&saved, words)
    }

    /// Writes these spans' bits to the file, where they are still set. Their data is on the disk by now. The bits themselves reach it when they do: a bit lost
    /// costs a fetch.
    pub(super) fn save(&self, spans: &[SpanId]) -> io::Result<()> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        for span in spans.iter().filter(|span| self.get(**span)) {
            let (word, mask) = place(*span);
            saved[word] |= mask;
        }
        let words = spans.iter().map(|span| place(*span).0).collect();
        self.write(&saved, words)
    }

    /// Writes these words to the file, each once.
    fn write(&self, saved: &[u64], mut words: Vec<usize>) -> io::Result<()> {
        words.sort_unstable();
        words.dedup();
        for word in words {
            self.file
                .write_all_at(&saved[word].to_le_bytes(), (word * WORD_BYTES) as u64)?;
        }
        Ok(())
    }

    /// Brings the file's bits to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
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

    fn bitmap(count: u32) -> (tempfile::NamedTempFile, Bitmap) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(file_size(count)).unwrap();
        let bitmap = Bitmap::open(file.reopen().unwrap(), count)
            .unwrap()
            .unwrap();
        (file, bitmap)
    }

    #[test]
    fn a_bit_is_in_the_file_only_after_save() {
        let (file, bitmap) = bitmap(130);
        for span in [0, 63, 64, 129] {
            assert!(!bitmap.get(SpanId(span)));
            bitmap.set(SpanId(span));
            bitmap.set(SpanId(span));
            assert!(bitmap.get(SpanId(span)));
        }
        assert_eq!(bitmap.present(), 4);
        bitmap.save(&[SpanId(63), SpanId(129)]).unwrap();

        let again = Bitmap::open(file.reopen().unwrap(), 130).unwrap().unwrap();
        assert_eq!(again.present(), 2);
        assert!(again.get(SpanId(63)) && again.get(SpanId(129)));
        assert!(!again.get(SpanId(0)) && !again.get(SpanId(64)));
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
        bitmap.save(&[SpanId(0), SpanId(1)]).unwrap();
        bitmap.disown(&[SpanId(1)]).unwrap();
        bitmap.disown(&[SpanId(2)]).unwrap();
        // a sync that began before
        bitmap.save(&[SpanId(1), SpanId(2)]).unwrap();
        let again = Bitmap::open(file.reopen().unwrap(), 3).unwrap().unwrap();
        for bits in [&bitmap, &again] {
            assert_eq!(
                [0, 1, 2].map(|span| bits.get(SpanId(span))),
                [true, false, false]
            );
        }
    }

    #[test]
    fn a_file_of_another_length_or_with_bits_past_the_end_is_none() {
        let (file, _) = bitmap(65);
        let open = |count| {
            Bitmap::open(file.reopen().unwrap(), count)
                .unwrap()
                .is_some()
        };
        assert!(open(65) && open(128));
        assert!(!open(64) && !open(129));
        file.as_file().write_all_at(&[2], 8).unwrap();
        assert!(!open(65) && open(66));
    }
}
