//! Decides that the rest of a layer is fetched: when most of it was read.
//!
//! Single spans suit a program that reads a part of its image. A program that reads most of it waits for one round trip and one decode per
//! span, and may end later than after a pull. So the bytes that misses have fetched are counted, and their cost is measured for all disks
//! of an image ([`super::cost`]). When misses have fetched three quarters of a layer, or readers have lost as much time as the lazy image
//! had saved them, the rest is fetched in the background: many concurrent ranged GETs, and each absent span once. Readers have precedence
//! (see [`super::background`]).
//!
//! No other file decides this. `docs/architecture.md` has the reasons.

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

/// Minimum number of misses before the rest of a layer is fetched.
const LEAST: u32 = 3;

/// Compressed bytes of one background GET, unless a single span has more.
pub(crate) const FETCH_BYTES: u64 = 4 << 20;

/// The lost and saved time of all disks of an image together: a pull would have unpacked all of them before the first read.
pub(crate) struct FillLedger {
    /// Compressed bytes that were absent when the disks were opened.
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

/// When the rest of a layer is fetched.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum FillPolicy {
    /// Never: only what is read, and what follows it in the same file.
    Never,
    /// When most of the layer was read.
    #[default]
    Auto,
    /// As `auto`, and when no reader has waited for half a minute.
    Delayed,
    /// At once, in the background.
    Always,
}

/// The decision whether the rest of a disk is fetched, and the counts that it needs.
pub(crate) struct Fill {
    /// Compressed bytes that were absent when the disk was opened.
    absent: u64,
    /// Misses since then: reads that had to start a fetch, because the span was neither present nor in flight.
    misses: AtomicU32,
    /// Compressed bytes of the fetches that misses have started.
    missed: AtomicU64,
    ledger: Mutex<Arc<FillLedger>>,
    /// The rest is never fetched.
    off: bool,
    /// `None`: no image has set it.
    policy: Mutex<Option<FillPolicy>>,
    progress: watch::Sender<DiskProgress>,
}

impl Fill {
    /// The state of a disk with these spans.
    pub(crate) fn of(bitmap: &Bitmap, spans: &Spans, is_verified: bool, off: bool) -> Self {
        let progress = match (bitmap.is_full(), is_verified) {
            (true, true) => DiskProgress::Complete,
            (true, false) => DiskProgress::Full,
            (false, _) => DiskProgress::Lazy,
        };
        Self::new(progress, absent(bitmap, spans), off)
    }

    /// The state of a disk with this many compressed bytes absent. If it is `off`, the rest is never fetched.
    fn new(progress: DiskProgress, absent: u64, off: bool) -> Self {
        Self {
            absent,
            misses: AtomicU32::new(0),
            missed: AtomicU64::new(0),
            ledger: Mutex::new(FillLedger::new(absent)),
            off,
            policy: Mutex::default(),
            progress: watch::Sender::new(progress),
        }
    }

    /// Sets when the rest is fetched, unless a more eager policy was set before.
    pub(super) fn set_policy(&self, policy: FillPolicy) {
        let mut current = locked(&self.policy);
        *current = Some(current.map_or(policy, |current| current.max(policy)));
    }

    /// Watches the progress of the disk.
    pub(crate) fn progress(&self) -> watch::Receiver<DiskProgress> {
        self.progress.subscribe()
    }

    /// Counts a miss whose fetches have this many compressed bytes. Returns true if the rest is due now: then the caller has to start its
    /// fetch.
    pub(crate) fn is_due_after_miss(&self, bytes: u64) -> bool {
        let missed = self.missed.fetch_add(bytes, Ordering::Relaxed);
        let missed = missed.saturating_add(bytes);
        let is_most_wanted = missed.saturating_mul(4) >= self.absent.saturating_mul(3);
        let misses = self
            .misses
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        !self.off
            && *locked(&self.policy) != Some(FillPolicy::Never)
            && misses >= LEAST
            && (is_most_wanted || self.ledger().is_used_up())
            && self.transition(&[DiskProgress::Lazy], DiskProgress::Filling)
    }

