//! A disk's access to its spans in memory ([`super::held_spans`]).

use std::{io, ops::Range, sync::Arc};

use super::held_spans::HeldSpan;
use crate::{
    error::Error,
    layer::{disk::Disk, verify::lies::Refutation},
    units::{DiskOffset, LayerOffset, SpanId},
};

impl Disk {
    /// Whether a reader can have a span: from the local disk, or from memory.
    pub(crate) fn is_here(&self, span: SpanId) -> bool {
        let key = (self.key(), span);
        // again in the end: a span in memory goes after it has been kept
        self.has(span) || self.services().unkept().lock().spans.contains(&key) || self.has(span)
    }

    /// Whether the local disk does not take spans at the moment.
    pub(super) fn fails_to_keep(&self) -> bool {
        self.services()
            .unkept()
            .lock()
            .failing
            .contains(&self.key())
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
            let mut unkept = self.services().unkept().lock();
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
            self.keep_later();
        }
        Ok(())
    }

    /// The span in memory that was used last. Where there is none the disk is well.
    pub(super) fn next_held(&self) -> Option<(SpanId, HeldSpan)> {
        let mut unkept = self.services().unkept().lock();
        let last = unkept.last_of(self.key()).and_then(|span| {
            let held = unkept.spans.peek(&(self.key(), span))?;
            Some((span, held.clone()))
        });
        if last.is_none() {
            unkept.failing.remove(&self.key());
            self.health().not_kept(None);
        }
        last
    }

    /// Takes spans out of the memory.
    pub(crate) fn drop_held(&self, spans: &[SpanId]) {
        let mut unkept = self.services().unkept().lock();
        spans
            .iter()
            .for_each(|span| unkept.remove((self.key(), *span)));
    }

    /// The disk goes.
    pub(crate) fn drop_all_held(&self) {
        let mut unkept = self.services().unkept().lock();
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
                .services()
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
}
