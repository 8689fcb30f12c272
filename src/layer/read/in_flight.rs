//! In-flight fetches, deduplicated: at most one per span, shared by all waiters.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{
    error::{Error, Kind},
    layer::locked::locked,
    units::SpanId,
};

/// How a fetch ended.
pub(crate) type SpanOutcome = Result<(), Arc<Error>>;

/// When a fetch ends at the latest: when its last waiter gives up. `None`: no limit.
pub(crate) type Deadline = Option<Instant>;

/// `timeout` from now; no deadline if that moment cannot be represented.
pub(crate) fn deadline(timeout: Option<Duration>) -> Deadline {
    Instant::now().checked_add(timeout?)
}

/// Whether a deadline has passed.
pub(super) fn is_over(deadline: Deadline) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}

/// What a span is fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A reader waits for it.
    Reader,
    /// No reader waits for it yet.
    Ahead,
}

/// The shared state of the spans of one fetch: the deadline, whether a reader waits, and the last error.
pub(crate) struct FetchEffort {
    began: Instant,
    deadline: watch::Sender<Deadline>,
    awaited: AtomicBool,
    last_error: Mutex<Option<Arc<Error>>>,
}

impl FetchEffort {
    pub(crate) fn new(purpose: Purpose, deadline: Deadline) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            deadline: watch::Sender::new(deadline),
            awaited: AtomicBool::new(purpose == Purpose::Reader),
            last_error: Mutex::new(None),
        })
    }

    /// Whether a reader waits for one of the spans.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed)
    }

    /// Whether the deadline has passed: the fetch ends when it next checks.
    fn is_over(&self) -> bool {
        is_over(*self.deadline.borrow())
    }

    /// Another reader or read-ahead asks for one of the spans.
    fn join(&self, purpose: Purpose, deadline: Deadline) {
        if purpose == Purpose::Reader {
            self.awaited.store(true, Ordering::Relaxed);
        }
        self.deadline.send_if_modified(|current| {
            let later = match (*current, deadline) {
                (Some(current), Some(new)) => new > current,
                (current, None) => current.is_some(),
                (None, Some(_)) => false,
            };
            if later {
                *current = deadline;
            }
            later
        });
    }

    /// Waits until the deadline has passed, also if it is moved meanwhile.
    pub(crate) async fn deadline_passed(&self) {
        let mut changes = self.deadline.subscribe();
        loop {
            let deadline = *changes.borrow_and_update();
            let passed = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => return,
                // the sender is in `self`, so the channel is open
                _ = changes.changed() => {}
            }
        }
    }

    pub(crate) fn record_error(&self, error: &Arc<Error>) {
        *locked(&self.last_error) = Some(Arc::clone(error));
    }

    pub(super) fn last_error(&self) -> Option<Arc<Error>> {
        locked(&self.last_error).clone()
    }
}

/// One span in flight.
struct SpanFetch {
    outcome: watch::Sender<Option<SpanOutcome>>,
    effort: Arc<FetchEffort>,
}

/// Waits for a span in flight.
pub(crate) struct Waiter {
    outcome: watch::Receiver<Option<SpanOutcome>>,
    effort: Arc<FetchEffort>,
}

impl Waiter {
    /// Whether the fetch began before this moment. Then the reason of its error may have ended before.
    pub(super) fn began_before(&self, moment: Instant) -> bool {
        self.effort.began < moment
    }

    /// The outcome of the fetch. If the deadline passes first: the last error of the fetch, or `late` if it has none.
    pub(crate) async fn wait(
        mut self,
        deadline: Deadline,
        late: impl FnOnce() -> Arc<Error>,
    ) -> SpanOutcome {
        let outcome = async {
            match self.outcome.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone().unwrap_or(Ok(())), // `wait_for` returns `Some`
                Err(_) => Err(stopped()),
            }
        };
        let Some(deadline) = deadline else {
            return outcome.await;
        };
        tokio::time::timeout_at(deadline, outcome)
            .await
            .unwrap_or_else(|_| Err(self.effort.last_error().unwrap_or_else(late)))
    }
}

fn stopped() -> Arc<Error> {
    Arc::new(Error::new(
        Kind::Unavailable,
        "the fetch was cancelled because the daemon stops",
    ))
}

