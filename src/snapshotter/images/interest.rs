//! Whether anybody waits for an image that is pulled into disks.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long an image is pulled although no request waits for it: containerd's next request may be on its way.
const ABANDONED_TIME: Duration = Duration::from_secs(60);

/// Who waits for an image.
pub(super) struct Interest(Mutex<State>);

struct State {
    waiting: usize,
    /// When the last request has ended.
    since: Instant,
    /// containerd pulls the image.
    is_ended: bool,
}

/// A request that waits.
pub(super) struct Waiting(Arc<Interest>);

impl Interest {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            waiting: 0,
            since: Instant::now(),
            is_ended: false,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request waits until the guard is dropped.
    pub(super) fn enter(self: &Arc<Self>) -> Waiting {
        self.state().waiting += 1;
        Waiting(Arc::clone(self))
    }

    /// containerd pulls the image itself.
    pub(super) fn end(&self) {
        self.state().is_ended = true;
    }

    /// Whether nobody waits any more.
    pub(super) fn is_over(&self) -> bool {
        let state = self.state();
        state.is_ended || state.waiting == 0 && state.since.elapsed() >= ABANDONED_TIME
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        state.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_image_is_abandoned_a_minute_after_the_last_request() {
        let interest = Interest::new();
        let pass = |time: Duration| tokio::time::advance(time);
        let waiting = interest.enter();
        pass(2 * ABANDONED_TIME).await;
        assert!(!interest.is_over());
        drop(waiting);
        pass(ABANDONED_TIME / 2).await;
        assert!(!interest.is_over());
        pass(ABANDONED_TIME / 2).await;
        assert!(interest.is_over());
        // the next request is interested again, until containerd pulls the image
        let _waiting = interest.enter();
        assert!(!interest.is_over());
        interest.end();
        assert!(interest.is_over());
    }
}
