//! Spans that the local disk has not taken: it is full, or fails.
//!
//! Readers get them from memory, so that a disk that fails does not cost more fetches than one that works. The memory has a bound; the span
//! that was used least recently goes first, and is fetched again. One task a disk tries to keep its spans, with a pause between two
//! tries (`keep_later`); when the last one is kept the disk is well again. As long as it is not, nothing is fetched that no reader waits for.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use lru::LruCache;

use super::before::SpanJoint;
use crate::{
    layer::types::DiskKey,
    units::{LayerOffset, SpanId},
};

/// Bytes of all spans in memory, of all disks; the newest span is there whatever it has.
const MAX_BYTES: usize = 64 << 20;

/// A verified span in memory.
#[derive(Clone)]
pub(crate) struct HeldSpan {
    /// As it was fetched, to keep it later.
    pub compressed: Bytes,
    /// What it was decoded with.
    pub joint: Option<SpanJoint>,
    /// Where its bytes are in the layer.
    pub start: LayerOffset,
    /// Its bytes, for readers.
    pub decoded: Bytes,
}

impl HeldSpan {
    fn bytes(&self) -> usize {
        self.compressed.len() + self.decoded.len()
    }
}

pub(crate) struct HeldSpans {
    pub(super) spans: LruCache<(DiskKey, SpanId), HeldSpan>,
    bytes: usize,
    /// Disks with a task that tries to keep their spans.
    pub(super) failing: HashSet<DiskKey>,
}

impl HeldSpans {
    pub(super) fn insert(&mut self, key: (DiskKey, SpanId), span: HeldSpan) {
        self.remove(key);
        self.bytes += span.bytes();
        self.spans.put(key, span);
        while self.bytes > MAX_BYTES && self.spans.len() > 1 {
            if let Some((_, oldest)) = self.spans.pop_lru() {
                self.bytes -= oldest.bytes();
            }
        }
    }

    pub(super) fn remove(&mut self, key: (DiskKey, SpanId)) {
        if let Some(span) = self.spans.pop(&key) {
            self.bytes -= span.bytes();
        }
    }
}

/// The unkept spans of a store's disks.
pub(crate) struct SharedHeldSpans(Mutex<HeldSpans>);

impl Default for SharedHeldSpans {
    fn default() -> Self {
        Self(Mutex::new(HeldSpans {
            spans: LruCache::unbounded(),
            bytes: 0,
            failing: HashSet::new(),
        }))
    }
}

impl SharedHeldSpans {
    pub(super) fn lock(&self) -> MutexGuard<'_, HeldSpans> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeldSpans {
    /// The span of a disk that was used last.
    pub(super) fn last_of(&self, disk: DiskKey) -> Option<SpanId> {
        let mut keys = self.spans.iter().map(|(key, _)| *key);
        keys.find_map(|(of, span)| (of == disk).then_some(span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = MAX_BYTES / 4;

    fn key(span: u32) -> (DiskKey, SpanId) {
        (7, SpanId(span))
    }

    #[test]
    fn the_memory_has_a_bound_and_what_was_used_last_stays() {
        let unkept = SharedHeldSpans::default();
        let mut held = unkept.lock();
        let bytes = Bytes::from(vec![0; BLOCK * 5]);
        let span = |blocks: usize| HeldSpan {
            compressed: bytes.slice(..BLOCK / 2),
            joint: None,
            start: LayerOffset(0),
            decoded: bytes.slice(..BLOCK * blocks - BLOCK / 2),
        };
        for number in 0..4 {
            held.insert(key(number), span(1));
        }
        assert_eq!((held.spans.len(), held.bytes), (4, MAX_BYTES));
        // one that comes again is there once
        held.insert(key(1), span(1));
        assert_eq!((held.spans.len(), held.bytes), (4, MAX_BYTES));
        held.spans.get(&key(0)).unwrap();
        held.insert(key(4), span(1));
        let there = |held: &HeldSpans| (0..6).map(|span| held.spans.contains(&key(span))).collect();
        let kept: Vec<bool> = there(&held);
        assert_eq!(kept, [true, true, false, true, true, false]);
        held.remove(key(0));
        held.remove(key(0));
        assert_eq!(held.bytes, BLOCK * 3);
        // the newest is there whatever it has
        held.insert(key(5), span(5));
        let kept: Vec<bool> = there(&held);
        assert_eq!(kept, [false, false, false, false, false, true]);
        assert_eq!(held.bytes, BLOCK * 5);
    }
}