impl SpanFetch {
    fn of(effort: Arc<FetchEffort>) -> Self {
        Self {
            outcome: watch::Sender::new(None),
            effort,
        }
    }

    fn waiter(&self) -> Waiter {
        Waiter {
            outcome: self.outcome.subscribe(),
            effort: Arc::clone(&self.effort),
        }
    }
}

/// All spans in flight.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<HashMap<SpanId, SpanFetch>>);

impl InFlight {
    /// Joins the fetches of those of `spans` that are in flight, and claims the others that are not `present`; `spans` ascend. Returns the
    /// waiters for all of them, and the claims, which the caller has to fetch. A claim is a run of adjacent spans for which `fits` is true.
    pub(crate) fn claim(
        self: &Arc<Self>,
        spans: impl Iterator<Item = SpanId>,
        present: impl Fn(SpanId) -> bool,
        fits: impl Fn(&Range<u32>) -> bool,
        purpose: Purpose,
        deadline: Deadline,
    ) -> (Vec<Waiter>, Vec<FetchClaim>) {
        let mut waiters = Vec::new();
        let mut claims: Vec<FetchClaim> = Vec::new();
        let mut fetches = locked(&self.0);
        for span in spans {
            // checked under the lock: a span's bit is set before its fetch is removed
            if present(span) {
                continue;
            }
            // a fetch whose deadline has passed ends with an error soon, which is not for a new reader
            if let Some(fetch) = fetches.get(&span).filter(|fetch| !fetch.effort.is_over()) {
                fetch.effort.join(purpose, deadline);
                waiters.push(fetch.waiter());
                continue;
            }
            let next = span.get() + 1;
            let effort = match claims.last_mut() {
                Some(claim)
                    if claim.spans.end == span.get() && fits(&(claim.spans.start..next)) =>
                {
                    claim.spans.end = next;
                    Arc::clone(&claim.effort)
                }
                _ => {
                    let effort = FetchEffort::new(purpose, deadline);
                    claims.push(FetchClaim {
                        spans: span.get()..next,
                        effort: Arc::clone(&effort),
                        in_flight: Arc::clone(self),
                    });
                    effort
                }
            };
            let fetch = SpanFetch::of(effort);
            waiters.push(fetch.waiter());
            if let Some(over) = fetches.insert(span, fetch) {
                let error = over.effort.last_error().unwrap_or_else(stopped);
                // its waiters have given up, or do so now
                let _ = over.outcome.send(Some(Err(error)));
            }
        }
        (waiters, claims)
    }

    /// Adds spans that no reader waits for to a claim, up to the range `to`. On each side it stops at the first span that is present or in
    /// flight.
    pub(crate) fn extend(
        &self,
        claim: &mut FetchClaim,
        to: Range<u32>,
        present: impl Fn(SpanId) -> bool,
    ) {
        let mut fetches = locked(&self.0);
        let mut takes_span = |span| {
            let is_free = !present(span) && !fetches.contains_key(&span);
            if is_free {
                fetches.insert(span, SpanFetch::of(Arc::clone(&claim.effort)));
            }
            is_free
        };
        let after = (claim.spans.end..to.end).take_while(|span| takes_span(SpanId(*span)));
        claim.spans.end = after.last().map_or(claim.spans.end, |last| last + 1); // below `to.end`
        let before = (to.start..claim.spans.start)
            .rev()
            .take_while(|span| takes_span(SpanId(*span)));
        claim.spans.start = before.last().unwrap_or(claim.spans.start);
    }

    /// Ends the fetch of a span, if it has not ended yet. After that the span may be in flight again, with another effort.
    fn end(&self, span: SpanId, effort: &Arc<FetchEffort>, outcome: SpanOutcome) {
        let fetch = match locked(&self.0).entry(span) {
            Entry::Occupied(fetch) if Arc::ptr_eq(&fetch.get().effort, effort) => fetch.remove(),
            _ => return,
        };
        // if no reader waits any more, the next one finds the bit, or starts a new fetch
        let _ = fetch.outcome.send(Some(outcome));
    }
}

/// Adjacent spans that one fetch has to make present. When it is dropped, the spans that have not ended end with an error.
pub(crate) struct FetchClaim {
    spans: Range<u32>,
    effort: Arc<FetchEffort>,
    in_flight: Arc<InFlight>,
}

