//! When most of a layer is wanted, all of it is fetched.
//!
//! Single spans suit a program that reads a part of its image. One that goes on to read most of it waits for a round trip and a decode
//! a span, and may end later than after a pull. So what misses have brought is counted, and what they cost is measured for all disks of an
//! image ([`super::cost`]). When they have brought three quarters of a layer, or readers have lost what a lazy image had saved them, the
//! rest is fetched in the background: many ranged GETs side by side, and each absent span once. Readers go before it (see
//! [`super::background`]).
//!
//! This is the one place that decides it. `docs/architecture.md` has the reasons.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use tokio::sync::watch;

use super::cost::Cost;
use crate::{
    layer::{
        locked::locked,
        stored::{present_spans::Bitmap, span_table::Spans},
        types::DiskProgress,
    },
    units::SpanId,
};

/// Misses without which a layer is not fetched as a whole.
const LEAST: u32 = 3;

/// Compressed bytes of one background GET, unless a single span has more.
pub(crate) const FETCH_BYTES: u64 = 4 << 20;

/// What the disks of an image have lost and saved together: a pull would have unpacked all of them before the first read.
pub(crate) struct FillLedger {
    /// Compressed bytes absent when it was opened.
    absent: u64,
    cost: Mutex<Cost>,
}

impl FillLedger {
    fn new(absent: u64) -> Arc<Self> {
        Arc::new(Self {
            absent,
            cost: Mutex::default(),
        })
    }

    fn is_used_up(&self) -> bool {
        locked(&self.cost).is_reached(self.absent)
    }
}

/// Whether a disk is fetched as a whole, and what speaks for it.
pub(crate) struct Fill {
    /// Compressed bytes absent when the disk was opened.
    absent: u64,
    /// Misses since: reads that had to ask for a span which nothing had brought on its way, not the read-ahead either.
    misses: AtomicU32,
    /// Compressed bytes that their fetches bring.
    missed: AtomicU64,
    ledger: Mutex<Arc<FillLedger>>,
    /// It is never begun.
    off: bool,
    progress: watch::Sender<DiskProgress>,
}

impl Fill {
    /// Of a disk with these spans, of which some are present.
    pub(crate) fn of(bitmap: &Bitmap, spans: &Spans, is_verified: bool, off: bool) -> Self {
        let progress = match (bitmap.is_full(), is_verified) {
            (true, true) => DiskProgress::Complete,
            (true, false) => DiskProgress::Full,
            (false, _) => DiskProgress::Lazy,
        };
        Self::new(progress, absent(bitmap, spans), off)
    }

    /// Of a disk with so many compressed bytes absent; it is never begun when it is `off`.
    fn new(progress: DiskProgress, absent: u64, off: bool) -> Self {
        Self {
            absent,
            misses: AtomicU32::new(0),
            missed: AtomicU64::new(0),
            ledger: Mutex::new(FillLedger::new(absent)),
            off,
            progress: watch::Sender::new(progress),
        }
    }

    /// How far the disk is, now and later.
    pub(crate) fn progress(&self) -> watch::Receiver<DiskProgress> {
        self.progress.subscribe()
    }

    /// Takes note of a miss whose fetches bring so many compressed bytes; true when the rest has to follow now, and the caller has to see to
    /// that.
    pub(crate) fn is_due_after_miss(&self, bytes: u64) -> bool {
        let missed = self.missed.fetch_add(bytes, Ordering::Relaxed);
        let missed = missed.saturating_add(bytes);
        let is_most_wanted = missed.saturating_mul(4) >= self.absent.saturating_mul(3);
        let misses = self
            .misses
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        !self.off
            && misses >= LEAST
            && (is_most_wanted || self.ledger().is_used_up())
            && self.turn(&[DiskProgress::Lazy], DiskProgress::Filling)
    }

    /// Takes note of what was measured.
    pub(crate) fn measured(&self, note: impl FnOnce(&mut Cost)) {
        note(&mut locked(&self.ledger().cost));
    }

    /// Compressed bytes that are on their way when the link is in use all the time; 0 as long as nothing is known of it.
    pub(crate) fn on_the_way(&self) -> u64 {
        locked(&self.ledger().cost).on_the_way()
    }

    /// How many background fetches at a time keep the link in use.
    pub(super) fn side_by_side(&self) -> usize {
        usize::try_from(self.on_the_way() / FETCH_BYTES)
            .map_or(usize::MAX, |more| more.saturating_add(1))
    }

    fn ledger(&self) -> Arc<FillLedger> {
        Arc::clone(&locked(&self.ledger))
    }

