//! Detects sequential readers of a disk, and the spans that they need next.
//!
//! The kernel's own read-ahead is small on an incomplete device, because it requests data that no program needs. Here read-ahead works by
//! spans, and only for a reader that has missed at least twice in sequence. It ends at the end of the file, except for a reader that has
//! read several files in the order of the disk (`tar`, a copy, a hash over all files).

use std::{
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::units::DiskOffset;

/// Readers that are distinguished.
const STREAMS: usize = 4;

/// Misses in sequence before a reader has read-ahead.
const MISSES: u32 = 2;

/// Files that a reader has read in sequence before its read-ahead goes past the end of a file.
const FILES: u32 = 4;

/// If spans are fine, compressed bytes that a reader must have passed before it has read-ahead: two fine spans are often read by chance.
pub(crate) const LEAST_PASSED: u64 = 4 << 20;

/// If spans are fine, a miss also fetches this many compressed bytes after it, ...
const AROUND: u64 = 80 << 10;
/// ... and half of the bytes of the present spans right before it, counting at most this many, ...
const MOST_AROUND: u64 = 128 << 10;
/// ... and the gap between these and the next or previous present span, if the gap is no longer than this.
const GAP: u64 = 96 << 10;

/// If spans are fine, the miss of a file's start also fetches this many compressed bytes at the file's end, ...
const FILE_END: u64 = 192 << 10;
/// ... if the file has at least this many spans.
const LONG_FILE: u32 = 3;

/// Compressed bytes that are fetched ahead of a reader: first value and maximum.
const FIRST_WINDOW: u64 = 1 << 20;
const LAST_WINDOW: u64 = 32 << 20;

/// One access to a disk, in spans.
pub(crate) struct DiskAccess {
    /// The spans that it needs.
    pub spans: Range<u32>,
    /// Identifies the last file that it touches.
    pub file: u64,
    /// The end of that file's spans.
    pub file_end: u32,
}

/// A reader.
#[derive(Clone, Copy, Default)]
struct SequentialReader {
    /// The span after the last one that it needed.
    next: u32,
    /// The end of the spans that were fetched for it.
    ahead: u32,
    /// Accesses in sequence that needed another span.
    steps: u32,
    /// Compressed bytes of the spans that it has passed.
    passed: u64,
    file: u64,
    /// Files in sequence.
    files: u32,
    window: u64,
    /// The clock at its last access.
    seen: u64,
}

#[derive(Default)]
struct ReaderStates {
    streams: [SequentialReader; STREAMS],
    clock: u64,
}

/// The range of the disk that was fetched ahead for a reader and not yet reached by it: an access there continues the read-ahead.
#[derive(Default)]
struct ReachMarker {
    start: AtomicU64,
    end: AtomicU64,
}

/// The readers of one disk.
#[derive(Default)]
pub(crate) struct SequentialReaders {
    state: Mutex<ReaderStates>,
    markers: [ReachMarker; STREAMS],
}

/// Spans to fetch ahead, and the index of their reader.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AheadOfReader {
    pub spans: Range<u32>,
    pub reader: usize,
}

