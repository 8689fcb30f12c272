//! Verified spans that are held in memory because the local disk rejected them: it is full, or it fails.
//!
//! Readers get these spans from memory, so a failing disk does not cost more fetches than a working one. The memory is bounded: the least
//! recently used span is removed first, and is fetched again when it is needed. One task per disk retries to write its held spans, with a
//! pause between two attempts (`keep_later`). When the last one is written, the disk is healthy again. Until then only spans that a reader
//! waits for are fetched.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use lru::LruCache;

use super::span_window::SpanJoint;
use crate::{
    layer::types::DiskKey,
    units::{LayerOffset, SpanId},
};

/// Maximum size of all held spans of all disks. The newest span is held whatever its size.
const MAX_BYTES: usize = 64 << 20;

/// A verified span that is held in memory.
#[derive(Clone)]
pub(crate) struct HeldSpan {
    /// As it was fetched, to write it later.
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
    /// Disks with a task that retries to write their spans.
    pub(super) failing: HashSet<DiskKey>,
}

impl HeldSpans {
    /// Bytes of all held spans.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

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

/// The held spans of all disks of a store.
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
    pub(crate) fn lock(&self) -> MutexGuard<'_, HeldSpans> {
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
    fn memory_is_bounded_and_the_last_used_spans_stay() {
        let shared = SharedHeldSpans::default();
        let mut held = shared.lock();
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
        // a span that is inserted again is held once
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
        // the newest is held whatever its size
        held.insert(key(5), span(5));
        let kept: Vec<bool> = there(&held);
        assert_eq!(kept, [false, false, false, false, false, true]);
        assert_eq!(held.bytes, BLOCK * 5);
    }
}
