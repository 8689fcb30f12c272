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
        ahead::{
            ahead_of_readers::MAX_AHEAD_BYTES, bytes_in_flight::BytesInFlight, fill,
            recording::Touch,
        },
        disk::Disk,
    },
    units::{DiskOffset, SpanId},
};

/// Maximum duration of a fetch that no reader waits for.
const AHEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of one attempt for a reader.
#[derive(PartialEq, Eq)]
enum ReadAttempt {
    Present,
    Repeat,
}

impl Disk {
    /// Whether a read of this range needs no fetch. Cheap: no lock where the spans are present, no system call.
    pub fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.reader().is_present(&range)
    }

    /// Makes a range present: at most one fetch per span for any number of readers, and one GET for adjacent absent spans. It retries until
    /// the disk's [`Self::set_io_timeout`] has passed.
    pub async fn make_present(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
    ) -> Result<(), Arc<Error>> {
        self.make_present_within(range, self.reader().io_timeout())
            .await
    }

    /// As [`Self::make_present`], with another time limit; `None`: without a limit. After the time limit it returns the error of the last
    /// attempt. The next call starts new attempts.
    pub async fn make_present_within(
        self: &Arc<Self>,
        range: Range<DiskOffset>,
        timeout: Option<Duration>,
    ) -> Result<(), Arc<Error>> {
        // recorded in the order of the requests, which is not the order in which the spans arrive
        self.record_touch(&range);
        if self.is_present(range.clone()) {
            return Ok(());
        }
        self.services().enter();
        let asked_at = Instant::now();
        let deadline = in_flight::deadline(timeout);
        let _waiting = self.services().traffic().wait();
        let _awaited = self.reader().wait_for(&range);
        let result = loop {
            match self.attempt(&range, asked_at, deadline).await {
                Ok(ReadAttempt::Repeat) => {}
                Ok(ReadAttempt::Present) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let (asked_at, now) = (asked_at.into_std(), Instant::now().into_std());
        self.activity().waited(now - asked_at, result.is_ok());
        self.log().waited(asked_at, &range, result.is_ok());
        result?;
        self.ahead()
            .fill()
            .measured(|cost| cost.waited(asked_at, now));
        Ok(())
    }

    /// Joins the fetches of absent spans, starts those that are not in flight, and waits for them. A fetch that began before `asked_at` may
    /// fail for a reason that has ended since. So its error is not returned: as long as the deadline has not passed, the attempt is
    /// repeated, and then it waits for a fetch that began later.
    async fn attempt(
        self: &Arc<Self>,
        range: &Range<DiskOffset>,
        asked_at: Instant,
        deadline: Deadline,
    ) -> Result<ReadAttempt, Arc<Error>> {
        for waiter in self.claim_and_start(range, deadline) {
            let is_older = waiter.began_before(asked_at);
            let late = || fetch::reader_timed_out(self, range);
            let outcome = waiter.wait(deadline, late).await;
            if outcome.is_err() && is_older && !in_flight::is_over(deadline) {
                return Ok(ReadAttempt::Repeat);
            }
            outcome?;
        }
        Ok(ReadAttempt::Present)
    }

    /// Joins and starts the fetches that a reader needs, and starts read-ahead.
    fn claim_and_start(
        self: &Arc<Self>,
        range: &Range<DiskOffset>,
        deadline: Deadline,
    ) -> Vec<Waiter> {
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
            && !self.reader().local_disk_rejects()
            && self.rest_fits()
            && self.ahead().fill().is_due_after_miss(bytes)
        {
            self.services()
                .spawn(fill::fetch_all(Arc::clone(self), next));
        }
        waiters
    }

    /// Records the spans of a range, if reads are recorded.
    pub(crate) fn record_touch(&self, range: &Range<DiskOffset>) {
        if let Some(touches) = self.services().recording() {
            touches.record(self.layout().spans_under(range).map(|span| Touch {
                layer: self.layer().digest,
                bytes: self.layout().spans().uncompressed(span),
            }));
        }
    }

    /// Records an access, and starts the fetches that its reader will probably need next. `fetched` is the end of the fetch that the access
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
            let in_flight_bytes = BytesInFlight::new(self, bytes);
            let fetch = fetch::fetch(Arc::clone(self), claim, Some(in_flight_bytes));
            self.services().spawn(fetch);
        }
    }
}