impl SequentialReaders {
    /// Records an access. Returns the spans to fetch ahead, for a reader that has passed `least` compressed bytes. `compressed` is the
    /// length of a span in the blob, `count` the number of spans.
    pub(crate) fn access(
        &self,
        access: &DiskAccess,
        count: u32,
        least: u64,
        compressed: impl Fn(u32) -> u64,
    ) -> Option<AheadOfReader> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        state.clock += 1;
        let continues = |stream: &SequentialReader| {
            stream.seen > 0
                && (stream.next.saturating_sub(1)..=stream.ahead).contains(&access.spans.start)
        };
        let Some(reader) = state.streams.iter().position(continues) else {
            let (oldest, _) = state
                .streams
                .iter()
                .enumerate()
                .min_by_key(|(_, stream)| stream.seen)?;
            state.streams[oldest] = SequentialReader {
                next: access.spans.end,
                ahead: access.spans.end,
                steps: 1,
                passed: access.spans.clone().map(&compressed).sum(),
                file: access.file,
                files: 1,
                window: FIRST_WINDOW,
                seen: state.clock,
            };
            self.markers[oldest].clear();
            return None;
        };
        let stream = &mut state.streams[reader];
        stream.seen = state.clock;
        if access.spans.end > stream.next {
            stream.passed += (stream.next..access.spans.end)
                .map(&compressed)
                .sum::<u64>();
            stream.next = access.spans.end;
            stream.steps += 1;
        }
        if access.file != stream.file {
            stream.file = access.file;
            stream.files += 1;
        }
        stream.ahead = stream.ahead.max(stream.next);
        if stream.steps < MISSES || stream.passed < least {
            return None;
        }
        let limit = if stream.files > FILES {
            count
        } else {
            access.file_end
        };
        let spans = stream.ahead..window(stream, limit, compressed);
        if spans.is_empty() {
            return None;
        }
        stream.ahead = spans.end;
        stream.window = (stream.window * 2).min(LAST_WINDOW);
        Some(AheadOfReader { spans, reader })
    }

    /// Sets the range of the disk that was fetched ahead for a reader.
    pub(crate) fn mark(&self, reader: usize, disk: &Range<DiskOffset>) {
        let marker = &self.markers[reader];
        marker.start.store(disk.start.get(), Ordering::Relaxed);
        marker.end.store(disk.end.get(), Ordering::Relaxed);
    }

    /// Whether a read of this range reaches spans that were fetched ahead, so that [`Self::access`] must be called. True once for each
    /// [`Self::mark`]. Cheap, and not exact: a superfluous call is harmless.
    pub(crate) fn reaches(&self, range: &Range<DiskOffset>) -> bool {
        self.markers.iter().any(|marker| {
            let end = marker.end.load(Ordering::Relaxed);
            let hit =
                range.start.get() < end && marker.start.load(Ordering::Relaxed) < range.end.get();
            hit && marker.end.swap(0, Ordering::Relaxed) == end
        })
    }
}

impl ReachMarker {
    fn clear(&self) {
        self.end.store(0, Ordering::Relaxed);
    }
}

/// The spans that the fetch of a miss has, if spans are fine. `missed` of `count` spans are needed. The reader probably needs the next
/// spans too, the more so the more of the spans before were read, and the gap between two places that were read. It does not matter whether
/// they are of the same file: the files of a package are adjacent, and are read together.
pub(crate) fn around(
    missed: &Range<u32>,
    count: u32,
    present: impl Fn(u32) -> bool,
    compressed: impl Fn(u32) -> u64,
) -> Range<u32> {
    let absent = |spans: &mut dyn Iterator<Item = u32>, most: u64| {
        let mut bytes = 0;
        let fits = |span: &u32| {
            bytes += compressed(*span);
            !present(*span) && bytes <= most
        };
        spans.take_while(fits).last()
    };
    let mut before = 0;
    for span in (0..missed.start).rev() {
        if before >= MOST_AROUND || !present(span) {
            break;
        }
        before += compressed(span);
    }
    let more = AROUND + before.min(MOST_AROUND) / 2;
    let end = absent(&mut (missed.end..count), more).map_or(missed.end, |last| last + 1);
    let gap = absent(&mut (end..count), GAP).map_or(end, |last| last + 1);
    let end = if gap < count && present(gap) {
        gap
    } else {
        end
    };
    let gap = absent(&mut (0..missed.start).rev(), GAP).unwrap_or(missed.start);
    let is_gap = gap.checked_sub(1).is_some_and(present);
    if is_gap { gap..end } else { missed.start..end }
}

/// If spans are fine, the spans at a file's end that the miss of its start also fetches. The loader reads both ends of a program (the
/// dynamic section and the relocations are at the end of an ELF file), and archives have their directory at the end.
pub(crate) fn file_end(
    missed: &Range<u32>,
    file: &Range<u32>,
    compressed: impl Fn(u32) -> u64,
) -> Range<u32> {
    if !missed.contains(&file.start) || file.len() < LONG_FILE as usize {
        return file.end..file.end;
    }
    let mut bytes = 0;
    let last = (missed.end..file.end).rev().take_while(|span| {
        bytes += compressed(*span);
        bytes <= FILE_END
    });
    last.last().unwrap_or(file.end)..file.end
}