    /// Every span is present.
    pub(crate) fn filled(&self) {
        self.turn(
            &[DiskProgress::Lazy, DiskProgress::Filling],
            DiskProgress::Full,
        );
    }

    /// The layer has been checked as a whole.
    pub(crate) fn completed(&self) {
        self.turn(&[DiskProgress::Full], DiskProgress::Complete);
    }

    /// A span that was present is not any more.
    pub(crate) fn lost(&self) {
        self.turn(
            &[DiskProgress::Full, DiskProgress::Complete],
            DiskProgress::Lazy,
        );
    }

    pub(super) fn turn(&self, from: &[DiskProgress], to: DiskProgress) -> bool {
        self.progress.send_if_modified(|progress| {
            let is = from.contains(progress);
            if is {
                *progress = to;
            }
            is
        })
    }
}

/// Has the disks of an image lose and save together from now on, unless they do already; with each its absent bytes.
pub(super) fn share(lazy: &[(&Fill, u64)]) {
    let mut ledgers = lazy.iter().map(|(whole, _)| whole.ledger());
    let first = ledgers.next();
    if first.is_none_or(|first| ledgers.all(|ledger| Arc::ptr_eq(&first, &ledger))) {
        return;
    }
    let ledger = FillLedger::new(lazy.iter().map(|(_, absent)| absent).sum());
    for (whole, _) in lazy {
        *locked(&whole.ledger) = Arc::clone(&ledger);
    }
}

