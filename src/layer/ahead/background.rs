//! Who may use the link: readers at once, and what nobody waits for yet in what they leave.
//!
//! Background fetches take turns, over all disks of a store. While no reader waits there are enough of them to fill a fast link over a
//! long distance; while one does there are as many as keep the link in use, and no more: it is not idle while the reader's request is
//! on its way or its span is being decoded, and over a short distance that is one, so that the reader has at least half of the link.

use std::sync::Arc;

use tokio::sync::watch;

/// Background fetches at a time while no reader waits: with [`super::fill::FETCH_BYTES`] each, 32 MiB on their way, twice what
/// 1 Gbit/s and 100 ms hold.
const TURNS: usize = 8;
#[derive(Default)]
struct TrafficState {
    waiting: usize,
    running: usize,
}

impl TrafficState {
    fn has_turn(&self, beside_readers: usize) -> bool {
        let turns = match self.waiting {
            0 => TURNS,
            _ => beside_readers.clamp(1, TURNS),
        };
        self.running < turns
    }
}

/// Those who fetch, in all disks of a store.
#[derive(Clone, Default)]
pub(crate) struct Traffic(Arc<watch::Sender<TrafficState>>);

/// A reader that waits, as long as this lives.
pub(crate) struct WaitingReader(Traffic);

/// A background fetch, as long as this lives.
pub(crate) struct BackgroundTurn(Traffic);

impl Traffic {
    /// A reader waits from now on.
    pub(crate) fn wait(&self) -> WaitingReader {
        self.0.send_modify(|state| state.waiting += 1);
        WaitingReader(self.clone())
    }

    /// Waits for a turn of a background fetch, of which `beside_readers` at a time have one while a reader waits.
    pub(crate) async fn turn(&self, beside_readers: usize) -> BackgroundTurn {
        let mut state = self.0.subscribe();
        loop {
            // the sender is in `self`: it is not closed
            let has_turn = |state: &TrafficState| state.has_turn(beside_readers);
            let _ = state.wait_for(has_turn).await;
            let taken = self.0.send_if_modified(|state| {
                let free = state.has_turn(beside_readers);
                state.running += usize::from(free);
                free
            });
            if taken {
                return BackgroundTurn(self.clone());
            }
        }
    }
}

impl Drop for WaitingReader {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.waiting -= 1);
    }
}

impl Drop for BackgroundTurn {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn beside_a_reader_few_fetches_have_a_turn() {
        let traffic = Traffic::default();
        let reader = traffic.wait();
        let three: Vec<BackgroundTurn> =
            futures_util::future::join_all((0..3).map(|_| traffic.turn(3))).await;
        assert!(traffic.turn(3).now_or_never().is_none());
        drop(three);
        let first = traffic.turn(1).await;
        assert!(traffic.turn(1).now_or_never().is_none());
        let second_reader = traffic.wait();
        drop(reader);
        assert!(traffic.turn(1).now_or_never().is_none());
        drop(first);
        let first = traffic.turn(1).await;
        let waits = tokio::spawn({
            let traffic = traffic.clone();
            async move { traffic.turn(1).await }
        });
        drop(second_reader);
        let second = waits.await.unwrap();
        let rest: Vec<BackgroundTurn> =
            futures_util::future::join_all((2..TURNS).map(|_| traffic.turn(1))).await;
        assert!(traffic.turn(1).now_or_never().is_none());
        drop((first, second, rest));
        assert!(traffic.turn(1).now_or_never().is_some());
    }
}
