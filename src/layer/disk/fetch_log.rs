//! The log of a disk: its fetches, and the reads that have waited for them.
//!
//! It keeps the first entries, which are those of a start, and the last ones. It takes [`MAX_BYTES`] of memory at most.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{layer::locked::locked, units::DiskOffset};

/// Entries of each kind that are kept from the start on, and those that are kept from the end on.
const FIRST: usize = 768;
const LAST: usize = 256;

/// Maximum size of a log with its two kinds of entries, in bytes. Each list has room for up to twice its entries.
const MAX_BYTES: usize = 2 * (FIRST + LAST) * (size_of::<FetchEntry>() + size_of::<WaitEntry>());
const _: () = assert!(MAX_BYTES <= 128 << 10);

/// Why spans were fetched.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum FetchReason {
    /// A read waited for them.
    Read,
    /// They follow what was read.
    Ahead,
    /// The rest of the layer, or the image's prefetch list.
    Background,
}

/// One fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchEntry {
    /// Milliseconds from the opening of the disk to the beginning of the fetch.
    pub at_ms: u32,
    /// Its duration in microseconds, with the decoding.
    pub took_us: u32,
    /// The spans.
    pub spans: (u32, u32),
    /// Compressed bytes of the spans.
    pub bytes: u32,
    /// Why.
    pub reason: FetchReason,
    /// All spans were placed.
    pub is_ok: bool,
}

/// One read that has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitEntry {
    /// Milliseconds from the opening of the disk to the read.
    pub at_ms: u32,
    /// How long it has waited, in microseconds.
    pub took_us: u32,
    /// Offset on the disk.
    pub offset: DiskOffset,
    /// Bytes.
    pub length: u32,
    /// The data is present.
    pub is_ok: bool,
}

/// The first and the last entries of a sequence.
#[derive(Clone, Debug)]
pub struct Entries<T> {
    first: Vec<T>,
    last: VecDeque<T>,
    /// Entries between the first and the last ones that were dropped.
    dropped: u64,
}

impl<T> Default for Entries<T> {
    fn default() -> Self {
        Self {
            first: Vec::new(),
            last: VecDeque::new(),
            dropped: 0,
        }
    }
}

impl<T> Entries<T> {
    fn push(&mut self, entry: T) {
        if self.first.len() < FIRST {
            return self.first.push(entry);
        }
        if self.last.len() == LAST {
            self.last.pop_front();
            self.dropped += 1;
        }
        self.last.push_back(entry);
    }

    /// The entries in the order of their ends.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.first.iter().chain(&self.last)
    }

    /// The number of entries that were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// The log of one disk.
pub(crate) struct FetchLog {
    opened: Instant,
    entries: Mutex<(Entries<FetchEntry>, Entries<WaitEntry>)>,
}

impl Default for FetchLog {
    fn default() -> Self {
        Self {
            opened: Instant::now(),
            entries: Mutex::default(),
        }
    }
}

impl FetchLog {
    /// When the disk was opened.
    pub(super) fn opened(&self) -> Instant {
        self.opened
    }

    /// A fetch has ended now.
    pub(crate) fn fetched(
        &self,
        began: Instant,
        spans: Range<u32>,
        bytes: u64,
        reason: FetchReason,
        is_ok: bool,
    ) {
        let entry = FetchEntry {
            at_ms: self.at(began),
            took_us: micros(began.elapsed()),
            spans: (spans.start, spans.end),
            bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
            reason,
            is_ok,
        };
        locked(&self.entries).0.push(entry);
    }

    /// A read has waited until now.
    pub(crate) fn waited(&self, began: Instant, range: &Range<DiskOffset>, is_ok: bool) {
        let length = range.end.get().saturating_sub(range.start.get());
        let entry = WaitEntry {
            at_ms: self.at(began),
            took_us: micros(began.elapsed()),
            offset: range.start,
            length: u32::try_from(length).unwrap_or(u32::MAX),
            is_ok,
        };
        locked(&self.entries).1.push(entry);
    }

    pub(super) fn entries(&self) -> (Entries<FetchEntry>, Entries<WaitEntry>) {
        locked(&self.entries).clone()
    }

    fn at(&self, began: Instant) -> u32 {
        let since = began.saturating_duration_since(self.opened);
        u32::try_from(since.as_millis()).unwrap_or(u32::MAX)
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_entries_are_kept() {
        let mut entries = Entries::default();
        let all = FIRST + LAST + 100;
        for number in 0..all {
            entries.push(number);
        }
        let kept: Vec<usize> = entries.iter().copied().collect();
        assert_eq!(kept.len(), FIRST + LAST);
        assert_eq!((kept[0], kept[FIRST - 1]), (0, FIRST - 1));
        assert_eq!((kept[FIRST], kept[FIRST + LAST - 1]), (all - LAST, all - 1));
        assert_eq!(entries.dropped(), 100);
    }
}
