//! The reading side of a disk: its layout, its file, which spans are readable, and which are in flight.
//!
//! A span is *readable* when it is present in the file, or when it is held in memory because the local disk did not accept it
//! ([`super::held_spans`]).

use std::{
    io,
    ops::Range,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    compact_windows::CompactWindows,
    held_spans::HeldSpan,
    in_flight::{Deadline, FetchClaim, InFlight, Purpose, Waiter},
    window_store::WindowStore,
};
use crate::{
    layer::{
        ahead::sequential,
        services::Services,
        space::span_uses::SpanUses,
        stored::{disk_layout::DiskLayout, presence::Presence, uncached_file::UncachedFile},
        types::DiskKey,
    },
    units::{DiskOffset, LayerOffset, SpanId},
};

/// Maximum length of a GET that a reader waits for, in compressed bytes, unless a single span is longer.
const MAX_FETCH_BYTES: u64 = 8 << 20;

/// The reading side of one disk.
pub(crate) struct SpanReader {
    services: Arc<Services>,
    layout: DiskLayout,
    /// `disk.ext4`.
    file: UncachedFile,
    presence: Presence,
    windows: WindowStore,
    in_flight: Arc<InFlight>,
    uses: SpanUses,
    /// The last sync of spans has failed.
    sync_fails: AtomicBool,
    /// `u64::MAX`: no limit.
    io_timeout_ms: AtomicU64,
}

impl SpanReader {
    pub(crate) fn new(
        services: Arc<Services>,
        layout: DiskLayout,
        file: UncachedFile,
        presence: Presence,
        windows: WindowStore,
    ) -> Self {
        Self {
            services,
            uses: SpanUses::new(layout.spans().count()),
            layout,
            file,
            presence,
            windows,
            in_flight: Arc::default(),
            sync_fails: AtomicBool::new(false),
            io_timeout_ms: AtomicU64::new(u64::MAX),
        }
    }

    /// Identifies the disk among all that are open at the same time.
    pub(crate) fn key(&self) -> DiskKey {
        std::ptr::from_ref(self).addr()
    }

    pub(crate) fn layout(&self) -> &DiskLayout {
        &self.layout
    }

    pub(crate) fn file(&self) -> &UncachedFile {
        &self.file
    }

    pub(crate) fn presence(&self) -> &Presence {
        &self.presence
    }

    pub(crate) fn windows(&self) -> &WindowStore {
        &self.windows
    }

    /// The windows of the compact index that the disk was laid out from, if it was laid out from one.
    pub(crate) fn compact_windows(&self) -> Option<&CompactWindows> {
        self.windows.compact()
    }

    /// When spans were used, and their evictions.
    pub(crate) fn uses(&self) -> &SpanUses {
        &self.uses
    }

    /// The fetches in flight.
    pub(crate) fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }

    /// How long a read retries while the sources do not answer; `None`: without a limit.
    pub(crate) fn io_timeout(&self) -> Option<Duration> {
        match self.io_timeout_ms.load(Ordering::Relaxed) {
            u64::MAX => None,
            millis => Some(Duration::from_millis(millis)),
        }
    }

    pub(crate) fn set_io_timeout(&self, timeout: Option<Duration>) {
        let millis = timeout.map_or(u128::MAX, |timeout| timeout.as_millis());
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.io_timeout_ms.store(millis, Ordering::Relaxed);
    }
}

/// Which spans are readable.
impl SpanReader {
    /// Whether a span is present in the file.
    pub(crate) fn has(&self, span: SpanId) -> bool {
        self.presence.bitmap().get(span)
    }

    /// Whether every span is present.
    pub(crate) fn is_full(&self) -> bool {
        self.presence.bitmap().is_full()
    }

    /// Whether a span is readable: present in the file, or held in memory.
    pub(crate) fn is_readable(&self, span: SpanId) -> bool {
        let key = (self.key(), span);
        // `has` again at the end: a held span is removed after it was written to the file
        self.has(span) || self.services.held_spans().lock().spans.contains(&key) || self.has(span)
    }

    /// Whether a read of this range needs no fetch. Cheap: no lock where the spans are present, no system call.
    pub(crate) fn is_present(&self, range: &Range<DiskOffset>) -> bool {
        self.is_full() || self.missing(range).is_none()
    }

    /// The first span of this range that is not readable.
    pub(crate) fn missing(&self, range: &Range<DiskOffset>) -> Option<SpanId> {
        self.layout
            .spans_under(range)
            .find(|span| !self.is_readable(*span))
    }

    /// Whether the local disk rejects spans at the moment, or loses them. Then only spans that a reader waits for are fetched: the others
    /// would be fetched again and again.
    pub(crate) fn local_disk_rejects(&self) -> bool {
        let held = || self.services.held_spans().lock();
        self.sync_fails() || held().failing.contains(&self.key())
    }

