//! Divides the link: fetches that readers wait for start at once, and background fetches use what these leave.
//!
//! Background fetches need permits, over all disks of a store. While no reader waits, there are enough permits to fill a fast link with a
//! long round trip. While a reader waits, there are as many as keep the link in use, so that it is not idle while the reader's request
//! travels or its span is decoded. On a short round trip that is one, so the reader has at least half of the link.
//!
//! Fetches that nobody is known to need soon give way to both ([`GivesWay`]), so that a container that starts has the whole link.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// Background fetches at a time while no reader waits: with [`super::fill::FETCH_BYTES`] each, 32 MiB are in flight, twice what 1 Gbit/s
/// and 100 ms need.
const PERMITS: usize = 8;

/// How long nothing was read and no other background fetch has run before a fetch starts that gives way.
const QUIET_TIME: Duration = Duration::from_secs(5);
/// The same where there was none since it was asked for: the container may not have started yet.
const FIRST_QUIET_TIME: Duration = Duration::from_secs(15);
/// How often a fetch that gives way looks for reads that did not have to wait: they are not counted by their time.
const SAMPLE_TIME: Duration = Duration::from_secs(1);

/// Fetches that give way are in flight in this number besides those that keep the link in use: a reader that comes has to wait for them.
const MORE_THAT_GIVE_WAY: usize = 1;

#[derive(Default)]
struct TrafficState {
    waiting: usize,
    running: usize,
    /// Those of `running` that give way.
    giving_way: usize,
    /// When the last reader had its bytes, or the last background fetch that does not give way its own. Of reads that did not wait, when
    /// one was noticed.
    busy_until: Option<Instant>,
}

/// Background fetches that start when nothing is read and no other background fetch runs, and has not for some time.
#[derive(Clone, Copy)]
pub(crate) struct GivesWay {
    /// When they were asked for.
    since: Instant,
    /// From then on they are background fetches as any others.
    until: Instant,
}

impl TrafficState {
    fn is_busy(&self) -> bool {
        self.waiting > 0 || self.running > self.giving_way
    }

    /// Makes a change after which it may not be busy any more.
    fn end(&mut self, change: impl FnOnce(&mut Self)) {
        let was_busy = self.is_busy();
        change(self);
        if was_busy && !self.is_busy() {
            self.busy_until = Some(Instant::now());
        }
    }

    /// From when on a fetch that gives way may start; `None` while another has precedence.
    fn quiet_at(&self, since: Instant) -> Option<Instant> {
        let at = match self.busy_until {
            Some(until) if until > since => until + QUIET_TIME,
            _ => since + FIRST_QUIET_TIME,
        };
        (!self.is_busy()).then_some(at)
    }

    fn has_permit(&self, beside_readers: usize) -> bool {
        let permits = match self.waiting {
            0 => PERMITS,
            _ => beside_readers.clamp(1, PERMITS),
        };
        self.running < permits
    }
}

/// Counts the fetches of all disks of a store.
#[derive(Clone, Default)]
pub(crate) struct Traffic(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: watch::Sender<TrafficState>,
    /// Whether a read was answered since the last look. It is outside of the state because every request sets it.
    has_served: AtomicBool,
}

/// A waiting reader; it is counted until it is dropped.
pub(crate) struct WaitingReader(Traffic);

/// The permit of a background fetch; it is given back when it is dropped.
pub(crate) struct BackgroundPermit {
    traffic: Traffic,
    gives_way: bool,
}

impl Traffic {
    /// Counts a reader that waits from now on.
    pub(crate) fn wait(&self) -> WaitingReader {
        self.0.state.send_modify(|state| state.waiting += 1);
        WaitingReader(self.clone())
    }

    /// A reader has its bytes. It is called for every request: no lock, and no clock.
    pub(crate) fn has_served(&self) {
        // most calls write nothing, so that the threads that serve share the cache line
        if !self.0.has_served.load(Ordering::Relaxed) {
            self.0.has_served.store(true, Ordering::Relaxed);
        }
    }

