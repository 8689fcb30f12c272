//! Who reads a disk from front to back, and which spans they will want next.
//!
//! The kernel's own read-ahead is small on an incomplete device, for it asks for data that no program wants. Here it is done by span,
//! and only for a reader that has missed at least twice in sequence. Inside a file it ends with the file; it goes past a file's end only
//! for a reader that has gone from file to file in the order of the disk for a while (`tar`, a copy, a hash over all).

use std::{
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::units::DiskOffset;

/// Readers that are told apart.
const STREAMS: usize = 4;

/// Misses in sequence before anything is fetched ahead.
const MISSES: u32 = 2;

/// Files that a reader has gone through in sequence before a file's end does not stop it.
const FILES: u32 = 4;

/// The same in compressed bytes that a reader has passed, where spans are fine: two of them are soon touched by chance.
pub(crate) const LEAST_PASSED: u64 = 4 << 20;

/// Compressed bytes that a miss brings besides, where spans are fine: so many behind it, ...
const AROUND: u64 = 80 << 10;
/// ... and half of what is there right before it, of which so many count, ...
const MOST_AROUND: u64 = 128 << 10;
/// ... and what is then left up to spans that are there, before it and behind, if it is no more than this.
const GAP: u64 = 96 << 10;

/// Compressed bytes of a file's end that the miss of its start brings, where spans are fine, ...
const FILE_END: u64 = 192 << 10;
/// ... of a file with so many spans.
const LONG_FILE: u32 = 3;

/// Compressed bytes that are fetched ahead of a reader: at first, and at most.
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
    /// The end of what was fetched for it.
    ahead: u32,
    /// Accesses in sequence that needed another span.
    steps: u32,
    /// Compressed bytes of the spans that it has passed.
    passed: u64,
    file: u64,
    /// Files in sequence.
    files: u32,
    window: u64,
    /// When it was last seen.
    seen: u64,
}

#[derive(Default)]
struct ReaderStates {
    streams: [SequentialReader; STREAMS],
    clock: u64,
}

/// Where on the disk lies what was fetched ahead for a reader and not yet reached by it: an access there makes it fetch on.
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

/// Spans to fetch ahead, and the number of the reader that they are for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AheadOfReader {
    pub spans: Range<u32>,
    pub reader: usize,
}

impl SequentialReaders {
    /// Takes note of an access; gives what should be fetched ahead, for a reader that has passed `least` compressed bytes. `compressed`
    /// is the length of a span in the blob, `count` the number of spans.
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

    /// Sets where on the disk the spans lie that were fetched ahead for a reader.
    pub(crate) fn mark(&self, reader: usize, disk: &Range<DiskOffset>) {
        let marker = &self.markers[reader];
        marker.start.store(disk.start.get(), Ordering::Relaxed);
        marker.end.store(disk.end.get(), Ordering::Relaxed);
    }

    /// Whether a read of this range reaches what was fetched ahead, and so should be told to [`Self::access`]. True once for each
    /// [`Self::mark`]. Cheap, and not exact: no reader is hurt by a hint too many.
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

/// What the fetch of a miss should bring that needs the spans `missed` of `count`, where spans are fine: its reader is likely to want the
/// next, the more so the more of what stands before it has been wanted, and what lies between two wanted places. Whether they are of the
/// same file does not count: the files of a package stand together and are wanted together.
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

/// What else the miss of a file's start should bring, where spans are fine: the file's end. A program is loaded from both (the dynamic
/// section and what is relocated stand at the end of an ELF file), and archives have their directory there.
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

/// The end of the spans that `stream` should have ahead of it.
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
    fn one_access_and_scattered_accesses_fetch_nothing() {
        let readahead = SequentialReaders::default();
        for span in [50, 10, 70, 30, 90, 52, 12, 72] {
            assert_eq!(ahead(&readahead, &access(span..span + 1, 0, COUNT)), 0..0);
            // again in the same span
            assert_eq!(ahead(&readahead, &access(span..span + 1, 0, COUNT)), 0..0);
        }
    }

    #[test]
    fn where_spans_are_fine_two_are_no_sequence() {
        let readahead = SequentialReaders::default();
        let spans = LEAST_PASSED / 10_000;
        for span in 0..2000 {
            let access = access(span..span + 1, 0, 4000);
            let ahead = readahead.access(&access, 4000, LEAST_PASSED, |_| 10_000);
            // the first that has passed enough
            assert_eq!(ahead.is_some(), u64::from(span) >= spans, "{span}");
            if ahead.is_some() {
                return;
            }
        }
        panic!("nothing was fetched ahead");
    }

    #[test]
    fn a_miss_brings_the_next_spans_and_more_the_more_is_there() {
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
        assert_eq!(end(10..11, 100, 12..13), 12, "up to what is there");
        assert_eq!(end(10..11, 100, 15..16), 15, "a gap of two more");
        assert_eq!(end(10..11, 100, 16..17), 13, "none of three");
        // coarse ones are too long for it
        let coarse = around(&(10..11), 100, |span| span < 10, |_| 1 << 20);
        assert_eq!(coarse, 10..11);
        // a gap before it
        assert_eq!(all(10..11, 11, &|span| span == 9), 10..11);
        assert_eq!(all(10..11, 11, &|span| span == 8), 9..11);
        assert_eq!(all(10..11, 11, &|span| span == 7), 8..11);
        assert_eq!(all(10..11, 11, &|span| span == 6), 10..11, "none of three");
        assert_eq!(
            all(2..3, 3, &|_| false),
            2..3,
            "no gap: nothing is before it"
        );
    }

    #[test]
    fn the_miss_of_a_files_start_brings_its_end() {
        let fine = |_| 80 << 10;
        let end = |missed, file| file_end(&missed, &file, fine);
        assert_eq!(end(10..11, 10..20), 18..20, "two of 80 KiB in 192");
        assert_eq!(end(9..13, 10..20), 18..20);
        assert_eq!(end(10..19, 10..20), 19..20, "what is left of it");
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
    fn a_reader_of_file_after_file_is_fetched_for_past_their_ends() {
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
    fn two_readers_are_told_apart() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(50..51, 1, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(1..2, 0, COUNT)), 2..4);
        assert_eq!(ahead(&readahead, &access(51..52, 1, COUNT)), 52..54);
    }

    #[test]
    fn a_reader_goes_on_in_the_span_that_it_needed_last() {
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..1, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(0..2, 0, COUNT)), 2..4);
        // where nothing is before it, it does not
        let readahead = SequentialReaders::default();
        assert_eq!(ahead(&readahead, &access(0..2, 0, COUNT)), 0..0);
        assert_eq!(ahead(&readahead, &access(0..3, 0, COUNT)), 0..0);
    }

    #[test]
    fn of_readers_who_are_too_many_the_one_seen_longest_ago_is_forgotten() {
        let readahead = SequentialReaders::default();
        for reader in 0..4 {
            let start = reader * 1000;
            assert_eq!(ahead(&readahead, &access(start..start + 1, 0, 9000)), 0..0);
        }
        let mark = DiskOffset(4096)..DiskOffset(8192);
        readahead.mark(1, &mark);
        // the first is seen again; so the second goes, and what was marked for it
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
