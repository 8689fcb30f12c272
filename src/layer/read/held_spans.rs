//! Spans that the local disk has not taken: it is full, or fails.
//!
//! Readers get them from memory, so that a disk that fails does not cost more fetches than one that works. The memory has a bound; the span
//! that was used least recently goes first, and is fetched again. One task a disk tries to keep its spans, with a pause between two
//! tries; when the last one is kept the disk is well again. As long as it is not, nothing is fetched that no reader waits for.

use std::{
    collections::HashSet,
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use lru::LruCache;

use super::{
    fetch,
    in_flight::{Effort, Purpose},
    place_span::Joint,
};
use crate::{
    error::Error,
    layer::{
        disk::{Disk, DiskKey},
        verify::span::Refutation,
    },
    units::{DiskOffset, LayerOffset, SpanId},
};

/// Bytes of all spans in memory, of all disks; the newest span is there whatever it has.
const MAX_BYTES: usize = 64 << 20;

/// The pause before the first try to keep spans; doubled after each that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);

/// A verified span in memory.
#[derive(Clone)]
pub(crate) struct HeldSpan {
    /// As it was fetched, to keep it later.
    pub compressed: Bytes,
    /// What it was decoded with.
    pub joint: Option<Joint>,
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

struct Held {
    spans: LruCache<(DiskKey, SpanId), HeldSpan>,
    bytes: usize,
    /// Disks with a task that tries to keep their spans.
    failing: HashSet<DiskKey>,
}

impl Held {
    fn insert(&mut self, key: (DiskKey, SpanId), span: HeldSpan) {
        self.remove(key);
        self.bytes += span.bytes();
        self.spans.put(key, span);
        while self.bytes > MAX_BYTES && self.spans.len() > 1 {
            if let Some((_, oldest)) = self.spans.pop_lru() {
                self.bytes -= oldest.bytes();
            }
        }
    }

    fn remove(&mut self, key: (DiskKey, SpanId)) {
        if let Some(span) = self.spans.pop(&key) {
            self.bytes -= span.bytes();
        }
    }
}

/// The unkept spans of a store's disks.
pub(crate) struct Unkept(Mutex<Held>);

impl Default for Unkept {
    fn default() -> Self {
        Self(Mutex::new(Held {
            spans: LruCache::unbounded(),
            bytes: 0,
            failing: HashSet::new(),
        }))
    }
}

impl Unkept {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// Whether a reader can have a span: from the local disk, or from memory.
    pub(crate) fn is_here(&self, span: SpanId) -> bool {
        let key = (self.key(), span);
        // again in the end: a span in memory goes after it has been kept
        self.has(span) || self.store().unkept().lock().spans.contains(&key) || self.has(span)
    }

    /// Whether the local disk does not take spans at the moment.
    pub(super) fn fails_to_keep(&self) -> bool {
        self.store().unkept().lock().failing.contains(&self.key())
    }

    /// The local disk has not taken a verified span: readers see it from now on, in memory. They do not when it was refuted meanwhile.
    pub(crate) fn hold(
        self: &Arc<Self>,
        span: SpanId,
        held: HeldSpan,
        error: Error,
    ) -> Result<(), Refutation> {
        let error = Arc::new(error);
        let mut is_first = false;
        let appear = || {
            let mut unkept = self.store().unkept().lock();
            unkept.insert((self.key(), span), held);
            is_first = unkept.failing.insert(self.key());
            self.health().not_kept(Some(&error));
        };
        if !self.disowned().unless(span, appear) {
            return Err(self.refutation(span).unwrap_or(Refutation::Window)); // there is one
        }
        if is_first {
            tracing::warn!(
                "{}; readers get it from memory, and it is tried again until the local disk takes it",
                error.report()
            );
            self.store().spawn(keep_again(Arc::downgrade(self)));
        }
        Ok(())
    }

    /// Takes spans out of the memory.
    pub(crate) fn drop_held(&self, spans: &[SpanId]) {
        let mut unkept = self.store().unkept().lock();
        spans
            .iter()
            .for_each(|span| unkept.remove((self.key(), *span)));
    }

    /// The disk goes.
    pub(crate) fn drop_all_held(&self) {
        let mut unkept = self.store().unkept().lock();
        unkept.failing.remove(&self.key());
        while let Some(span) = unkept.last_of(self.key()) {
            unkept.remove((self.key(), span));
        }
    }

    /// The spans of a range that are in memory only. An error of kind `Interrupted`: one that was there has gone.
    pub(crate) fn held(&self, range: &Range<DiskOffset>) -> io::Result<Vec<HeldSpan>> {
        if self.is_full() {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        for span in self.needed(range).filter(|span| !self.has(*span)) {
            let held = self
                .store()
                .unkept()
                .lock()
                .spans
                .get(&(self.key(), span))
                .cloned();
            match held {
                Some(held) => all.push(held),
                None if self.has(span) => {}
                None => {
                    let why = format!("span {span} is not here any more");
                    return Err(io::Error::new(io::ErrorKind::Interrupted, why));
                }
            }
        }
        Ok(all)
    }

    /// Lays spans over what was read of the disk at `range`.
    pub(crate) fn lay_over(
        &self,
        spans: &[HeldSpan],
        range: &Range<DiskOffset>,
        buffer: &mut [u8],
    ) {
        for span in spans {
            let end = LayerOffset(span.start.get().saturating_add(span.decoded.len() as u64));
            let layer = span.start..end;
            let parts = self
                .regions()
                .in_layer(&layer)
                .filter_map(|region| region.clip_layer(&layer)?.clip_disk(range));
            for part in parts {
                // inside both, for it is clipped to them
                let from = (part.layer.start.get() - span.start.get()) as usize;
                let to = (part.disk.start.get() - range.start.get()) as usize;
                let length = part.length() as usize;
                buffer[to..to + length].copy_from_slice(&span.decoded[from..from + length]);
            }
        }
    }

    /// Tries to keep the spans in memory. True when none is left: then the disk is well.
    async fn keep_held(self: &Arc<Self>) -> bool {
        loop {
            let (span, held) = {
                let mut unkept = self.store().unkept().lock();
                let last = unkept.last_of(self.key());
                let last = last.and_then(|span| {
                    let held = unkept.spans.peek(&(self.key(), span))?;
                    Some((span, held.clone()))
                });
                let Some(last) = last else {
                    unkept.failing.remove(&self.key());
                    self.health().not_kept(None);
                    return true;
                };
                last
            };
            if !self.has(span) {
                let effort = Effort::new(Purpose::Later, None);
                let (_, placed) =
                    fetch::decode(self, &effort, span, held.compressed, held.joint).await;
                if placed.is_ok() && !self.has(span) {
                    return false; // and is in memory again
                }
            }
            self.drop_held(&[span]);
        }
    }
}

impl Held {
    /// The span of a disk that was used last.
    fn last_of(&self, disk: DiskKey) -> Option<SpanId> {
        let mut keys = self.spans.iter().map(|(key, _)| *key);
        keys.find_map(|(of, span)| (of == disk).then_some(span))
    }
}

async fn keep_again(disk: Weak<Disk>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Some(disk) = disk.upgrade() else {
            return;
        };
        if disk.keep_held().await {
            tracing::info!(layer = %disk.layer().digest, "the local disk takes the layer's spans again");
            return;
        }
        pause = (pause * 2).min(LAST_PAUSE);
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
        let unkept = Unkept::default();
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
        let there = |held: &Held| (0..6).map(|span| held.spans.contains(&key(span))).collect();
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
