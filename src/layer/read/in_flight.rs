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

/// How long a fetch may go on: until the last of those who wait gives up. `None`: for ever.
pub(crate) type Deadline = Option<Instant>;

/// The moment `timeout` from now; for ever where that cannot be counted.
pub(crate) fn deadline(timeout: Option<Duration>) -> Deadline {
    Instant::now().checked_add(timeout?)
}

/// Whether this moment has passed.
pub(super) fn is_over(deadline: Deadline) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}

/// What a span is fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A reader waits for it.
    Reader,
    /// Nobody does yet.
    Later,
}

/// What the spans of one fetch share: one deadline, whether somebody waits, and what has gone wrong so far.
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

    /// Whether its time is over: it ends as soon as its fetch gets to it.
    fn is_over(&self) -> bool {
        is_over(*self.deadline.borrow())
    }

    /// Another one asks for one of the spans.
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

    /// Ends when the deadline has passed, however often it is moved.
    pub(crate) async fn passed(&self) {
        let mut moved = self.deadline.subscribe();
        loop {
            let deadline = *moved.borrow_and_update();
            let passed = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => return,
                // the sender is in `self`: it is not closed
                _ = moved.changed() => {}
            }
        }
    }

    pub(crate) fn note(&self, error: &Arc<Error>) {
        *locked(&self.last_error) = Some(Arc::clone(error));
    }

    pub(super) fn last_error(&self) -> Option<Arc<Error>> {
        locked(&self.last_error).clone()
    }
}

/// One span on its way.
struct SpanFetch {
    outcome: watch::Sender<Option<SpanOutcome>>,
    effort: Arc<FetchEffort>,
}

/// Someone who waits for a span.
pub(crate) struct Waiter {
    outcome: watch::Receiver<Option<SpanOutcome>>,
    effort: Arc<FetchEffort>,
}

impl Waiter {
    /// Whether the fetch had begun before this moment: then its error may be of a time that is over.
    pub(super) fn began_before(&self, moment: Instant) -> bool {
        self.effort.began < moment
    }

