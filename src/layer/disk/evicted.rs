//! Eviction of spans of an open disk, and its size on the local file system.
//!
//! The order protects readers and a power cut: the bits of the spans are cleared, their records are absent and synced, the number of
//! evictions changes, and only then the bytes are removed. A reader that has seen the bits before compares the number after its read
//! ([`crate::layer::read::reader`]). A sync cannot run meanwhile: it could write a record of a span that is fetched again, whose new bytes it
//! has not synced.

use std::{
    io,
    ops::Range,
    sync::{Arc, Weak},
};

use rustix::{fs::FallocateFlags, io::Errno};

use super::{Disk, sync::Synced as _};
use crate::{
    error::report,
    ext4::BLOCK_SIZE,
    layer::{
        space::{
            evict::Evictable,
            measure::{allocated_but, allocated_file, allocated_open},
        },
        stored::directory::{DISK, REST, WINDOWS},
    },
    units::SpanId,
};

/// The file of a disk is read without regard to evictions, for example by a loop device: nothing is evicted as long as this exists.
pub struct SpanHold {
    disk: Arc<Disk>,
    counted: u64,
}

impl Drop for SpanHold {
    fn drop(&mut self) {
        *self.disk.reader.uses().holds() -= 1;
        self.disk.services.space().budget().end_hold(self.counted);
    }
}

impl Disk {
    /// Keeps all spans from now on. It waits for an eviction that has begun.
    pub fn hold_spans(self: &Arc<Self>) -> SpanHold {
        self.held(&mut self.reader.uses().holds(), 0)
    }

    /// As [`Self::hold_spans`], for a loop device on the disk. `None`: the disk is not complete, or such disks have half of the disk limit
    /// already.
    pub fn hold_for_loop(self: &Arc<Self>) -> Option<SpanHold> {
        self.store_complete();
        let mut holds = self.reader.uses().holds();
        let bytes = allocated_open(self.file()).unwrap_or_default();
        let is_allowed =
            self.is_stored_complete() && self.services.space().budget().may_hold(bytes);
        is_allowed.then(|| self.held(&mut holds, bytes))
    }

    /// Syncs a complete disk whose state does not say so yet: the next daemon must know that there may be a loop device on it.
    fn store_complete(&self) {
        if self.is_complete() && !self.is_stored_complete() {
            self.sync_or_warn();
        }
    }

    fn is_stored_complete(&self) -> bool {
        self.is_complete() && self.record.lock_state().complete
    }

    /// As [`Self::hold_for_loop`], whatever other disks have. `None`: the disk is not complete.
    pub fn hold_complete(self: &Arc<Self>) -> Option<SpanHold> {
        self.store_complete();
        let mut holds = self.reader.uses().holds();
        let is_complete = self.is_stored_complete();
        is_complete.then(|| self.held_in_use(&mut holds))
    }

    /// As [`Self::hold_spans`], for a loop device that exists.
    pub fn hold_in_use(self: &Arc<Self>) -> SpanHold {
        self.held_in_use(&mut self.reader.uses().holds())
    }

    fn held_in_use(self: &Arc<Self>, holds: &mut u32) -> SpanHold {
        let bytes = allocated_open(self.file()).unwrap_or_default();
        self.services.space().budget().hold(bytes);
        self.held(holds, bytes)
    }

    fn held(self: &Arc<Self>, holds: &mut u32, counted: u64) -> SpanHold {
        *holds += 1;
        SpanHold {
            disk: Arc::clone(self),
            counted,
        }
    }

    /// Counts the bytes that the disk has on the local file system now.
    pub(in crate::layer) fn measure(&self) {
        let budget = self.services.space().budget();
        if !budget.is_on() || !self.has_its_directory() {
            return;
        }
        let directory = self.record.directory().path();
        let fixed = self
            .fixed_bytes
            .get_or_init(|| allocated_but(directory, &[DISK, WINDOWS, REST]));
        let bytes = fixed.saturating_add(self.changing_bytes());
        budget.set((self.layer().digest, *self.table()), bytes);
    }

    /// Bytes of the files whose sizes change.
    pub(super) fn changing_bytes(&self) -> u64 {
        let directory = self.record.directory().path();
        let small = [WINDOWS, REST].map(|name| allocated_file(&directory.join(name)));
        let disk = allocated_open(self.file()).unwrap_or_default();
        small.iter().sum::<u64>().saturating_add(disk)
    }

