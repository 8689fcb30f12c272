//! When the spans of a disk were used last, and which of them must not be evicted now.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::{layer::locked::locked, units::SpanId};

/// A span that was fetched for a reader, and is not read yet, is not evicted before this many other spans were written, or so many
/// seconds have passed.
const PATIENCE: u32 = 16;

/// The uses of the spans of one disk.
pub(crate) struct SpanUses {
    /// By span: twice the time of the last use, and one more if its reader has not read it yet. Times are those of
    /// [`super::budget::Budget::now`].
    times: Box<[AtomicU32]>,
    /// Number of evictions.
    evictions: AtomicU64,
    /// Spans that readers wait for, with the number of these readers.
    awaited: Mutex<BTreeMap<SpanId, u32>>,
    /// Number of those who read the file of the disk without regard to evictions.
    holds: Mutex<u32>,
}

impl SpanUses {
    pub(crate) fn new(spans: u32) -> Self {
        Self {
            times: (0..spans).map(|_| AtomicU32::new(0)).collect(),
            evictions: AtomicU64::new(0),
            awaited: Mutex::default(),
            holds: Mutex::default(),
        }
    }

    /// A span is read, or written ahead of readers, at this time.
    pub(crate) fn used(&self, span: SpanId, now: u32) {
        self.set(span, now.wrapping_mul(2));
    }

    fn set(&self, span: SpanId, new: u32) {
        if let Some(time) = self.times.get(span.get() as usize)
            && time.load(Ordering::Relaxed) != new
        {
            time.store(new, Ordering::Relaxed);
        }
    }

    /// How long ago a span was used; `None`: it must not be evicted now.
    pub(crate) fn age(&self, span: SpanId, now: u32) -> Option<u32> {
        let time = self.times.get(span.get() as usize)?.load(Ordering::Relaxed);
        let age = now.wrapping_mul(2).wrapping_sub(time & !1) / 2;
        let is_unread = time & 1 == 1 && age < PATIENCE;
        (!is_unread && !locked(&self.awaited).contains_key(&span)).then_some(age)
    }

    /// A reader waits for spans, until [`Self::end_wait`].
    pub(crate) fn wait(&self, spans: &[SpanId]) {
        let mut awaited = locked(&self.awaited);
        for span in spans {
            *awaited.entry(*span).or_default() += 1;
        }
    }

    /// The reader has its spans, and reads them now.
    pub(crate) fn end_wait(&self, spans: &[SpanId], now: u32) {
        let mut awaited = locked(&self.awaited);
        for span in spans {
            self.set(*span, now.wrapping_mul(2) | 1);
            if let Some(readers) = awaited.get_mut(span) {
                *readers -= 1; // one for each `wait`
                if *readers == 0 {
                    awaited.remove(span);
                }
            }
        }
    }

    /// The number of evictions. If it has changed during a read of the file, the bytes that were read may be those of a hole.
    pub(crate) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Acquire)
    }

    /// Spans have been made absent, and their bytes are removed from now on.
    pub(crate) fn evict(&self) {
        self.evictions.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of holds. While it is locked it does not change; while it is not 0 nothing is evicted.
    pub(crate) fn holds(&self) -> MutexGuard<'_, u32> {
        locked(&self.holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awaited_and_unread_spans_have_no_age() {
        let uses = SpanUses::new(3);
        uses.used(SpanId(0), 5);
        assert_eq!(uses.age(SpanId(0), 5), Some(0));
        uses.wait(&[SpanId(0)]);
        assert_eq!(uses.age(SpanId(0), 70), None);
        uses.end_wait(&[SpanId(0)], 70);
        assert_eq!(uses.age(SpanId(0), 70 + PATIENCE - 1), None);
        assert_eq!(uses.age(SpanId(0), 70 + PATIENCE), Some(PATIENCE));
        uses.used(SpanId(0), 71);
        assert_eq!(uses.age(SpanId(0), 72), Some(1));
        assert_eq!(uses.age(SpanId(1), 100), Some(100));
        let spans = [SpanId(1), SpanId(2)];
        uses.wait(&spans);
        uses.wait(&spans[..1]);
        assert_eq!(uses.age(SpanId(1), 100), None);
        uses.end_wait(&spans, 10);
        assert_eq!(uses.age(SpanId(1), 100), None);
        assert_eq!(uses.age(SpanId(2), 100), Some(90));
        uses.end_wait(&spans[..1], 20);
        assert_eq!(uses.age(SpanId(1), 100), Some(80));
        assert_eq!(uses.age(SpanId(3), 100), None, "there is no such span");
    }

    #[test]
    fn the_time_may_wrap() {
        let uses = SpanUses::new(1);
        let before = u32::MAX / 2;
        uses.used(SpanId(0), before);
        assert_eq!(uses.age(SpanId(0), before.wrapping_add(102)), Some(102));
    }
}