    /// The number of readers that wait, and of background fetches that run.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.0.state.borrow();
        (state.waiting, state.running)
    }

    /// Fetches that are asked for now, and give way for at most this time.
    pub(crate) fn give_way(&self, patience: Duration) -> GivesWay {
        // what was read before says nothing about the container that is to start
        self.notice_served();
        let since = Instant::now();
        GivesWay {
            since,
            until: since + patience,
        }
    }

    /// Waits for the permit of a background fetch. While a reader waits, `beside_readers` fetches at a time have one.
    pub(crate) async fn permit(&self, beside_readers: usize) -> BackgroundPermit {
        self.permit_of(beside_readers, false).await
    }

    /// The same for a fetch that gives way. `beside_readers` as above, when it does not give way any more.
    pub(crate) async fn permit_after_others(
        &self,
        gives_way: GivesWay,
        beside_readers: usize,
    ) -> BackgroundPermit {
        let mut state = self.0.state.subscribe();
        let quiet = async {
            loop {
                // the sender is in `self`, so the channel is open
                let few = |state: &TrafficState| {
                    let limit = beside_readers.saturating_add(MORE_THAT_GIVE_WAY);
                    !state.is_busy() && state.running < limit.min(PERMITS)
                };
                let _ = state.wait_for(few).await;
                self.notice_served();
                let at = state.borrow().quiet_at(gives_way.since);
                let Some(at) = at else { continue };
                let now = Instant::now();
                if at <= now {
                    return;
                }
                let busy = state.wait_for(TrafficState::is_busy);
                let _ = timeout_at(at.min(now + SAMPLE_TIME), busy).await;
            }
        };
        let _ = timeout_at(gives_way.until, quiet).await;
        self.permit_of(beside_readers, true).await
    }

    /// Counts the reads that did not wait.
    fn notice_served(&self) {
        self.0.state.send_if_modified(|state| {
            let has_served = self.0.has_served.swap(false, Ordering::Relaxed);
            if has_served {
                state.busy_until = Some(Instant::now());
            }
            has_served
        });
    }

    async fn permit_of(&self, beside_readers: usize, gives_way: bool) -> BackgroundPermit {
        let mut state = self.0.state.subscribe();
        loop {
            // the sender is in `self`, so the channel is open
            let has_permit = |state: &TrafficState| state.has_permit(beside_readers);
            let _ = state.wait_for(has_permit).await;
            let taken = self.0.state.send_if_modified(|state| {
                let free = state.has_permit(beside_readers);
                state.running += usize::from(free);
                state.giving_way += usize::from(free && gives_way);
                free
            });
            if taken {
                return BackgroundPermit {
                    traffic: self.clone(),
                    gives_way,
                };
            }
        }
    }
}