    /// Adds a measurement.
    pub(crate) fn measured(&self, add: impl FnOnce(&mut Cost)) {
        add(&mut locked(&self.ledger().cost));
    }

    /// Compressed bytes in flight that keep the link in use all the time; 0 as long as nothing was measured.
    pub(crate) fn in_flight_target(&self) -> u64 {
        locked(&self.ledger().cost).in_flight_target()
    }

    /// How many concurrent background fetches keep the link in use.
    pub(super) fn concurrent_fetches(&self) -> usize {
        usize::try_from(self.in_flight_target() / FETCH_BYTES)
            .map_or(usize::MAX, |more| more.saturating_add(1))
    }

    fn ledger(&self) -> Arc<FillLedger> {
        Arc::clone(&locked(&self.ledger))
    }

    /// Every span is present.
    pub(crate) fn filled(&self) {
        self.transition(
            &[DiskProgress::Lazy, DiskProgress::Filling],
            DiskProgress::Full,
        );
    }

    /// The layer has passed the check as a fill.
    pub(crate) fn completed(&self) {
        self.transition(&[DiskProgress::Full], DiskProgress::Complete);
    }

    /// A present span was lost.
    pub(crate) fn lost(&self) {
        self.transition(
            &[DiskProgress::Full, DiskProgress::Complete],
            DiskProgress::Lazy,
        );
    }

    pub(super) fn transition(&self, from: &[DiskProgress], to: DiskProgress) -> bool {
        self.progress.send_if_modified(|progress| {
            let applies = from.contains(progress);
            if applies {
                *progress = to;
            }
            applies
        })
    }
}

