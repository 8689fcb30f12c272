//! When most of a layer is wanted, all of it is fetched.
//!
//! Single spans suit a program that reads a part of its image. One that goes on to read most of it would wait for a round trip a span,
//! and end later than after a pull. So a disk counts its misses: reads that had to ask for a span which nothing had brought on its way,
//! not the read-ahead either. Each is taken as a sign that several spans are wanted, and a span that was read ahead as a sign of itself.
//! When they amount to what was absent at first, the rest is fetched in the background: many ranged GETs side by side, and each absent
//! span once. Readers go before it (see [`super::traffic`]).
//!
//! This is the one place that decides it. `docs/architecture.md` has the reasons for the numbers.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet};

use super::{Disk, Progress, fetch, flight};
use crate::units::SpanId;

/// The spans that a miss stands for.
const SPANS_A_MISS: u32 = 4;
/// Misses without which a layer is not fetched as a whole.
const LEAST: u32 = 3;

/// Compressed bytes of one background GET, unless a single span has more.
pub(super) const FETCH_BYTES: u64 = 4 << 20;

/// How long such a GET goes on when nobody waits for it: [`FETCH_BYTES`] over half a megabit a second.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Whether a disk is fetched as a whole, and what speaks for it.
pub(super) struct Whole {
    /// Spans absent when the disk was opened.
    absent: u32,
    /// Misses since.
    misses: AtomicU32,
    /// Spans read ahead since.
    ahead: AtomicU32,
    /// It is never begun.
    off: bool,
    progress: watch::Sender<Progress>,
}

impl Whole {
    /// Of a disk with so many absent spans.
    pub(super) fn new(absent: u32, off: bool) -> Self {
        let progress = match absent {
            0 => Progress::Complete,
            _ => Progress::Lazy,
        };
        Self {
            absent,
            misses: AtomicU32::new(0),
            ahead: AtomicU32::new(0),
            off,
            progress: watch::Sender::new(progress),
        }
    }

    /// How far the disk is, now and later.
    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Takes note of a miss; true when the rest has to follow now, and the caller has to see to that.
    pub(super) fn is_due_after_miss(&self) -> bool {
        let misses = self
            .misses
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        let wanted = misses
            .saturating_mul(SPANS_A_MISS)
            .saturating_add(self.ahead.load(Ordering::Relaxed));
        let most = misses >= LEAST && wanted >= self.absent;
        !self.off && most && self.turn(Progress::Lazy, Progress::Filling)
    }

    /// Takes note of spans that are fetched ahead of a reader.
    pub(super) fn note_ahead(&self, spans: u32) {
        // at most as many as there are, and again only those that were lost
        self.ahead.fetch_add(spans, Ordering::Relaxed);
    }

    /// Every span is present.
    pub(super) fn completed(&self) {
        self.progress.send_replace(Progress::Complete);
    }

    /// A span that was present is not any more.
    pub(super) fn lost(&self) {
        self.turn(Progress::Complete, Progress::Lazy);
    }

    fn turn(&self, from: Progress, to: Progress) -> bool {
        self.progress.send_if_modified(|progress| {
            let is = *progress == from;
            if is {
                *progress = to;
            }
            is
        })
    }
}

/// Fetches all absent spans of a disk, from `first` on and then those before it. Ends early when nobody has the disk any more, or when
/// a span cannot be had: then the next miss begins anew.
pub(super) async fn fetch_all(disk: Arc<Disk>, first: SpanId) {
    let count = disk.spans().count();
    let traffic = disk.store().traffic().clone();
    let layer = disk.layer().digest;
    tracing::info!(%layer, "most of the layer is wanted: all of it is fetched");
    // the disk goes when its last user goes
    let disk = {
        let weak = Arc::downgrade(&disk);
        drop(disk);
        weak
    };
    let failed = Arc::new(AtomicBool::new(false));
    let mut fetches = JoinSet::new();
    let mut parts = [first.get()..count, 0..first.get()].into_iter();
    let mut rest = parts.next().unwrap_or_default();
    loop {
        let turn = traffic.turn().await;
        let Some(disk) = disk.upgrade().filter(|_| !failed.load(Ordering::Relaxed)) else {
            break;
        };
        let Some(run) = next_run(&disk, rest.clone()) else {
            match parts.next() {
                Some(part) => rest = part,
                None => break,
            }
            continue;
        };
        rest.start = run.end;
        let failed = Arc::clone(&failed);
        fetches.spawn(async move {
            let deadline = flight::deadline(Some(TIMEOUT));
            for claim in disk.claim(run, FETCH_BYTES, deadline) {
                let spans = claim.spans();
                fetch::fetch(Arc::clone(&disk), claim).await;
                if !spans.map(SpanId).all(|span| disk.has(span)) {
                    failed.store(true, Ordering::Relaxed);
                }
            }
            drop(turn);
        });
        while fetches.try_join_next().is_some() {}
    }
    while fetches.join_next().await.is_some() {}
    if let Some(disk) = disk.upgrade() {
        // not where it is complete
        disk.whole().turn(Progress::Filling, Progress::Lazy);
    }
}

/// The first absent spans of `rest`, adjacent ones, for one GET.
pub(super) fn next_run(disk: &Disk, rest: Range<u32>) -> Option<Range<u32>> {
    let start = rest.clone().find(|span| !disk.has(SpanId(*span)))?;
    let more = (start + 1..rest.end).take_while(|span| {
        !disk.has(SpanId(*span)) && disk.compressed_length(&(start..span + 1)) <= FETCH_BYTES
    });
    Some(start..more.last().unwrap_or(start) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misses(whole: &Whole, count: u32) -> bool {
        (0..count).any(|_| whole.is_due_after_miss())
    }

    #[test]
    fn a_miss_for_four_spans_begins_it_once() {
        let whole = Whole::new(40, false);
        assert!(!misses(&whole, 9));
        assert!(misses(&whole, 1));
        assert!(!misses(&whole, 10));
        assert_eq!(*whole.progress().borrow(), Progress::Filling);
        // it has failed, and somebody asks again
        whole.turn(Progress::Filling, Progress::Lazy);
        assert!(misses(&whole, 1));
        whole.completed();
        assert_eq!(*whole.progress().borrow(), Progress::Complete);
        assert!(!misses(&whole, 1));
        // the disk could not be synced
        whole.lost();
        assert!(misses(&whole, 1));
    }

    #[test]
    fn what_was_read_ahead_counts_after_three_misses() {
        let whole = Whole::new(40, false);
        whole.note_ahead(28);
        assert!(!misses(&whole, 2));
        assert!(misses(&whole, 1));
    }

    #[test]
    fn a_few_spans_are_worth_three_misses() {
        let whole = Whole::new(4, false);
        assert!(!misses(&whole, 2));
        assert!(misses(&whole, 1));
    }

    #[test]
    fn it_can_be_off() {
        let whole = Whole::new(4, true);
        assert!(!misses(&whole, 4));
        assert_eq!(*whole.progress().borrow(), Progress::Lazy);
    }
}