/// Compressed bytes of the spans that are absent.
pub(super) fn absent(bitmap: &Bitmap, spans: &Spans) -> u64 {
    let absent = (0..bitmap.count())
        .map(SpanId)
        .filter(|span| !bitmap.get(*span));
    let bytes = absent.map(|span| {
        let bytes = spans.compressed(span);
        bytes.end.get() - bytes.start.get()
    });
    bytes.sum()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A link, and what one core decodes of what comes over it.
    struct Link {
        round_trip_ms: u32,
        mbit: u32,
    }

    const GIGABIT_NEAR: Link = Link {
        round_trip_ms: 2,
        mbit: 1000,
    };
    const GIGABIT_FAR: Link = Link {
        round_trip_ms: 100,
        mbit: 1000,
    };
    const MEGABITS: Link = Link {
        round_trip_ms: 20,
        mbit: 100,
    };
    const LINKS: [Link; 3] = [GIGABIT_NEAR, GIGABIT_FAR, MEGABITS];

    /// Compressed bytes of a span of 4 MiB, and of what a miss brings of finer ones.
    const FETCHES: [u32; 2] = [1_300_000, 180_000];

    /// Of compressed bytes, by one core.
    const DECODED_BYTES_A_SECOND: f64 = 120e6;

    impl Link {
        fn transfer(&self, bytes: u32) -> Duration {
            Duration::from_secs_f64(f64::from(bytes) * 8e-6 / f64::from(self.mbit))
        }

        fn round_trip(&self) -> Duration {
            Duration::from_millis(self.round_trip_ms.into())
        }
    }

    fn decode(bytes: u32) -> Duration {
        Duration::from_secs_f64(f64::from(bytes) / DECODED_BYTES_A_SECOND)
    }

    /// One reader that misses `misses` spans of `count`, one after another: how many before the rest followed (all of them where it
    /// never did), and when the last one was there.
    fn read(link: &Link, span: u32, count: u32, misses: u32) -> (u32, Duration) {
        let absent = u64::from(span) * u64::from(count);
        let whole = Fill::new(DiskProgress::Lazy, absent, false);
        let start = Instant::now();
        let mut now = start;
        for missed in 0..misses {
            if whole.is_due_after_miss(span.into()) {
                // the rest comes in one stream, and is decoded meanwhile
                let rest = link.transfer(span).max(decode(span)) * (count - missed);
                return (missed, now + link.round_trip() + rest - start);
            }
            let first = now + link.round_trip();
            let last = first + link.transfer(span);
            let there = last + decode(span);
            whole.measured(|cost| {
                cost.came(span.into(), 0, now, first, last);
                cost.decoded(span.into(), decode(span));
                cost.waited(now, there);
            });
            now = there;
        }
        (misses, now - start)
    }

    /// A pull of the whole, whose unpacking takes at least three times as long as decoding takes here.
    fn pull(link: &Link, span: u32, count: u32) -> Duration {
        link.round_trip() + (link.transfer(span) + decode(span) * 3) * count
    }

    #[test]
    fn who_reads_all_span_by_span_ends_no_later_than_after_a_pull() {
        for link in LINKS {
            for (span, count) in FETCHES.into_iter().zip([100, 700]) {
                let (misses, took) = read(&link, span, count, count);
                let pull = pull(&link, span, count);
                assert!(
                    took.as_secs_f64() <= 1.05 * pull.as_secs_f64(),
                    "{} Mbit/s, {} ms, spans of {span}: {took:?}, {misses} misses of {count}; a pull takes {pull:?}",
                    link.mbit,
                    link.round_trip_ms,
                );
            }
        }
    }

    #[test]
    fn who_reads_a_part_gets_that() {
        for (link, shares) in [
            (GIGABIT_NEAR, [74, 40]),
            (MEGABITS, [74, 20]),
            (GIGABIT_FAR, [9, 2]),
        ] {
            for (span, share) in FETCHES.into_iter().zip(shares) {
                let (misses, _) = read(&link, span, 100, share);
                assert_eq!(misses, share, "{} Mbit/s, spans of {span}", link.mbit);
            }
        }
    }

    #[test]
    fn who_has_read_three_quarters_gets_all() {
        for link in [GIGABIT_NEAR, MEGABITS] {
            let (misses, _) = read(&link, FETCHES[0], 100, 100);
            assert_eq!(misses, 74, "{} Mbit/s", link.mbit);
        }
    }

    #[test]
    fn over_a_long_distance_the_rest_follows_early() {
        let (misses, _) = read(&GIGABIT_FAR, FETCHES[0], 100, 100);
        assert!((9..11).contains(&misses), "{misses}");
        // not before the third miss, however few there are
        let (misses, _) = read(&GIGABIT_FAR, FETCHES[0], 4, 4);
        assert_eq!(misses, LEAST - 1);
    }

    /// A disk whose readers have waited for long.
    fn waited_for(off: bool) -> Fill {
        let whole = Fill::new(DiskProgress::Lazy, 1 << 20, off);
        let now = Instant::now();
        whole.measured(|cost| {
            cost.came(1 << 20, 0, now, now, now + Duration::from_millis(1));
            cost.decoded(1 << 20, Duration::from_millis(1));
            cost.waited(now, now + Duration::from_secs(1));
        });
        whole
    }

    fn misses(whole: &Fill, count: u32) -> bool {
        (0..count).any(|_| whole.is_due_after_miss(1))
    }

    #[test]
    fn what_one_disk_saves_another_may_lose() {
        let (lost, other) = (
            Fill::new(DiskProgress::Lazy, 1000, false),
            Fill::new(DiskProgress::Lazy, 9000, false),
        );
        share(&[(&lost, 1000), (&other, 9000)]);
        let ledger = other.ledger();
        share(&[(&lost, 900), (&other, 9000)]);
        assert!(
            Arc::ptr_eq(&ledger, &lost.ledger()),
            "they share one already"
        );
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        lost.measured(|cost| {
            cost.came(1000, 0, at(0), at(0), at(3));
            cost.decoded(1000, Duration::from_millis(1));
            // nine times what unpacking its own layer would have cost
            cost.waited(at(0), at(30));
        });
        for whole in [&lost, &other] {
            assert!(!misses(whole, LEAST + 1));
        }
        other.measured(|cost| cost.waited(at(100), at(103)));
        for whole in [&lost, &other] {
            assert!(misses(whole, LEAST), "each follows with its own next miss");
        }
    }

    #[test]
    fn it_is_begun_once_and_again_when_it_has_failed() {
        let whole = waited_for(false);
        assert!(!misses(&whole, LEAST - 1));
        assert!(misses(&whole, 1));
        assert!(!misses(&whole, 10));
        assert_eq!(*whole.progress().borrow(), DiskProgress::Filling);
        // it has failed, and somebody asks again
        whole.turn(&[DiskProgress::Filling], DiskProgress::Lazy);
        assert!(misses(&whole, 1));
        whole.filled();
        assert_eq!(*whole.progress().borrow(), DiskProgress::Full);
        assert!(!misses(&whole, 1));
        // the disk could not be synced
        whole.lost();
        assert!(misses(&whole, 1));
        whole.completed();
        assert_eq!(*whole.progress().borrow(), DiskProgress::Filling, "not yet");
        whole.filled();
        whole.completed();
        // whoever brought another of the last spans comes late
        whole.filled();
        assert_eq!(*whole.progress().borrow(), DiskProgress::Complete);
    }

    #[test]
    fn it_can_be_off() {
        let whole = waited_for(true);
        assert!(!misses(&whole, 9));
        assert_eq!(*whole.progress().borrow(), DiskProgress::Lazy);
    }
}
