//! Whether a host answers what it is asked.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Bytes that count as progress: a host that sends less in the time that its caller has is as good as silent.
const PROGRESS: u64 = 64 << 10;

/// For how long a host has been waited for since its last progress. Time in which nobody waits for it does not count.
#[derive(Default)]
pub(super) struct Activity(Mutex<State>);

#[derive(Default)]
struct State {
    /// Number of requests that are waited for.
    waiting: usize,
    /// When the time began that `waited` does not have yet.
    since: Option<Instant>,
    /// The time since the last progress in which a request was waited for.
    waited: Duration,
    /// Bytes that have come since the last progress.
    bytes: u64,
}

/// A request that is waited for, until this is dropped.
pub(super) struct Waiting(Arc<Activity>);

impl State {
    fn waited(&self) -> Duration {
        let now = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        self.waited + now
    }

    fn progress(&mut self) {
        self.bytes = 0;
        self.waited = Duration::ZERO;
        self.since = self.since.map(|_| Instant::now());
    }
}

impl Activity {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is waited for.
    pub(super) fn wait(self: &Arc<Self>) -> Waiting {
        let mut state = self.state();
        state.waiting += 1;
        state.since.get_or_insert_with(Instant::now);
        Waiting(Arc::clone(self))
    }

    /// Bytes of an answer have come.
    pub(super) fn arrived(&self, bytes: usize) {
        let mut state = self.state();
        state.bytes = state.bytes.saturating_add(bytes as u64);
        if state.bytes >= PROGRESS {
            state.progress();
        }
    }

    /// An answer is complete.
    pub(super) fn completed(&self) {
        self.state().progress();
    }

    /// Whether it was waited for as long as this without progress.
    pub(super) fn is_silent(&self, time: Duration) -> bool {
        self.state().waited() >= time
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        if state.waiting == 0 {
            state.waited = state.waited();
            state.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_secs(2);

    async fn pass(time: Duration) {
        tokio::time::advance(time).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_does_not_answer_or_drips_is_silent() {
        let activity = Arc::new(Activity::default());
        let _waiting = activity.wait();
        assert!(!activity.is_silent(TIME));
        pass(TIME / 2).await;
        activity.arrived(1000);
        let _other = activity.wait();
        assert!(!activity.is_silent(TIME));
        pass(TIME / 2).await;
        assert!(activity.is_silent(TIME));
        activity.arrived(PROGRESS as usize - 1000);
        assert!(!activity.is_silent(TIME));
        pass(TIME).await;
        assert!(activity.is_silent(TIME));
        activity.completed();
        assert!(!activity.is_silent(TIME));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_waits_does_not_count() {
        let activity = Arc::new(Activity::default());
        for _ in 0..3 {
            let waiting = activity.wait();
            pass(TIME / 4).await;
            drop(waiting);
            pass(10 * TIME).await;
            assert!(!activity.is_silent(TIME));
        }
        let _waiting = activity.wait();
        pass(TIME / 4).await;
        assert!(activity.is_silent(TIME));
    }
}
