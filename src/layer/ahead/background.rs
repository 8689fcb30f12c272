//! Divides the link: fetches that readers wait for start at once, and background fetches use what these leave.
//!
//! Background fetches need permits, over all disks of a store. While no reader waits, there are enough permits to fill a fast link with a
//! long round trip. While a reader waits, there are as many as keep the link in use, so that it is not idle while the reader's request
//! travels or its span is decoded. On a short round trip that is one, so the reader has at least half of the link.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

/// Background fetches at a time while no reader waits: with [`super::fill::FETCH_BYTES`] each, 32 MiB are in flight, twice what 1 Gbit/s
/// and 100 ms need.
const PERMITS: usize = 8;

#[derive(Default)]
struct TrafficState {
    waiting: usize,
    running: usize,
}

impl TrafficState {
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
pub(crate) struct Traffic(Arc<watch::Sender<TrafficState>>);

/// A waiting reader; it is counted until it is dropped.
pub(crate) struct WaitingReader(Traffic);

/// The permit of a background fetch; it is given back when it is dropped.
pub(crate) struct BackgroundPermit(Traffic);

impl Traffic {
    /// Counts a reader that waits from now on.
    pub(crate) fn wait(&self) -> WaitingReader {
        self.0.send_modify(|state| state.waiting += 1);
        WaitingReader(self.clone())
    }

    /// The number of readers that wait, and of background fetches that run.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.0.borrow();
        (state.waiting, state.running)
    }

    /// Waits for the permit of a background fetch. While a reader waits, `beside_readers` fetches at a time have one.
    pub(crate) async fn permit(&self, beside_readers: usize) -> BackgroundPermit {
        let mut state = self.0.subscribe();
        loop {
            // the sender is in `self`, so the channel is open
            let has_permit = |state: &TrafficState| state.has_permit(beside_readers);
            let _ = state.wait_for(has_permit).await;
            let taken = self.0.send_if_modified(|state| {
                let free = state.has_permit(beside_readers);
                state.running += usize::from(free);
                free
            });
            if taken {
                return BackgroundPermit(self.clone());
            }
        }
    }
}

impl Traffic {
    /// Waits until no reader has waited for this time.
    pub(super) async fn quiet(&self, time: Duration) {
        let mut state = self.0.subscribe();
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
        self.0.0.send_modify(|state| state.waiting -= 1);
    }
}

impl Drop for BackgroundPermit {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.running -= 1);
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