    /// Whether the last sync of spans has failed.
    pub(crate) fn sync_fails(&self) -> bool {
        self.sync_fails.load(Ordering::Relaxed)
    }

    /// A sync has failed, or has synced data again.
    pub(crate) fn set_sync_fails(&self, fails: bool) {
        self.sync_fails.store(fails, Ordering::Relaxed);
    }
}

/// Reads of ranges whose spans are readable.
impl SpanReader {
    /// Reads a range, without leaving it in the page cache where the kernel can do that. An error of kind `Interrupted`: a held span was
    /// removed from memory meanwhile.
    pub(crate) fn read(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        loop {
            let evictions = self.uses.evictions();
            let held = self.held(&range)?;
            self.file.read(offset.get(), buffer)?;
            if self.uses.evictions() == evictions {
                self.copy_held(&held, &range, buffer);
                return Ok(());
            }
        }
    }

    /// As [`Self::read`], if the read need not wait for the local disk. Else it returns false: nothing was read, but the kernel has started
    /// to read, so that the waits of several reads overlap.
    pub(crate) fn try_read(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        let evictions = self.uses.evictions();
        let held = self.held(&range)?;
        let Some(done) = self.file.try_read(offset.get(), buffer) else {
            return Ok(false);
        };
        self.file.finish(offset.get(), buffer, done)?;
        if self.uses.evictions() != evictions {
            self.read(offset, buffer)?;
            return Ok(true);
        }
        self.copy_held(&held, &range, buffer);
        Ok(true)
    }

    /// Moves a range into a pipe, as references to the page cache. Returns false if that is not possible: on a file system without splice,
    /// if a span of the range is held in memory, or if spans can be evicted.
    pub(crate) fn splice(
        &self,
        range: &Range<DiskOffset>,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        // the pages of evicted spans become zero, also in the pipe
        if self.evicts() || !self.held(range)?.is_empty() {
            return Ok(false);
        }
        let length = range.end.get().saturating_sub(range.start.get());
        self.file.splice(range.start.get(), length, pipe)
    }

    /// The spans of a range that are in memory only, and not in the file.
    fn held(&self, range: &Range<DiskOffset>) -> io::Result<Vec<HeldSpan>> {
        if self.is_full() {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        let absent = self
            .layout
            .spans_under(range)
            .filter(|span| !self.has(*span));
        for span in absent {
            let key = (self.key(), span);
            let held = self.services.held_spans().lock().spans.get(&key).cloned();
            match held {
                Some(held) => all.push(held),
                None if self.has(span) => {}
                None => {
                    let why = format!("span {span} was removed from memory");
                    return Err(io::Error::new(io::ErrorKind::Interrupted, why));
                }
            }
        }
        Ok(all)
    }

    /// Copies the bytes of held spans over the bytes that were read from the file at `range`.
    fn copy_held(&self, spans: &[HeldSpan], range: &Range<DiskOffset>, buffer: &mut [u8]) {
        for span in spans {
            let end = LayerOffset(span.start.get().saturating_add(span.decoded.len() as u64));
            let layer = span.start..end;
            let parts = self
                .layout
                .regions()
                .in_layer(&layer)
                .filter_map(|region| region.clip_layer(&layer)?.clip_disk(range));
            for part in parts {
                // inside both: the part is clipped to them
                let from = (part.layer.start.get() - span.start.get()) as usize;
                let to = (part.disk.start.get() - range.start.get()) as usize;
                let length = part.length() as usize;
                buffer[to..to + length].copy_from_slice(&span.decoded[from..from + length]);
            }
        }
    }
}

/// Uses of spans, for evictions.
impl SpanReader {
    /// Whether spans can be evicted.
    fn evicts(&self) -> bool {
        self.services.space().budget().is_on()
    }

    /// A range is read.
    pub(crate) fn used(&self, range: &Range<DiskOffset>) {
        if self.evicts() {
            let now = self.services.space().budget().now();
            self.layout
                .spans_under(range)
                .for_each(|span| self.uses.used(span, now));
        }
    }

    /// A span was written.
    pub(crate) fn was_written(&self, span: SpanId) {
        self.uses.used(span, self.services.space().budget().tick());
    }

    /// A reader waits for a range until the result is dropped, and reads it then.
    pub(super) fn wait_for(&self, range: &Range<DiskOffset>) -> AwaitedRange<'_> {
        let spans: Vec<SpanId> = match self.evicts() {
            true => self.layout.spans_under(range).collect(),
            false => Vec::new(),
        };
        self.uses.wait(&spans);
        AwaitedRange {
            reader: self,
            spans,
        }
    }
}

/// Spans that a reader waits for: they are not evicted.
pub(super) struct AwaitedRange<'a> {
    reader: &'a SpanReader,
    spans: Vec<SpanId>,
}