/// Makes the disks of an image share one ledger from now on, unless they do already. Each has its absent bytes.
pub(super) fn share(lazy: &[(&Fill, u64)]) {
    let mut ledgers = lazy.iter().map(|(fill, _)| fill.ledger());
    let first = ledgers.next();
    if first.is_none_or(|first| ledgers.all(|ledger| Arc::ptr_eq(&first, &ledger))) {
        return;
    }
    let ledger = FillLedger::new(lazy.iter().map(|(_, absent)| absent).sum());
    for (fill, _) in lazy {
        *locked(&fill.ledger) = Arc::clone(&ledger);
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

    /// A link, and the rate at which one core decodes.
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

    /// Compressed bytes of a span of 4 MiB, and of the fetch of a miss where spans are fine.
    const FETCHES: [u32; 2] = [1_300_000, 180_000];

    /// Compressed bytes, by one core.
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

    /// One reader that misses `misses` spans of `count`, one after another. Returns the number of misses before the rest was due (all of
    /// them if it never was), and the time at which the last span was present.
    fn read(link: &Link, span: u32, count: u32, misses: u32) -> (u32, Duration) {
        let absent = u64::from(span) * u64::from(count);
        let fill = Fill::new(DiskProgress::Lazy, absent, false);
        let start = Instant::now();
        let mut now = start;
        for missed in 0..misses {
            if fill.is_due_after_miss(span.into()) {
                // the rest arrives in one stream, and is decoded meanwhile
                let rest = link.transfer(span).max(decode(span)) * (count - missed);
                return (missed, now + link.round_trip() + rest - start);
            }
            let first = now + link.round_trip();
            let last = first + link.transfer(span);
            let there = last + decode(span);
            fill.measured(|cost| {
                cost.received(span.into(), 0, now, first, last);
                cost.decoded(span.into(), decode(span));
                cost.waited(now, there);
            });
            now = there;
        }
        (misses, now - start)
    }

    /// A pull of the fill layer, whose unpacking takes at least three times as long as decoding takes here.
    fn pull(link: &Link, span: u32, count: u32) -> Duration {
        link.round_trip() + (link.transfer(span) + decode(span) * 3) * count
    }

    #[test]
    fn a_reader_of_all_spans_ends_no_later_than_after_a_pull() {
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
    fn a_reader_of_a_part_fetches_that_part() {
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
    fn the_rest_is_due_after_three_quarters() {
        for link in [GIGABIT_NEAR, MEGABITS] {
            let (misses, _) = read(&link, FETCHES[0], 100, 100);
            assert_eq!(misses, 74, "{} Mbit/s", link.mbit);
        }
    }

    #[test]
    fn over_a_long_round_trip_the_rest_is_due_early() {
        let (misses, _) = read(&GIGABIT_FAR, FETCHES[0], 100, 100);
        assert!((9..11).contains(&misses), "{misses}");
        // not before the third miss, however few spans there are
        let (misses, _) = read(&GIGABIT_FAR, FETCHES[0], 4, 4);
        assert_eq!(misses, LEAST - 1);
    }

    /// A disk whose readers have waited long.
    fn waited_for(off: bool) -> Fill {
        let fill = Fill::new(DiskProgress::Lazy, 1 << 20, off);
        let now = Instant::now();
        fill.measured(|cost| {
            cost.received(1 << 20, 0, now, now, now + Duration::from_millis(1));
            cost.decoded(1 << 20, Duration::from_millis(1));
            cost.waited(now, now + Duration::from_secs(1));
        });
        fill
    }

    fn misses(fill: &Fill, count: u32) -> bool {
        (0..count).any(|_| fill.is_due_after_miss(1))
    }

    #[test]
    fn the_disks_of_an_image_share_lost_and_saved_time() {
        let (lost, other) = (
            Fill::new(DiskProgress::Lazy, 1000, false),
            Fill::new(DiskProgress::Lazy, 9000, false),
        );
        share(&[(&lost, 1000), (&other, 9000)]);
        let ledger = other.ledger();
        share(&[(&lost, 900), (&other, 9000)]);
        assert!(
            Arc::ptr_eq(&ledger, &lost.ledger()),
            "the disks share one already"
        );
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        lost.measured(|cost| {
            cost.received(1000, 0, at(0), at(0), at(3));
            cost.decoded(1000, Duration::from_millis(1));
            // nine times as long as unpacking its own layer takes
            cost.waited(at(0), at(30));
        });
        for fill in [&lost, &other] {
            assert!(!misses(fill, LEAST + 1));
        }
        other.measured(|cost| cost.waited(at(100), at(103)));
        for fill in [&lost, &other] {
            assert!(misses(fill, LEAST), "each follows with its own next miss");
        }
    }

    #[test]
    fn the_rest_is_due_once_and_again_after_a_failure() {
        let fill = waited_for(false);
        assert!(!misses(&fill, LEAST - 1));
        assert!(misses(&fill, 1));
        assert!(!misses(&fill, 10));
        assert_eq!(*fill.progress().borrow(), DiskProgress::Filling);
        // the fetch has failed, and a reader misses again
        fill.transition(&[DiskProgress::Filling], DiskProgress::Lazy);
        assert!(misses(&fill, 1));
        fill.filled();
        assert_eq!(*fill.progress().borrow(), DiskProgress::Full);
        assert!(!misses(&fill, 1));
        // the disk could not be synced
        fill.lost();
        assert!(misses(&fill, 1));
        fill.completed();
        assert_eq!(*fill.progress().borrow(), DiskProgress::Filling, "not yet");
        fill.filled();
        fill.completed();
        // the fetch of another of the last spans ends later
        fill.filled();
        assert_eq!(*fill.progress().borrow(), DiskProgress::Complete);
    }

    #[test]
    fn the_fetch_of_the_rest_can_be_off() {
        let fill = waited_for(true);
        assert!(!misses(&fill, 9));
        assert_eq!(*fill.progress().borrow(), DiskProgress::Lazy);
    }
}
