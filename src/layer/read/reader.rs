//! The reading side of a disk: its layout, its file, which spans are here, and which are in flight.
//!
//! A span is *here* when a reader can have it: from the file, where it is present, or from memory, where the local disk did not accept it
//! ([`super::held_spans`]).

use std::{
    io,
    ops::Range,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    held_spans::HeldSpan,
    in_flight::{Deadline, FetchClaim, InFlight, Purpose, Waiter},
    span_windows::WindowStore,
    windows::CompactWindows,
};
use crate::{
    layer::{
        ahead::sequential,
        services::Services,
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
            layout,
            file,
            presence,
            windows,
            in_flight: Arc::default(),
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

    /// The fetches in flight.
    pub(crate) fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }

    /// How long a read goes on trying when the sources do not answer; `None`: without a limit.
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

/// Which spans are here.
impl SpanReader {
    /// Whether a span is present: in the file.
    pub(crate) fn has(&self, span: SpanId) -> bool {
        self.presence.bitmap().get(span)
    }

    /// Whether every span is present.
    pub(crate) fn is_full(&self) -> bool {
        self.presence.bitmap().is_full()
    }

    /// Whether a span is here: present, or in memory.
    pub(crate) fn is_here(&self, span: SpanId) -> bool {
        let key = (self.key(), span);
        // `has` again at the end: a span leaves the memory after it was written to the file
        self.has(span) || self.services.held_spans().lock().spans.contains(&key) || self.has(span)
    }

    /// Whether a read of this range needs no fetch. Cheap: no lock where the spans are present, no system call.
    pub(crate) fn is_present(&self, range: &Range<DiskOffset>) -> bool {
        self.is_full() || self.missing(range).is_none()
    }

    /// The first span that a read of this range has to wait for.
    pub(crate) fn missing(&self, range: &Range<DiskOffset>) -> Option<SpanId> {
        self.layout
            .spans_under(range)
            .find(|span| !self.is_here(*span))
    }

    /// Whether the local disk does not accept spans at the moment.
    pub(crate) fn fails_to_keep(&self) -> bool {
        self.services
            .held_spans()
            .lock()
            .failing
            .contains(&self.key())
    }
}

/// Reads of ranges that are here.
impl SpanReader {
    /// Reads a range, without leaving it in the page cache where the kernel can do that. An error of kind `Interrupted`: a span that was in
    /// memory is not here any more.
    pub(crate) fn read(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        let held = self.held(&range)?;
        self.file.read(offset.get(), buffer)?;
        self.lay_over(&held, &range, buffer);
        Ok(())
    }

    /// As [`Self::read`] if the read need not wait for the local disk. Else false: nothing was read, but the kernel has begun to, so that
    /// the waits of several reads overlap.
    pub(crate) fn try_read(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        let held = self.held(&range)?;
        let Some(done) = self.file.try_read(offset.get(), buffer) else {
            return Ok(false);
        };
        self.file.finish(offset.get(), buffer, done)?;
        self.lay_over(&held, &range, buffer);
        Ok(true)
    }

    /// Moves a range into a pipe, as references to the page cache. False where that cannot be done: a file system without splice, and spans
    /// that are in memory only.
    pub(crate) fn splice(
        &self,
        range: &Range<DiskOffset>,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        if !self.held(range)?.is_empty() {
            return Ok(false);
        }
        let length = range.end.get().saturating_sub(range.start.get());
        self.file.splice(range.start.get(), length, pipe)
    }

    /// The spans of a range that are in memory only.
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
                    let why = format!("span {span} is not here any more");
                    return Err(io::Error::new(io::ErrorKind::Interrupted, why));
                }
            }
        }
        Ok(all)
    }

    /// Copies the bytes of spans in memory over what was read of the file at `range`.
    fn lay_over(&self, spans: &[HeldSpan], range: &Range<DiskOffset>, buffer: &mut [u8]) {
        for span in spans {
            let end = LayerOffset(span.start.get().saturating_add(span.decoded.len() as u64));
            let layer = span.start..end;
            let parts = self
                .layout
                .regions()
                .in_layer(&layer)
                .filter_map(|region| region.clip_layer(&layer)?.clip_disk(range));
            for part in parts {
                // inside both, as the part is clipped to them
                let from = (part.layer.start.get() - span.start.get()) as usize;
                let to = (part.disk.start.get() - range.start.get()) as usize;
                let length = part.length() as usize;
                buffer[to..to + length].copy_from_slice(&span.decoded[from..from + length]);
            }
        }
    }
}

