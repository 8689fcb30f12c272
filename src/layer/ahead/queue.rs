//! How much of a disk is on its way, and what comes next without being waited for.
//!
//! GETs that run side by side share the link: those for all that a reader should have ahead of it, begun at once, would end at once too.
//! Until then there is nothing to decode, and after that nothing is on its way. So they begin one after another, in the order in which
//! their spans are wanted, each when less is on its way than keeps the link in use.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Of one disk.
#[derive(Default)]
pub(crate) struct FetchQueue {
    queue: Mutex<VecDeque<Range<u32>>>,
    /// Compressed bytes that were asked for and have not come, but for those fetched in the background.
    pub(super) on_the_way: AtomicU64,
}

impl FetchQueue {
    pub(crate) fn push(&self, spans: Range<u32>) {
        self.locked().push_back(spans);
    }

    /// The next spans for one GET, as many as `fit`, if less than so many bytes are on their way.
    pub(crate) fn next(
        &self,
        enough: u64,
        fit: impl Fn(&Range<u32>) -> bool,
    ) -> Option<Range<u32>> {
        if self.on_the_way.load(Ordering::Relaxed) >= enough {
            return None;
        }
        let mut queue = self.locked();
        let spans = queue.front_mut()?;
        let start = spans.start;
        let more = (start + 1..spans.end).take_while(|span| fit(&(start..span + 1)));
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
    fn spans_come_in_their_order_as_long_as_too_little_is_on_its_way() {
        let upcoming = FetchQueue::default();
        let fit = |run: &Range<u32>| run.len() <= 2;
        assert_eq!(upcoming.next(1, fit), None);
        upcoming.push(3..6);
        upcoming.push(10..11);
        assert_eq!(upcoming.next(1, fit), Some(3..5));
        upcoming.on_the_way.store(100, Ordering::Relaxed);
        assert_eq!(upcoming.next(100, fit), None);
        assert_eq!(upcoming.next(101, fit), Some(5..6));
        // longer than fits, and no shorter one is to be had
        assert_eq!(upcoming.next(101, |_| false), Some(10..11));
        assert!(upcoming.is_empty());
        assert_eq!(upcoming.next(101, fit), None);
    }
}
