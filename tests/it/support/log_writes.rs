//! The log of the device mapper's `log-writes` target: all writes of a device in the order in which they became durable
//! (Documentation/admin-guide/device-mapper/log-writes.rst), and the contents that the device may have after a power cut.
//!
//! After a power cut a device has all writes up to its last flush, and any part of the later ones, in units of 4 KiB here. A write with FUA
//! is durable when it has ended, and a file system may have waited for it, so it is never left out.

use std::ops::Range;

/// `linux/drivers/md/dm-log-writes.c`
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

const SECTOR: u64 = 512;
/// Size of the numbers of an entry; the text of a mark follows them.
const ENTRY_BYTES: usize = 32;
/// The unit in which a device may have lost a write.
const PIECE: usize = 4096;

/// A log, and the device's content before its first write.
pub struct WriteLog {
    log: Vec<u8>,
    entries: Vec<Entry>,
}

struct Entry {
    /// Offset on the device.
    at: u64,
    /// Where the written bytes are in the log.
    data: Range<usize>,
    flags: u64,
    mark: Option<String>,
}

impl Entry {
    fn is_durable(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }
}

fn number(log: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(log[at..at + 8].try_into().unwrap())
}

impl WriteLog {
    /// Reads the log device's content.
    pub fn parse(log: Vec<u8>) -> Self {
        assert_eq!(number(&log, 0), MAGIC, "it is a log of log-writes");
        let count = number(&log, 16);
        let mut position = SECTOR as usize;
        let mut entries = Vec::new();
        for _ in 0..count {
            let [sector, sectors, flags, length] =
                [0, 8, 16, 24].map(|field| number(&log, position + field));
            let start = position + SECTOR as usize;
            let length_of_data = match flags & (DISCARD | MARK) {
                0 => (sectors * SECTOR) as usize,
                _ => 0,
            };
            let mark = (flags & MARK != 0).then(|| {
                let text = &log[position + ENTRY_BYTES..][..length as usize];
                String::from_utf8_lossy(text)
                    .trim_end_matches('\0')
                    .to_owned()
            });
            entries.push(Entry {
                at: sector * SECTOR,
                data: start..start + length_of_data,
                flags,
                mark,
            });
            position = start + length_of_data;
        }
        Self { log, entries }
    }

    /// The points after which all earlier writes are durable: the numbers of the entries with a flush or FUA.
    pub fn durable_points(&self) -> Vec<usize> {
        (0..self.entries.len())
            .filter(|number| self.entries[*number].is_durable())
            .collect()
    }

    /// The number of the last entry before the next flush after the durable point `last`.
    pub fn end_of_epoch(&self, last: usize) -> usize {
        let later = self.entries[last + 1..].iter();
        last + later.take_while(|entry| entry.flags & FLUSH == 0).count()
    }

    /// The numbers of the entries that are marks.
    pub fn mark_places(&self) -> Vec<usize> {
        (0..self.entries.len())
            .filter(|number| self.entries[*number].mark.is_some())
            .collect()
    }

    /// The texts of the marks up to this entry.
    pub fn marks(&self, last: usize) -> impl Iterator<Item = &str> {
        self.entries[..=last]
            .iter()
            .filter_map(|entry| entry.mark.as_deref())
    }

    /// Makes these writes on the device's content.
    pub fn apply(&self, entries: Range<usize>, device: &mut [u8]) {
        for entry in &self.entries[entries] {
            device[entry.at as usize..][..entry.data.len()]
                .copy_from_slice(&self.log[entry.data.clone()]);
        }
    }

    /// Makes a part of the writes after the durable point `last` and before the next flush: all with FUA, and of the others the pieces that
    /// `is_kept` chooses. Returns what the device had there before, for [`undo`].
    pub fn apply_some(
        &self,
        last: usize,
        mut is_kept: impl FnMut() -> bool,
        device: &mut [u8],
    ) -> Vec<(usize, Vec<u8>)> {
        let mut before = Vec::new();
        for entry in &self.entries[last + 1..=self.end_of_epoch(last)] {
            let bytes = &self.log[entry.data.clone()];
            for (number, piece) in bytes.chunks(PIECE).enumerate() {
                if entry.flags & FUA != 0 || is_kept() {
                    let at = entry.at as usize + number * PIECE;
                    let place = &mut device[at..at + piece.len()];
                    before.push((at, place.to_vec()));
                    place.copy_from_slice(piece);
                }
            }
        }
        before
    }
}

/// Takes back what [`WriteLog::apply_some`] has done.
pub fn undo(before: Vec<(usize, Vec<u8>)>, device: &mut [u8]) {
    for (at, bytes) in before.into_iter().rev() {
        device[at..at + bytes.len()].copy_from_slice(&bytes);
    }
}