impl Drop for AwaitedRange<'_> {
    fn drop(&mut self) {
        let now = self.reader.services.space().budget().now();
        self.reader.uses.end_wait(&self.spans, now);
    }
}

/// Held spans.
impl SpanReader {
    /// Holds a span in memory that the local disk did not accept. Returns whether the local disk did accept the spans before.
    pub(super) fn hold(&self, span: SpanId, held: HeldSpan) -> bool {
        let mut held_spans = self.services.held_spans().lock();
        held_spans.insert((self.key(), span), held);
        held_spans.failing.insert(self.key())
    }

    /// The held span that was used last. If no span is held, the local disk accepts spans again, and `all_written` is called.
    pub(super) fn next_held(&self, all_written: impl FnOnce()) -> Option<(SpanId, HeldSpan)> {
        let mut held_spans = self.services.held_spans().lock();
        let last = held_spans.last_of(self.key()).and_then(|span| {
            let held = held_spans.spans.peek(&(self.key(), span))?;
            Some((span, held.clone()))
        });
        if last.is_none() {
            held_spans.failing.remove(&self.key());
            all_written();
        }
        last
    }

    /// Removes held spans from memory.
    pub(crate) fn drop_held(&self, spans: &[SpanId]) {
        let mut held_spans = self.services.held_spans().lock();
        for span in spans {
            held_spans.remove((self.key(), *span));
        }
    }
}

impl Drop for SpanReader {
    fn drop(&mut self) {
        let mut held_spans = self.services.held_spans().lock();
        held_spans.failing.remove(&self.key());
        while let Some(span) = held_spans.last_of(self.key()) {
            held_spans.remove((self.key(), span));
        }
    }
}

/// Claims of fetches.
impl SpanReader {
    /// Joins the in-flight fetches of a range, and claims its other spans that are not readable. The caller starts the fetches of the
    /// claims.
    pub(super) fn claim_for_reader(
        &self,
        range: &Range<DiskOffset>,
        deadline: Deadline,
    ) -> (Vec<Waiter>, Vec<FetchClaim>) {
        let (waiters, mut claims) = self.in_flight.claim(
            self.layout.spans_under(range),
            |span| self.is_readable(span),
            |run| self.layout.compressed_length(run) <= MAX_FETCH_BYTES,
            Purpose::Reader,
            deadline,
        );
        if let Some(claim) = claims.last_mut() {
            self.widen(claim);
        }
        (waiters, claims)
    }

    /// Claims those of adjacent spans that are neither readable nor in flight, in runs of at most `most_bytes` compressed bytes. No reader
    /// waits for them yet. It claims none while the local disk rejects spans.
    pub(crate) fn claim_ahead(
        &self,
        spans: Range<u32>,
        most_bytes: u64,
        deadline: Deadline,
    ) -> Vec<FetchClaim> {
        if self.local_disk_rejects() {
            return Vec::new();
        }
        let (_, claims) = self.in_flight.claim(
            spans.map(SpanId),
            |span| self.is_readable(span),
            |run| self.layout.compressed_length(run) <= most_bytes,
            Purpose::Ahead,
            deadline,
        );
        claims
    }

    /// Whether spans are so short that most reads need more than one: those of a compact index.
    pub(crate) fn is_fine(&self) -> bool {
        self.compact_windows().is_some()
    }

    /// If spans are fine, adds the spans that the reader probably needs next to the claim of a miss.
    fn widen(&self, claim: &mut FetchClaim) {
        if !self.is_fine() || self.local_disk_rejects() {
            return;
        }
        let around = sequential::around(
            &claim.spans(),
            self.layout.spans().count(),
            |span| self.is_readable(SpanId(span)),
            |span| self.layout.compressed_span(span),
        );
        self.in_flight
            .extend(claim, around, |span| self.is_readable(span));
    }

    /// If spans are fine, the spans at the end of the file that this range ends in, after a read of the range has missed `missed`.
    pub(super) fn file_end(
        &self,
        range: &Range<DiskOffset>,
        missed: &Range<u32>,
    ) -> Option<Range<u32>> {
        if !self.is_fine() {
            return None;
        }
        let file = self.layout.regions().in_disk(range).last()?;
        let spans = self.layout.spans().covering(file.layer);
        let length = |span| self.layout.compressed_span(span);
        Some(sequential::file_end(missed, &spans, length))
    }

    /// The first run of adjacent absent spans in `spans` that one GET of at most `most_bytes` compressed bytes fetches.
    pub(crate) fn next_absent(&self, spans: Range<u32>, most_bytes: u64) -> Option<Range<u32>> {
        let start = spans.clone().find(|span| !self.has(SpanId(*span)))?;
        let more = (start + 1..spans.end).take_while(|span| {
            !self.has(SpanId(*span))
                && self.layout.compressed_length(&(start..span + 1)) <= most_bytes
        });
        Some(start..more.last().unwrap_or(start) + 1)
    }
}