    /// The fetch's outcome; when the deadline passes first, its last error, or `late` where it has none yet.
    pub(crate) async fn wait(
        mut self,
        deadline: Deadline,
        late: impl FnOnce() -> Arc<Error>,
    ) -> SpanOutcome {
        let outcome = async {
            match self.outcome.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone().unwrap_or(Ok(())), // it is some
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
        "the fetch was given up because the daemon stops",
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

/// All spans on their way.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<HashMap<SpanId, SpanFetch>>);

impl InFlight {
    /// Joins the fetches of those of `spans` that are on their way, and claims the others that are not `present`; `spans` ascend.
    /// Gives the waiters for all, and the claims, which the caller has to work on: adjacent spans are in one as long as `fit` says so.
    pub(crate) fn claim(
        self: &Arc<Self>,
        spans: impl Iterator<Item = SpanId>,
        present: impl Fn(SpanId) -> bool,
        fit: impl Fn(&Range<u32>) -> bool,
        purpose: Purpose,
        deadline: Deadline,
    ) -> (Vec<Waiter>, Vec<FetchClaim>) {
        let mut waiters = Vec::new();
        let mut claims: Vec<FetchClaim> = Vec::new();
        let mut flights = locked(&self.0);
        for span in spans {
            // asked under the lock: a span's bit is set before its flight ends
            if present(span) {
                continue;
            }
            // one whose time is over is about to end with an error, which is not for who asks only now
            if let Some(flight) = flights.get(&span).filter(|flight| !flight.effort.is_over()) {
                flight.effort.join(purpose, deadline);
                waiters.push(flight.waiter());
                continue;
            }
            let next = span.get() + 1;
            let effort = match claims.last_mut() {
                Some(claim) if claim.spans.end == span.get() && fit(&(claim.spans.start..next)) => {
                    claim.spans.end = next;
                    Arc::clone(&claim.effort)
                }
                _ => {
                    let effort = FetchEffort::new(purpose, deadline);
                    claims.push(FetchClaim {
                        spans: span.get()..next,
                        effort: Arc::clone(&effort),
                        flights: Arc::clone(self),
                    });
                    effort
                }
            };
            let flight = SpanFetch::of(effort);
            waiters.push(flight.waiter());
            if let Some(over) = flights.insert(span, flight) {
                let error = over.effort.last_error().unwrap_or_else(stopped);
                // those who waited for it have given up, or do so now
                let _ = over.outcome.send(Some(Err(error)));
            }
        }
        (waiters, claims)
    }

    /// Adds spans to a claim that nobody waits for, so that it has all of `to`, or on either side as many as are neither present nor on their
    /// way.
    pub(crate) fn extend(
        &self,
        claim: &mut FetchClaim,
        to: Range<u32>,
        present: impl Fn(SpanId) -> bool,
    ) {
        let mut flights = locked(&self.0);
        let mut takes = |span| {
            let is_free = !present(span) && !flights.contains_key(&span);
            if is_free {
                flights.insert(span, SpanFetch::of(Arc::clone(&claim.effort)));
            }
            is_free
        };
        let after = (claim.spans.end..to.end).take_while(|span| takes(SpanId(*span)));
        claim.spans.end = after.last().map_or(claim.spans.end, |last| last + 1); // below `to.end`
        let before = (to.start..claim.spans.start)
            .rev()
            .take_while(|span| takes(SpanId(*span)));
        claim.spans.start = before.last().unwrap_or(claim.spans.start);
    }

    /// Ends a span's flight, if it has not ended yet. After that the span may be on its way again, by another effort.
    fn end(&self, span: SpanId, effort: &Arc<FetchEffort>, outcome: SpanOutcome) {
        let flight = match locked(&self.0).entry(span) {
            Entry::Occupied(flight) if Arc::ptr_eq(&flight.get().effort, effort) => flight.remove(),
            _ => return,
        };
        // nobody waits any more: the next one finds the bit, or tries again
        let _ = flight.outcome.send(Some(outcome));
    }
}

/// Adjacent spans that one fetch has to bring. When it is dropped, what has not been ended ends with an error.
pub(crate) struct FetchClaim {
    spans: Range<u32>,
    effort: Arc<FetchEffort>,
    flights: Arc<InFlight>,
}

impl FetchClaim {
    pub(crate) fn spans(&self) -> Range<u32> {
        self.spans.clone()
    }

    pub(super) fn effort(&self) -> &Arc<FetchEffort> {
        &self.effort
    }

    /// Ends one of the spans.
    pub(crate) fn end(&self, span: SpanId, outcome: SpanOutcome) {
        debug_assert!(self.spans.contains(&span.get()));
        self.flights.end(span, &self.effort, outcome);
    }
}

impl Drop for FetchClaim {
    fn drop(&mut self) {
        for span in self.spans.clone() {
            self.flights.end(SpanId(span), &self.effort, Err(stopped()));
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
    async fn the_second_who_asks_waits_for_the_first() {
        let flights = Arc::new(InFlight::default());
        let fit = |run: &Range<u32>| run.len() <= 3;
        let (first, claims) =
            flights.claim(spans(0..5), |span| span.get() == 1, fit, READER, soon());
        let ranges: Vec<_> = claims.iter().map(FetchClaim::spans).collect();
        assert_eq!(ranges, [0..1, 2..5]);
        assert_eq!(first.len(), 4);

        let (second, none) = flights.claim(spans(3..4), |_| false, fit, READER, soon());
        assert!(none.is_empty());
        claims[1].end(SpanId(3), Ok(()));
        for waiter in second {
            assert!(waiter.wait(soon(), stopped).await.is_ok());
        }
        // it has ended: who asks now starts anew
        let (_, again) = flights.claim(spans(3..4), |_| false, fit, READER, soon());
        assert_eq!(again.len(), 1);
    }

    #[tokio::test]
    async fn a_claim_takes_more_up_to_what_is_there_or_on_its_way() {
        let flights = Arc::new(InFlight::default());
        let (_, mut claims) = flights.claim(spans(2..3), |_| false, |_| true, READER, soon());
        let (_, other) = flights.claim(spans(5..6), |_| false, |_| true, READER, soon());
        flights.extend(&mut claims[0], 2..4, |_| false);
        assert_eq!(claims[0].spans(), 2..4);
        flights.extend(&mut claims[0], 0..9, |span| span.get() == 0);
        assert_eq!((claims[0].spans(), other[0].spans()), (1..5, 5..6));
        // who asks for one of them waits for the same fetch
        let (mut waiters, none) = flights.claim(spans(4..5), |_| false, |_| true, READER, soon());
        assert!(none.is_empty());
        claims[0].end(SpanId(4), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_fetch_that_began_at_a_moment_did_not_begin_before_it() {
        let flights = Arc::new(InFlight::default());
        let (mut waiters, _claims) =
            flights.claim(spans(0..1), |_| false, |_| true, READER, soon());
        let (waiter, now) = (waiters.pop().unwrap(), Instant::now());
        assert!(!waiter.began_before(now));
        assert!(waiter.began_before(now + Duration::from_nanos(1)));
    }

    #[tokio::test]
    async fn a_claim_is_as_long_as_fits() {
        let flights = Arc::new(InFlight::default());
        let fit = |run: &Range<u32>| run.len() <= 2;
        let (_, claims) = flights.claim(spans(0..5), |_| false, fit, READER, soon());
        let ranges: Vec<_> = claims.iter().map(FetchClaim::spans).collect();
        assert_eq!(ranges, [0..2, 2..4, 4..5]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_when_the_time_of_a_fetch_is_over_starts_anew() {
        let flights = Arc::new(InFlight::default());
        let over = deadline(Some(Duration::ZERO));
        let (mut late, old) = flights.claim(spans(0..1), |_| false, |_| true, READER, over);
        let refused = Arc::new(Error::new(Kind::Unauthorized, "refused"));
        old[0].effort().note(&refused);
        let (mut waiters, again) = flights.claim(spans(0..1), |_| false, |_| true, READER, soon());
        assert_eq!(again.len(), 1);
        // also while its fetch has not come to its end
        let given_up = late.pop().unwrap().wait(None, stopped);
        let given_up = tokio::time::timeout(Duration::from_secs(60), given_up).await;
        let given_up = given_up.expect("it has an end").unwrap_err();
        assert_eq!(given_up.kind(), Kind::Unauthorized, "what it last said");
        // the end of the old one is not the end of the new one
        drop(old);
        again[0].end(SpanId(0), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_dropped_claim_is_an_error_and_not_a_hang() {
        let flights = Arc::new(InFlight::default());
        let (mut waiters, claims) = flights.claim(spans(0..2), |_| false, |_| true, READER, soon());
        claims[0].end(SpanId(0), Ok(()));
        drop(claims);
        let last = waiters.pop().unwrap().wait(None, stopped).await;
        assert_eq!(last.unwrap_err().kind(), Kind::Unavailable);
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_claim_ends_its_own_flights_only() {
        let flights = Arc::new(InFlight::default());
        let (_, first) = flights.claim(spans(0..1), |_| false, |_| true, READER, soon());
        first[0].end(SpanId(0), Err(stopped()));
        // who saw the error asks again before the first claim is dropped
        let (mut waiters, second) = flights.claim(spans(0..1), |_| false, |_| true, READER, soon());
        drop(first);
        second[0].end(SpanId(0), Ok(()));
        assert!(waiters.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn each_waits_for_its_own_time_and_the_fetch_for_the_longest() {
        let flights = Arc::new(InFlight::default());
        let short = deadline(Some(Duration::from_secs(20)));
        let long = deadline(Some(Duration::from_secs(120)));
        let (mut first, claims) = flights.claim(spans(0..1), |_| false, |_| true, READER, short);
        let effort = Arc::clone(claims[0].effort());
        let (mut second, _) = flights.claim(spans(0..1), |_| false, |_| true, READER, long);
        effort.note(&Arc::new(Error::new(Kind::Unauthorized, "refused")));

        let error = first.pop().unwrap().wait(short, stopped).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unauthorized);
        assert!(is_over(short) && !is_over(long));
        effort.passed().await;
        assert!(is_over(long));
        claims[0].end(SpanId(0), Ok(()));
        assert!(second.pop().unwrap().wait(None, stopped).await.is_ok());
    }

    #[tokio::test]
    async fn a_reader_who_joins_makes_the_fetch_awaited() {
        let flights = Arc::new(InFlight::default());
        let claim = |purpose| flights.claim(spans(0..1), |_| false, |_| true, purpose, soon());
        let (_, ahead) = claim(Purpose::Later);
        assert!(!ahead[0].effort().is_awaited());
        claim(Purpose::Later);
        assert!(!ahead[0].effort().is_awaited());
        claim(Purpose::Reader);
        assert!(ahead[0].effort().is_awaited());
    }

    #[tokio::test(start_paused = true)]
    async fn who_joins_never_makes_a_fetch_end_sooner() {
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
                let end = tokio::time::timeout(HOUR, waits.passed()).await;
                end.ok().map(|()| Instant::now())
            });
            // it waits already
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