/// The end of the spans that `stream` should have fetched ahead.
fn window(stream: &SequentialReader, limit: u32, compressed: impl Fn(u32) -> u64) -> u32 {
    let mut bytes = 0;
    let mut end = stream.next;
    while end < limit && bytes < stream.window {
        bytes += compressed(end).max(1);
        end += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: u32 = 100;

    fn access(spans: Range<u32>, file: u64, file_end: u32) -> DiskAccess {
        DiskAccess {
            spans,
            file,
            file_end,
        }
    }

    fn ahead(readahead: &SequentialReaders, access: &DiskAccess) -> Range<u32> {
        readahead
            .access(access, COUNT, 0, |_| FIRST_WINDOW / 2)
            .map_or(0..0, |ahead| ahead.spans)
    }

    #[test]
    fn one_access_and_scattered_accesses_have_no_read_ahead() {
        let readahead = SequentialReaders::default();
        for span in [50, 10, 70, 30, 90, 52, 12, 72] {
            assert_eq!(ahead(&readahead, &access(span..span + 1, 0, COUNT)), 0..0);
            // again in the same span
            assert_eq!(ahead(&readahead, &access(span..span + 1, 0, COUNT)), 0..0);
        }
    }

    #[test]
    fn two_fine_spans_are_not_a_sequence() {
        let readahead = SequentialReaders::default();
        let spans = LEAST_PASSED / 10_000;
        for span in 0..2000 {
            let access = access(span..span + 1, 0, 4000);
            let ahead = readahead.access(&access, 4000, LEAST_PASSED, |_| 10_000);
            // the first access after enough bytes
            assert_eq!(ahead.is_some(), u64::from(span) >= spans, "{span}");
            if ahead.is_some() {
                return;
            }
        }
        panic!("nothing was fetched ahead");
    }

    #[test]
    fn a_miss_fetches_more_spans_the_more_were_read_before() {
        let fine = |_| 40 << 10;
        let all = |missed: Range<u32>, count: u32, present: &dyn Fn(u32) -> bool| {
            around(&missed, count, present, fine)
        };
        let end = |missed: Range<u32>, count: u32, present: Range<u32>| {
            let around = all(missed.clone(), count, &|span| present.contains(&span));
            assert_eq!(around.start, missed.start);
            around.end
        };
        assert_eq!(end(10..11, 100, 0..0), 13, "two of 40 KiB in 80");
        assert_eq!(end(10..11, 12, 0..0), 12, "not past the layer");
        assert_eq!(end(10..11, 100, 8..10), 14, "half of two more");
        assert_eq!(end(10..11, 100, 5..7), 13, "not right before it");
        assert_eq!(end(80..82, 100, 0..80), 85, "three at most");
        assert_eq!(end(10..11, 100, 12..13), 12, "up to a present span");
        assert_eq!(end(10..11, 100, 15..16), 15, "and a gap of two");
        assert_eq!(end(10..11, 100, 16..17), 13, "not a gap of three");
        // coarse spans are too long
        let coarse = around(&(10..11), 100, |span| span < 10, |_| 1 << 20);
        assert_eq!(coarse, 10..11);
        // a gap before the miss
        assert_eq!(all(10..11, 11, &|span| span == 9), 10..11);
        assert_eq!(all(10..11, 11, &|span| span == 8), 9..11);
        assert_eq!(all(10..11, 11, &|span| span == 7), 8..11);
        assert_eq!(
            all(10..11, 11, &|span| span == 6),
            10..11,
            "not a gap of three"
        );
        assert_eq!(
            all(2..3, 3, &|_| false),
            2..3,
            "no gap: nothing is before it"
        );
    }

    #[test]
    fn the_miss_of_a_files_start_fetches_its_end() {
        let fine = |_| 80 << 10;
        let end = |missed, file| file_end(&missed, &file, fine);
        assert_eq!(end(10..11, 10..20), 18..20, "two of 80 KiB in 192");
        assert_eq!(end(9..13, 10..20), 18..20);
        assert_eq!(end(10..19, 10..20), 19..20, "the rest of it");
        assert_eq!(end(10..20, 10..20), 20..20);
        assert!(end(11..12, 10..20).is_empty(), "not its start");
        assert!(end(10..11, 10..12).is_empty(), "too short");
        assert!(file_end(&(10..11), &(10..20), |_| 1 << 20).is_empty());
        let just = file_end(&(10..11), &(10..20), |_| FILE_END / 2);
        assert_eq!(just, 18..20, "all of 192");
    }

    #[test]
    fn a_sequential_reader_gets_a_window_that_grows_to_its_limit() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(1..2, 0, COUNT)), 2..4);
        assert_eq!(ahead(&readahead, &access(2..3, 0, COUNT)), 4..7);
        let mut end = 7;
        let mut longest = 0;
        for span in 3..60 {
            let spans = ahead(&readahead, &access(span..span + 1, 0, COUNT));
            if !spans.is_empty() {
                assert_eq!(spans.start, end, "none twice, none left out");
                end = spans.end;
            }
            longest = longest.max(end - span);
        }
        assert_eq!(u64::from(longest - 1), LAST_WINDOW / (FIRST_WINDOW / 2));
    }

    #[test]
    fn a_file_is_not_fetched_past_its_end() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, 3)), 0..0);
        assert_eq!(ahead(&readahead, &access(1..2, 0, 3)), 2..3);
        assert_eq!(ahead(&readahead, &access(2..3, 0, 3)), 0..0);
    }

    #[test]
    fn a_reader_of_several_files_has_read_ahead_past_their_ends() {
        let readahead = SequentialReaders::default();
        for file in 0..4 {
            let span = file as u32;
            assert_eq!(
                ahead(&readahead, &access(span..span + 1, file, span + 1)),
                0..0
            );
        }
        assert_eq!(ahead(&readahead, &access(4..5, 4, 5)), 5..7);
    }

    #[test]
    fn two_readers_are_distinguished() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(50..51, 1, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(1..2, 0, COUNT)), 2..4);
        assert_eq!(ahead(&readahead, &access(51..52, 1, COUNT)), 52..54);
    }

    #[test]
    fn a_reader_continues_in_the_span_that_it_needed_last() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(0..2, 0, COUNT)), 2..4);
        // without a previous access it is a new reader
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..2, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(0..3, 0, COUNT)), 0..0);
    }

    #[test]
    fn of_too_many_readers_the_least_recent_is_removed() {
        let readahead = SequentialReaders::default();
        for reader in 0..4 {
            let start = reader * 1000;
            assert_eq!(ahead(&readahead, &access(start..start + 1, 0, 9000)), 0..0);
        }
        let mark = DiskOffset(4096)..DiskOffset(8192);
        readahead.mark(1, &mark);
        // the first reader continues, so the second is removed with its marker
        assert_eq!(ahead(&readahead, &access(1..2, 0, 9000)), 2..4);
        assert_eq!(ahead(&readahead, &access(8000..8001, 0, 9000)), 0..0);
        assert!(!readahead.reaches(&mark));
        assert_eq!(ahead(&readahead, &access(2..3, 0, 9000)), 4..7);
        assert_eq!(ahead(&readahead, &access(1001..1002, 0, 9000)), 0..0);
    }

    #[test]
    fn a_marker_is_reached_once() {
        let readahead = SequentialReaders::default();
        let range = |start, end| DiskOffset(start)..DiskOffset(end);
        assert!(!readahead.reaches(&range(0, u64::MAX)));
        readahead.mark(1, &range(4096, 8192));
        assert!(!readahead.reaches(&range(0, 4096)));
        assert!(!readahead.reaches(&range(8192, 9000)));
        assert!(readahead.reaches(&range(8000, 9000)));
        assert!(!readahead.reaches(&range(8000, 9000)));
    }
}