impl FetchClaim {
    pub(crate) fn spans(&self) -> Range<u32> {
        self.spans.clone()
    }

    pub(super) fn effort(&self) -> &Arc<FetchEffort> {
        &self.effort
    }

    /// Ends the fetch of one of the spans.
    pub(crate) fn end(&self, span: SpanId, outcome: SpanOutcome) {
        debug_assert!(self.spans.contains(&span.get()));
        self.in_flight.end(span, &self.effort, outcome);
    }
}

impl Drop for FetchClaim {
    fn drop(&mut self) {
        for span in self.spans.clone() {
            self.in_flight
                .end(SpanId(span), &self.effort, Err(stopped()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: Purpose = Purpose::Reader;

    fn spans(range: Range<u32>) -> impl Iterator<Item = SpanId> {
        range.map(SpanId)
    }

    fn soon() -> Deadline {
        deadline(Some(Duration::from_secs(60)))
    }

    #[tokio::test]
    async fn a_second_reader_waits_for_the_first_fetch() {
        let in_flight = Arc::new(InFlight::default());
        let fits = |run: &Range<u32>| run.len() <= 3;
        let (first, claims) =
            in_flight.claim(spans(0..5), |span| span.get() == 1, fits, READER, soon());
        let ranges: Vec<_> = claims.iter().map(FetchClaim::spans).collect();
        assert_eq!(ranges, [0..1, 2..5]);
        assert_eq!(first.len(), 4);

        let (second, none) = in_flight.claim(spans(3..4), |_| false, fits, READER, soon());
        assert!(none.is_empty());
        claims[1].end(SpanId(3), Ok(()));
        for waiter in second {
            assert!(waiter.wait(soon(), stopped).await.is_ok());
        }
        // the fetch has ended: the next claim starts a new one
        let (_, again) = in_flight.claim(spans(3..4), |_| false, fits, READER, soon());
        assert_eq!(again.len(), 1);
    }

    #[tokio::test]
    async fn a_claim_extends_to_the_next_span_that_is_present_or_in_flight() {
        let in_flight = Arc::new(InFlight::default());
        let (_, mut claims) = in_flight.claim(spans(2..3), |_| false, |_| true, READER, soon());
        let (_, other) = in_flight.claim(spans(5..6), |_| false, |_| true, READER, soon());
        in_flight.extend(&mut claims[0], 2..4, |_| false);
        assert_eq!(claims[0].spans(), 2..4);
        in_flight.extend(&mut claims[0], 0..9, |span| span.get() == 0);
        assert_eq!((claims[0].spans(), other[0].spans()), (1..5, 5..6));
        // a reader of one of them waits for the same fetch
        let (mut waiters, none) = in_flight.claim(spans(4..5), |_| false, |_| true, READER, soon());
        assert!(none.is_empty());
        claims[0].end(SpanId(4), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_fetch_that_began_at_a_moment_did_not_begin_before_it() {
        let in_flight = Arc::new(InFlight::default());
        let (mut waiters, _claims) =
            in_flight.claim(spans(0..1), |_| false, |_| true, READER, soon());
        let (waiter, now) = (waiters.pop().unwrap(), Instant::now());
        assert!(!waiter.began_before(now));
        assert!(waiter.began_before(now + Duration::from_nanos(1)));
    }

    #[tokio::test]
    async fn a_claim_is_as_long_as_it_fits() {
        let in_flight = Arc::new(InFlight::default());
        let fits = |run: &Range<u32>| run.len() <= 2;
        let (_, claims) = in_flight.claim(spans(0..5), |_| false, fits, READER, soon());
        let ranges: Vec<_> = claims.iter().map(FetchClaim::spans).collect();
        assert_eq!(ranges, [0..2, 2..4, 4..5]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_after_the_deadline_of_a_fetch_starts_a_new_one() {
        let in_flight = Arc::new(InFlight::default());
        let over = deadline(Some(Duration::ZERO));
        let (mut late, old) = in_flight.claim(spans(0..1), |_| false, |_| true, READER, over);
        let refused = Arc::new(Error::new(Kind::Unauthorized, "refused"));
        old[0].effort().record_error(&refused);
        let (mut waiters, again) =
            in_flight.claim(spans(0..1), |_| false, |_| true, READER, soon());
        assert_eq!(again.len(), 1);
        // also while the old fetch has not ended
        let given_up = late.pop().unwrap().wait(None, stopped);
        let given_up = tokio::time::timeout(Duration::from_secs(60), given_up).await;
        let given_up = given_up.expect("the wait ends").unwrap_err();
        assert_eq!(given_up.kind(), Kind::Unauthorized, "the last error");
        // the end of the old fetch does not end the new one
        drop(old);
        again[0].end(SpanId(0), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_dropped_claim_ends_with_an_error_and_not_a_hang() {
        let in_flight = Arc::new(InFlight::default());
        let (mut waiters, claims) =
            in_flight.claim(spans(0..2), |_| false, |_| true, READER, soon());
        claims[0].end(SpanId(0), Ok(()));
        drop(claims);
        let last = waiters.pop().unwrap().wait(None, stopped).await;
        assert_eq!(last.unwrap_err().kind(), Kind::Unavailable);
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_claim_ends_its_own_fetches_only() {
        let in_flight = Arc::new(InFlight::default());
        let (_, first) = in_flight.claim(spans(0..1), |_| false, |_| true, READER, soon());
        first[0].end(SpanId(0), Err(stopped()));
        // a reader that saw the error asks again before the first claim is dropped
        let (mut waiters, second) =
            in_flight.claim(spans(0..1), |_| false, |_| true, READER, soon());
        drop(first);
        second[0].end(SpanId(0), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn each_reader_waits_until_its_deadline_and_the_fetch_until_the_last() {
        let in_flight = Arc::new(InFlight::default());
        let short = deadline(Some(Duration::from_secs(20)));
        let long = deadline(Some(Duration::from_secs(120)));
        let (mut first, claims) = in_flight.claim(spans(0..1), |_| false, |_| true, READER, short);
        let effort = Arc::clone(claims[0].effort());
        let (mut second, _) = in_flight.claim(spans(0..1), |_| false, |_| true, READER, long);
        effort.record_error(&Arc::new(Error::new(Kind::Unauthorized, "refused")));

        let error = first.pop().unwrap().wait(short, stopped).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unauthorized);
        assert!(is_over(short) && !is_over(long));
        effort.deadline_passed().await;
        assert!(is_over(long));
        claims[0].end(SpanId(0), Ok(()));
        assert!(second.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_reader_that_joins_makes_the_fetch_awaited() {
        let in_flight = Arc::new(InFlight::default());
        let claim = |purpose| in_flight.claim(spans(0..1), |_| false, |_| true, purpose, soon());
        let (_, ahead) = claim(Purpose::Ahead);
        assert!(!ahead[0].effort().is_awaited());
        claim(Purpose::Ahead);
        assert!(!ahead[0].effort().is_awaited());
        claim(Purpose::Reader);
        assert!(ahead[0].effort().is_awaited());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_joins_never_makes_a_fetch_end_sooner() {
        const HOUR: Duration = Duration::from_secs(3600);
        for (began_with, joined_with, ends_with) in [
            (Some(10), Some(100), Some(100)),
            (Some(100), Some(10), Some(100)),
            (Some(10), Some(10), Some(10)),
            (None, Some(10), None),
            (Some(10), None, None),
            (None, None, None),
        ] {
            let now = Instant::now();
            let after = |seconds: Option<u64>| Some(now + Duration::from_secs(seconds?));
            let [began_with, joined_with, ends_with] =
                [began_with, joined_with, ends_with].map(after);
            let effort = FetchEffort::new(READER, began_with);
            let waits = Arc::clone(&effort);
            let passed = tokio::spawn(async move {
                let end = tokio::time::timeout(HOUR, waits.deadline_passed()).await;
                end.ok().map(|()| Instant::now())
            });
            // the task waits already
            tokio::task::yield_now().await;
            effort.join(READER, joined_with);
            assert_eq!(*effort.deadline.borrow(), ends_with);
            let ended = passed.await.unwrap();
            let is_right = match (ended, ends_with) {
                (Some(ended), Some(ends_with)) => ended.duration_since(ends_with).as_millis() <= 1,
                (ended, ends_with) => ended.is_none() && ends_with.is_none(),
            };
            assert!(is_right, "{began_with:?}, {joined_with:?}: {ended:?}");
        }
    }
}