    /// The blocks of the disk that have only data of adjacent spans; `None`: there are none.
    fn own_blocks(&self, spans: &Range<u32>) -> Option<Range<u64>> {
        let layout = self.layout();
        let last = SpanId(spans.end.checked_sub(1)?);
        let layer = layout.spans().uncompressed(SpanId(spans.start)).start
            ..layout.spans().uncompressed(last).end;
        let mut regions = layout.regions().in_layer(&layer);
        let first = regions.next()?;
        let last = regions.last().unwrap_or_else(|| first.clone());
        let start = first.clip_layer(&layer)?.disk.start.get();
        let end = last.clip_layer(&layer)?.disk.end;
        let end = match end == last.disk.end {
            true => end.get().next_multiple_of(BLOCK_SIZE), // the rest of the block is zero
            false => end.get() - end.get() % BLOCK_SIZE,
        };
        let start = start.next_multiple_of(BLOCK_SIZE);
        (start < end).then_some(start..end)
    }

    /// Removes the bytes of absent spans, which ascend.
    fn punch(&self, spans: &[SpanId]) -> Result<(), Errno> {
        let runs = spans.chunk_by(|one, other| one.get() + 1 == other.get());
        for run in runs {
            let run = run[0].get()..run[run.len() - 1].get() + 1; // no run is empty
            let Some(blocks) = self.own_blocks(&run) else {
                continue;
            };
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let length = blocks.end - blocks.start;
            rustix::fs::fallocate(self.file(), mode, blocks.start, length).inspect_err(
                |error| {
                    tracing::warn!(
                        "{}: the bytes of absent spans cannot be removed: {}",
                        self.path().display(),
                        report(error)
                    );
                },
            )?;
        }
        Ok(())
    }

    /// Removes the bytes of spans that count as absent: a killed daemon has written them, and not their records. They would take room of the
    /// disk limit, and could not be evicted. A complete disk, which may have a loop device, is left alone.
    pub(super) fn remove_absent(&self) {
        let is_limited = self.services.space().budget().is_on();
        if !is_limited || self.record.lock_state().complete {
            return;
        }
        let all = (0..self.layout().spans().count()).map(SpanId);
        let absent: Vec<_> = all.filter(|span| !self.reader.has(*span)).collect();
        let _ = self.punch(&absent); // logged
    }

    pub(super) fn as_evictable(self: &Arc<Self>) -> Weak<dyn Evictable> {
        let disk: Weak<Self> = Arc::downgrade(self);
        disk
    }
}

impl Evictable for Disk {
    fn candidates(&self, now: u32, found: &mut dyn FnMut(u32, SpanId, u64)) {
        let uses = self.reader.uses();
        if *uses.holds() > 0 {
            return;
        }
        for span in (0..self.layout().spans().count()).map(SpanId) {
            if self.reader.has(span)
                && let Some(age) = uses.age(span, now)
            {
                let bytes = self.layout().spans().uncompressed(span);
                found(age, span, bytes.end.get() - bytes.start.get());
            }
        }
    }

    fn evict(&self, spans: &[SpanId], wait: bool) -> io::Result<u64> {
        let uses = self.reader.uses();
        let mut holds = uses.holds();
        if *holds > 0 {
            return Ok(0);
        }
        let Some(mut state) = (match wait {
            true => Some(self.record.lock_state()),
            false => self.record.try_lock_state(),
        }) else {
            return Ok(0);
        };
        let now = self.services.space().budget().now();
        let mut evicted = Vec::new();
        for span in spans.iter().copied() {
            if !self.reader.has(span) || uses.age(span, now).is_none() {
                continue;
            }
            match self.own_blocks(&(span.get()..span.get() + 1)) {
                Some(_) => evicted.push(span),
                // it has no block of its own: from now on it is no candidate
                None => uses.wait(&[span]),
            }
        }
        if evicted.is_empty() {
            return Ok(0);
        }
        if state.complete {
            let mut next = state.clone();
            next.complete = false;
            let replaced = self.record.replace_state(&mut state, next);
            replaced.map_err(|error| io::Error::other(error.report()))?;
        }
        let was_full = self.is_full();
        self.reader.presence().revoke(&evicted)?;
        uses.evict();
        if was_full {
            self.ahead.fill().lost();
        }
        let before = allocated_open(self.file())?;
        if self.punch(&evicted) == Err(Errno::OPNOTSUPP) {
            *holds += 1; // for ever
        }
        drop(state);
        self.measure();
        Ok(before.saturating_sub(allocated_open(self.file())?))
    }
}