impl Traffic {
    /// Waits until no reader has waited for this time.
    pub(super) async fn quiet(&self, time: Duration) {
        let mut state = self.0.state.subscribe();
        loop {
            // the sender is in `self`, so the channel is open
            let _ = state.wait_for(|state| state.waiting == 0).await;
            let reader = async { state.wait_for(|state| state.waiting > 0).await.map(drop) };
            if tokio::time::timeout(time, reader).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for WaitingReader {
    fn drop(&mut self) {
        let end = |state: &mut TrafficState| state.end(|state| state.waiting -= 1);
        self.0.0.state.send_modify(end);
    }
}

impl Drop for BackgroundPermit {
    fn drop(&mut self) {
        let gives_way = usize::from(self.gives_way);
        self.traffic.0.state.send_modify(|state| {
            state.end(|state| {
                state.running -= 1;
                state.giving_way -= gives_way;
            })
        });
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_quiet_time_begins_when_the_last_reader_has_its_bytes() {
        let traffic = Traffic::default();
        let time = Duration::from_secs(30);
        let start = tokio::time::Instant::now();
        let reads = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(20)).await;
                let _reader = traffic.wait();
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        };
        tokio::join!(reads, traffic.quiet(time));
        assert_eq!(start.elapsed().as_secs(), 3 * 25 + 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fetch_that_gives_way_starts_after_readers_and_other_fetches() {
        let traffic = Traffic::default();
        let start = Instant::now();
        let patience = Duration::from_secs(30);
        let gives_way = traffic.give_way(patience);
        let others = async {
            for _ in 0..3 {
                let reader = traffic.wait();
                tokio::time::sleep(Duration::from_secs(2)).await;
                let fetch = traffic.permit(1).await;
                drop(reader);
                tokio::time::sleep(Duration::from_secs(2)).await;
                drop(fetch);
                tokio::time::sleep(QUIET_TIME / 2).await;
            }
        };
        let (_, first) = tokio::join!(others, traffic.permit_after_others(gives_way, 1));
        assert_eq!(start.elapsed(), Duration::from_millis(3 * 6500 + 2500));
        // others of the kind do not wait for it, but few are in flight
        let second = traffic.permit_after_others(gives_way, 1).await;
        assert_eq!(start.elapsed(), Duration::from_secs(22));
        let third = traffic.permit_after_others(gives_way, 1);
        let mut third = Box::pin(third);
        assert!((&mut third).now_or_never().is_none());
        drop(first);
        let third = third.await;
        assert_eq!(start.elapsed(), Duration::from_secs(22));
        drop((second, third));
        // not for ever
        let _reader = traffic.wait();
        let _late = traffic.permit_after_others(gives_way, 1).await;
        assert_eq!(start.elapsed(), patience);
        // where nothing happens, the container may not have started yet; what was read before was read by others
        let traffic = Traffic::default();
        let start = Instant::now();
        traffic.has_served();
        let gives_way = traffic.give_way(patience);
        tokio::time::sleep(SAMPLE_TIME).await;
        let _first = traffic.permit_after_others(gives_way, 1).await;
        assert_eq!(start.elapsed(), FIRST_QUIET_TIME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fetch_that_gives_way_starts_after_reads_that_need_no_fetch() {
        let traffic = Traffic::default();
        let start = Instant::now();
        let reads = async {
            for _ in 0..40 {
                traffic.has_served();
                tokio::time::sleep(QUIET_TIME / 2).await;
            }
        };
        let gives_way = traffic.give_way(Duration::from_secs(200));
        let (_, first) = tokio::join!(reads, traffic.permit_after_others(gives_way, 1));
        // the last read is noticed within the time of a look
        let last = QUIET_TIME / 2 * 39;
        let waited = start.elapsed() - last;
        assert!(
            waited >= QUIET_TIME && waited <= QUIET_TIME + SAMPLE_TIME,
            "{waited:?}"
        );
        // the next fetch of the kind gives way to new reads only
        drop(first);
        let before = Instant::now();
        drop(traffic.permit_after_others(gives_way, 1).await);
        assert_eq!(before.elapsed(), Duration::ZERO);
        traffic.has_served();
        let _third = traffic.permit_after_others(gives_way, 1).await;
        assert_eq!(before.elapsed(), QUIET_TIME);
        // a reader that goes on does not hold it up for ever
        let gives_way = traffic.give_way(QUIET_TIME * 4);
        let before = Instant::now();
        let reads = async {
            loop {
                traffic.has_served();
                tokio::time::sleep(SAMPLE_TIME / 2).await;
            }
        };
        tokio::select! {
            () = reads => {}
            _ = traffic.permit_after_others(gives_way, 1) => {}
        }
        assert_eq!(before.elapsed(), QUIET_TIME * 4);
    }

    #[tokio::test]
    async fn while_a_reader_waits_few_background_fetches_have_a_permit() {
        let traffic = Traffic::default();
        let reader = traffic.wait();
        let three: Vec<BackgroundPermit> =
            futures_util::future::join_all((0..3).map(|_| traffic.permit(3))).await;
        assert!(traffic.permit(3).now_or_never().is_none());
        drop(three);
        let first = traffic.permit(1).await;
        assert!(traffic.permit(1).now_or_never().is_none());
        let second_reader = traffic.wait();
        drop(reader);
        assert!(traffic.permit(1).now_or_never().is_none());
        drop(first);
        let first = traffic.permit(1).await;
        let waits = tokio::spawn({
            let traffic = traffic.clone();
            async move { traffic.permit(1).await }
        });
        drop(second_reader);
        let second = waits.await.unwrap();
        let rest: Vec<BackgroundPermit> =
            futures_util::future::join_all((2..PERMITS).map(|_| traffic.permit(1))).await;
        assert!(traffic.permit(1).now_or_never().is_none());
        drop((first, second, rest));
        assert!(traffic.permit(1).now_or_never().is_some());
    }
}
