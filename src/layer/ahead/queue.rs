//! The queue of spans to fetch ahead, and how many bytes of a disk are in flight.
//!
//! Concurrent GETs share the link. If all GETs of a reader's read-ahead started at once, they would also end at once: until then there is
//! nothing to decode, and after that nothing is in flight. So they start one after another, in the order in which their spans are needed,
//! each when fewer bytes are in flight than the link can carry.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// The queue of one disk.
#[derive(Default)]
pub(crate) struct FetchQueue {
    queue: Mutex<VecDeque<Range<u32>>>,
    /// Compressed bytes that were requested and have not arrived, without those of background fetches.
    pub(super) in_flight: AtomicU64,
}

impl FetchQueue {
    pub(crate) fn push(&self, spans: Range<u32>) {
        self.locked().push_back(spans);
    }

    /// The next spans for one GET, as long a run as `fits`, if fewer than `enough` bytes are in flight.
    pub(crate) fn next(
        &self,
        enough: u64,
        fits: impl Fn(&Range<u32>) -> bool,
    ) -> Option<Range<u32>> {
        if self.in_flight.load(Ordering::Relaxed) >= enough {
            return None;
        }
        let mut queue = self.locked();
        let spans = queue.front_mut()?;
        let start = spans.start;
        let more = (start + 1..spans.end).take_while(|span| fits(&(start..span + 1)));
        spans.start = more.last().unwrap_or(start) + 1;
        let next = start..spans.start;
        if spans.start >= spans.end {
            queue.pop_front();
        }
        Some(next)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.locked().is_empty()
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, VecDeque<Range<u32>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_taken_in_order_while_too_few_bytes_are_in_flight() {
        let queue = FetchQueue::default();
        let fits = |run: &Range<u32>| run.len() <= 2;
        assert_eq!(queue.next(1, fits), None);
        queue.push(3..6);
        queue.push(10..11);
        assert_eq!(queue.next(1, fits), Some(3..5));
        queue.in_flight.store(100, Ordering::Relaxed);
        assert_eq!(queue.next(100, fits), None);
        assert_eq!(queue.next(101, fits), Some(5..6));
        // one span is taken even if it does not fit
        assert_eq!(queue.next(101, |_| false), Some(10..11));
        assert!(queue.is_empty());
        assert_eq!(queue.next(101, fits), None);
    }
}
