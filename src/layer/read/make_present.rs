//! Makes ranges present: joins or starts the fetches of their spans, and starts read-ahead.

use std::{ops::Range, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    fetch,
    in_flight::{self, Deadline, FetchClaim, Waiter},
};
use crate::{
    error::{Error, Result},
    layer::{
        ahead::{ahead_of_readers::MAX_AHEAD_BYTES, fill, on_the_way::OnTheWay, recording::Touch},
        disk::Disk,
    },
    units::{DiskOffset, SpanId},
};

/// How long a fetch goes on that no reader waits for.
const AHEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of one try for a reader.
#[derive(PartialEq, Eq)]
enum ReaderTry {
    Present,
    Again,
}

impl Disk {
    /// Whether a read of this range needs no fetch. Cheap: no lock where the spans are present, no system call.
    pub fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.reader().is_present(&range)
    }

    /// Makes a range present: one fetch per span however many readers wait, and one GET for adjacent absent spans. Goes on trying for the
    /// disk's [`Self::set_io_timeout`].
    pub async fn make_present(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
    ) -> Result<(), Arc<Error>> {
        self.make_present_within(range, self.reader().io_timeout())
            .await
    }

    /// As [`Self::make_present`], with a time limit of its own; `None`: without a limit. When the time has passed the error is that of the
    /// last try, and the next call tries anew.
    pub async fn make_present_within(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
        timeout: Option<Duration>,
    ) -> Result<(), Arc<Error>> {
        // in the order in which ranges are asked for, not that in which they come
        self.note_touch(&range);
        if self.is_present(range.clone()) {
            return Ok(());
        }
        self.services().enter();
        let came = Instant::now();
        let deadline = in_flight::deadline(timeout);
        let _waiting = self.services().traffic().wait();
        while self.tried(&range, came, deadline).await? == ReaderTry::Again {}
        let now = Instant::now().into_std();
        self.ahead()
            .fill()
            .measured(|cost| cost.waited(came.into_std(), now));
        Ok(())
    }

    /// Joins the fetches of absent spans, starts those that are not in flight, and waits for them. A fetch that had begun before the reader
    /// `came` may have met an error that is over by now: its error is not for this reader, while the reader's time is not over. The fetch is
    /// tried again then, and in the end by one that has begun since.
    async fn tried(
        self: &Arc<Self>,
        range: &Range<DiskOffset>,
        came: Instant,
        deadline: Deadline,
    ) -> Result<ReaderTry, Arc<Error>> {
        for waiter in self.ask_for(range, deadline) {
            let is_older = waiter.began_before(came);
            let late = || fetch::unanswered(self, range);
            let outcome = waiter.wait(deadline, late).await;
            if outcome.is_err() && is_older && !in_flight::is_over(deadline) {
                return Ok(ReaderTry::Again);
            }
            outcome?;
        }
        Ok(ReaderTry::Present)
    }

    /// Joins and starts fetches for a reader, and what is fetched besides.
    fn ask_for(self: &Arc<Self>, range: &Range<DiskOffset>, deadline: Deadline) -> Vec<Waiter> {
        let (waiters, claims) = self.reader().claim_for_reader(range, deadline);
        let missed = claims.last().map(FetchClaim::spans);
        let lengths = claims
            .iter()
            .map(|claim| self.layout().compressed_length(&claim.spans()));
        let bytes = lengths.sum();
        self.start(claims);
        if let Some(missed) = &missed
            && let Some(file_end) = self.reader().file_end(range, missed)
        {
            self.fetch_ahead(file_end);
        }
        let end = missed.map(|missed| SpanId(missed.end));
        self.read_ahead(range, end);
        if let Some(next) = end
            && !self.reader().fails_to_keep()
            && self.ahead().fill().is_due_after_miss(bytes)
        {
            self.services()
                .spawn(fill::fetch_all(Arc::clone(self), next));
        }
        waiters
    }

    /// Records the spans of a range, if reads are recorded.
    pub(crate) fn note_touch(&self, range: &Range<DiskOffset>) {
        if let Some(touches) = self.services().recording() {
            touches.note(self.layout().spans_under(range).map(|span| Touch {
                layer: self.layer().digest,
                bytes: self.layout().spans().uncompressed(span),
            }));
        }
    }

    /// Takes note of an access, and starts the fetch of what its reader will want next. `fetched` is the end of the fetch that the access
    /// has started.
    pub(crate) fn read_ahead(self: &Arc<Self>, range: &Range<DiskOffset>, fetched: Option<SpanId>) {
        self.ahead().access(self.reader(), range, fetched);
        self.fetch_queued();
    }

    /// Starts fetches of queued spans, as long as the link has room for them.
    pub(crate) fn fetch_queued(self: &Arc<Self>) {
        while let Some(run) = self.ahead().next_queued(self.layout()) {
            self.fetch_ahead(run);
        }
    }

    /// Fetches adjacent spans that no reader waits for yet.
    fn fetch_ahead(self: &Arc<Self>, run: Range<u32>) {
        let deadline = in_flight::deadline(Some(AHEAD_TIMEOUT));
        self.start(self.reader().claim_ahead(run, MAX_AHEAD_BYTES, deadline));
    }

    fn start(self: &Arc<Self>, claims: Vec<FetchClaim>) {
        for claim in claims {
            let bytes = self.layout().compressed_length(&claim.spans());
            let on_the_way = OnTheWay::new(self, bytes);
            let fetch = fetch::fetch(Arc::clone(self), claim, Some(on_the_way));
            self.services().spawn(fetch);
        }
    }
}
