//! Makes ranges present: finds their spans, joins or starts fetches, and starts read-ahead.

use std::{ops::Range, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    fetch,
    in_flight::{self, Claim, Deadline, Purpose, Waiter},
};
use crate::{
    error::{Error, Result},
    layer::{
        ahead::{fill, on_the_way::OnTheWay, recording::Touch, sequential},
        disk::{Disk, first_and_last},
    },
    units::{DiskOffset, SpanId},
};

/// Compressed bytes that one GET asks for at most, unless a single span has more.
const MAX_FETCH_BYTES: u64 = 8 << 20;

/// The same when nobody waits yet: smaller, so that several run side by side.
const MAX_AHEAD_BYTES: u64 = 2 << 20;

/// How long a fetch goes on that nobody waits for.
const AHEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What has come of a reader's asking.
#[derive(PartialEq, Eq)]
enum Tried {
    Present,
    Again,
}

impl Disk {
    /// Whether a read of this range needs no fetch. Cheap: no lock where it is on the local disk, no system call.
    pub fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.bitmap().is_full() || self.needed(&range).all(|span| self.is_here(span))
    }

    /// Makes a range present: one fetch a span however many wait, adjacent missing spans in one GET. Goes on trying for the disk's
    /// [`Self::set_io_timeout`].
    pub async fn make_present(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
    ) -> Result<(), Arc<Error>> {
        self.make_present_within(range, self.io_timeout()).await
    }

    /// As [`Self::make_present`], with a time of its own; `None`: for ever. When it has passed the error is that of the last try, and
    /// the next call tries anew.
    pub async fn make_present_within(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
        timeout: Option<Duration>,
    ) -> Result<(), Arc<Error>> {
        // in the order in which they are asked for, not that in which they come
        self.record(&range);
        if self.is_present(range.clone()) {
            return Ok(());
        }
        self.services().enter();
        let came = Instant::now();
        let deadline = in_flight::deadline(timeout);
        let _waiting = self.services().traffic().wait();
        while self.tried(&range, came, deadline).await? == Tried::Again {}
        let now = Instant::now().into_std();
        self.whole()
            .measured(|cost| cost.waited(came.into_std(), now));
        Ok(())
    }

    /// Joins the fetches of what is missing, starts those that are not on their way, and waits for them. The error of a fetch that had
    /// begun before the reader `came` is not for this reader, while its time is not over: what the fetch has met may be over too. It
    /// is tried again then, and in the end by a fetch that has begun since.
    async fn tried(
        self: &Arc<Self>,
        range: &Range<DiskOffset>,
        came: Instant,
        deadline: Deadline,
    ) -> Result<Tried, Arc<Error>> {
        for waiter in self.ask_for(range, deadline) {
            let is_older = waiter.began_before(came);
            let late = || fetch::unanswered(self, range);
            let outcome = waiter.wait(deadline, late).await;
            if outcome.is_err() && is_older && !in_flight::is_over(deadline) {
                return Ok(Tried::Again);
            }
            outcome?;
        }
        Ok(Tried::Present)
    }

    /// Joins and starts fetches for a reader, and what is fetched besides.
    fn ask_for(self: &Arc<Self>, range: &Range<DiskOffset>, deadline: Deadline) -> Vec<Waiter> {
        let (waiters, mut claims) = self.flights().claim(
            self.needed(range),
            |span| self.is_here(span),
            |run| self.compressed_length(run) <= MAX_FETCH_BYTES,
            Purpose::Reader,
            deadline,
        );
        if let Some(claim) = claims.last_mut() {
            self.widen(claim);
        }
        let missed = claims.last().map(Claim::spans);
        let lengths = claims
            .iter()
            .map(|claim| self.compressed_length(&claim.spans()));
        let bytes = lengths.sum();
        self.start(claims);
        if let Some(missed) = &missed {
            self.fetch_file_end(range, missed);
        }
        let end = missed.map(|missed| SpanId(missed.end));
        self.read_ahead(range, end);
        if let Some(next) = end
            && !self.fails_to_keep()
            && self.whole().is_due_after_miss(bytes)
        {
            self.services()
                .spawn(fill::fetch_all(Arc::clone(self), next));
        }
        waiters
    }

    /// Notes the spans under a range, where that is wanted.
    pub(crate) fn record(&self, range: &Range<DiskOffset>) {
        if let Some(touches) = self.services().recording() {
            touches.note(self.needed(range).map(|span| Touch {
                layer: self.layer().digest,
                bytes: self.spans().uncompressed(span),
            }));
        }
    }

    /// The first span that a read of this range has to wait for.
    pub(super) fn missing(&self, range: &Range<DiskOffset>) -> Option<SpanId> {
        self.needed(range).find(|span| !self.is_here(*span))
    }

    /// The spans under a range of the disk, ascending, each once.
    pub(crate) fn needed(&self, range: &Range<DiskOffset>) -> impl Iterator<Item = SpanId> {
        let mut next = 0;
        self.regions()
            .in_disk(range)
            .filter_map(|region| region.clip_disk(range))
            .flat_map(move |part| {
                let spans = self.spans().covering(part.layer);
                let start = spans.start.max(next);
                next = next.max(spans.end);
                start..spans.end.max(start)
            })
            .map(SpanId)
    }

    /// Compressed bytes of adjacent spans.
    pub(crate) fn compressed_length(&self, run: &Range<u32>) -> u64 {
        let start = self.spans().compressed(SpanId(run.start)).start;
        let end = self.spans().compressed(SpanId(run.end - 1)).end; // never empty
        end.get() - start.get()
    }

    /// Whether its spans are so fine that a reader will want more than one.
    fn is_fine(&self) -> bool {
        self.windows().is_some()
    }

    /// Has the fetch of a miss bring what its reader is likely to want next, where spans are fine.
    fn widen(&self, claim: &mut Claim) {
        if !self.is_fine() || self.fails_to_keep() {
            return;
        }
        let around = sequential::around(
            &claim.spans(),
            self.spans().count(),
            |span| self.is_here(SpanId(span)),
            |span| self.compressed_length(&(span..span + 1)),
        );
        self.flights()
            .extend(claim, around, |span| self.is_here(span));
    }

    /// Fetches the end of the file whose start was missed by a read of this range, where spans are fine.
    fn fetch_file_end(self: &Arc<Self>, range: &Range<DiskOffset>, missed: &Range<u32>) {
        if !self.is_fine() {
            return;
        }
        let Some(file) = self.regions().in_disk(range).last() else {
            return;
        };
        let end = sequential::file_end(missed, &self.spans().covering(file.layer), |span| {
            self.compressed_length(&(span..span + 1))
        });
        let deadline = in_flight::deadline(Some(AHEAD_TIMEOUT));
        self.start(self.claim(end, MAX_AHEAD_BYTES, deadline));
    }

    /// Takes note of an access, and starts the fetch of what its reader will want next. `fetched` is where the fetch ends that the access
    /// has begun.
    pub(crate) fn read_ahead(self: &Arc<Self>, range: &Range<DiskOffset>, fetched: Option<SpanId>) {
        let Some((first, last)) = first_and_last(self.regions().in_disk(range)) else {
            return;
        };
        let (Some(first), Some(end)) = (first.clip_disk(range), last.clip_disk(range)) else {
            return;
        };
        let mut spans = self.spans().covering(first.layer.start..end.layer.end);
        spans.end = fetched.map_or(spans.end, |end| end.get().max(spans.end));
        let access = sequential::Access {
            spans,
            file: last.disk.start.get(),
            file_end: self.spans().covering(last.layer.clone()).end,
        };
        let length = |span| self.compressed_length(&(span..span + 1));
        let least = match self.is_fine() {
            true => sequential::LEAST_PASSED,
            false => 0,
        };
        let Some(ahead) = self
            .readahead()
            .access(&access, self.spans().count(), least, length)
        else {
            return;
        };
        let layer = self.spans().uncompressed(SpanId(ahead.spans.start)).start
            ..self.spans().uncompressed(SpanId(ahead.spans.end - 1)).end;
        if let Some((first, last)) = first_and_last(self.regions().in_layer(&layer)) {
            let disk = first.disk.start..last.disk.end;
            self.readahead().mark(ahead.reader, &disk);
        }
        self.upcoming().push(ahead.spans);
        self.fetch_upcoming();
    }

    /// Starts fetches of what comes next, as long as the link has room for them.
    pub(crate) fn fetch_upcoming(self: &Arc<Self>) {
        let fit = |run: &Range<u32>| self.compressed_length(run) <= MAX_AHEAD_BYTES;
        while !self.upcoming().is_empty() {
            let enough = self.whole().on_the_way().saturating_add(MAX_AHEAD_BYTES);
            let Some(run) = self.upcoming().next(enough, fit) else {
                return;
            };
            let deadline = in_flight::deadline(Some(AHEAD_TIMEOUT));
            self.start(self.claim(run, MAX_AHEAD_BYTES, deadline));
        }
    }

    /// Claims those of adjacent spans that are neither present nor on their way, in pieces of so many compressed bytes, for nobody yet.
    /// None as long as the local disk would not take them.
    pub(crate) fn claim(
        &self,
        spans: Range<u32>,
        most_bytes: u64,
        deadline: Deadline,
    ) -> Vec<Claim> {
        if self.fails_to_keep() {
            return Vec::new();
        }
        let (_, claims) = self.flights().claim(
            spans.map(SpanId),
            |span| self.is_here(span),
            |run| self.compressed_length(run) <= most_bytes,
            Purpose::Later,
            deadline,
        );
        claims
    }

    fn start(self: &Arc<Self>, claims: Vec<Claim>) {
        for claim in claims {
            let on_the_way = OnTheWay::new(self, self.compressed_length(&claim.spans()));
            let fetch = fetch::fetch(Arc::clone(self), claim, Some(on_the_way));
            self.services().spawn(fetch);
        }
    }
}