/// Spans in memory.
impl SpanReader {
    /// Holds a span in memory that the local disk did not accept. Returns whether the local disk did accept the spans before.
    pub(super) fn hold(&self, span: SpanId, held: HeldSpan) -> bool {
        let mut unkept = self.services.held_spans().lock();
        unkept.insert((self.key(), span), held);
        unkept.failing.insert(self.key())
    }

    /// The span in memory that was used last. Where there is none the local disk accepts spans again, and `all_kept` is called.
    pub(super) fn next_held(&self, all_kept: impl FnOnce()) -> Option<(SpanId, HeldSpan)> {
        let mut unkept = self.services.held_spans().lock();
        let last = unkept.last_of(self.key()).and_then(|span| {
            let held = unkept.spans.peek(&(self.key(), span))?;
            Some((span, held.clone()))
        });
        if last.is_none() {
            unkept.failing.remove(&self.key());
            all_kept();
        }
        last
    }

    /// Removes spans from memory.
    pub(crate) fn drop_held(&self, spans: &[SpanId]) {
        let mut unkept = self.services.held_spans().lock();
        for span in spans {
            unkept.remove((self.key(), *span));
        }
    }
}

impl Drop for SpanReader {
    fn drop(&mut self) {
        let mut unkept = self.services.held_spans().lock();
        unkept.failing.remove(&self.key());
        while let Some(span) = unkept.last_of(self.key()) {
            unkept.remove((self.key(), span));
        }
    }
}

/// Claims of fetches.
impl SpanReader {
    /// Joins the fetches of the spans of a range that are in flight, and claims the others that are not here. The caller starts the claims'
    /// fetches.
    pub(super) fn claim_for_reader(
        &self,
        range: &Range<DiskOffset>,
        deadline: Deadline,
    ) -> (Vec<Waiter>, Vec<FetchClaim>) {
        let (waiters, mut claims) = self.in_flight.claim(
            self.layout.spans_under(range),
            |span| self.is_here(span),
            |run| self.layout.compressed_length(run) <= MAX_FETCH_BYTES,
            Purpose::Reader,
            deadline,
        );
        if let Some(claim) = claims.last_mut() {
            self.widen(claim);
        }
        (waiters, claims)
    }

    /// Claims those of adjacent spans that are neither here nor in flight, in runs of at most `most_bytes` compressed bytes, for no reader
    /// yet. None while the local disk does not accept spans.
    pub(crate) fn claim_ahead(
        &self,
        spans: Range<u32>,
        most_bytes: u64,
        deadline: Deadline,
    ) -> Vec<FetchClaim> {
        if self.fails_to_keep() {
            return Vec::new();
        }
        let (_, claims) = self.in_flight.claim(
            spans.map(SpanId),
            |span| self.is_here(span),
            |run| self.layout.compressed_length(run) <= most_bytes,
            Purpose::Later,
            deadline,
        );
        claims
    }

    /// Whether spans are so fine that a reader will want more than one.
    pub(crate) fn is_fine(&self) -> bool {
        self.compact_windows().is_some()
    }

    /// Adds to the claim of a miss the spans that its reader is likely to want next, where spans are fine.
    fn widen(&self, claim: &mut FetchClaim) {
        if !self.is_fine() || self.fails_to_keep() {
            return;
        }
        let around = sequential::around(
            &claim.spans(),
            self.layout.spans().count(),
            |span| self.is_here(SpanId(span)),
            |span| self.layout.compressed_span(span),
        );
        self.in_flight
            .extend(claim, around, |span| self.is_here(span));
    }

    /// The spans at the end of the file whose start was missed by a read of this range, where spans are fine.
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

    /// The first absent spans of `spans`, adjacent, as many as one GET of at most `most_bytes` compressed bytes fetches.
    pub(crate) fn next_absent(&self, spans: Range<u32>, most_bytes: u64) -> Option<Range<u32>> {
        let start = spans.clone().find(|span| !self.has(SpanId(*span)))?;
        let more = (start + 1..spans.end).take_while(|span| {
            !self.has(SpanId(*span))
                && self.layout.compressed_length(&(start..span + 1)) <= most_bytes
        });
        Some(start..more.last().unwrap_or(start) + 1)
    }
}
