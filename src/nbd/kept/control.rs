//! What other threads see of a connection's thread, and what they can tell it.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// The state of a connection's thread, for a watchdog, and the request to stop it.
#[derive(Debug, Default)]
pub struct Control {
    is_stopping: AtomicBool,
    turns: AtomicU64,
    /// Microseconds of [`now`], or zero.
    oldest_ready: AtomicU64,
}

impl Control {
    /// Makes the thread stop within a second, for a planned hand-over: it answers the requests whose data is present, and leaves the others
    /// in the journal.
    pub fn stop(&self) {
        self.is_stopping.store(true, Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Relaxed)
    }

    /// Turns of the thread's loop. While it serves it makes one at least every second, also without requests.
    pub fn turns(&self) -> u64 {
        self.turns.load(Relaxed)
    }

    /// For how long the oldest request that could be answered has not been: its data is present, or has come from the network.
    pub fn oldest_ready(&self) -> Option<Duration> {
        match self.oldest_ready.load(Relaxed) {
            0 => None,
            since => Some(Duration::from_micros(now().saturating_sub(since))),
        }
    }

    /// A turn ends: the oldest request that could be answered is this old, if there is one.
    pub(super) fn turn(&self, oldest_ready: Option<u64>) {
        self.turns.fetch_add(1, Relaxed);
        self.oldest_ready.store(oldest_ready.unwrap_or(0), Relaxed);
    }

    /// A request can be answered from now on. Older ones count.
    pub(super) fn has_ready(&self) {
        if self.oldest_ready.load(Relaxed) == 0 {
            self.oldest_ready.store(now(), Relaxed);
        }
    }
}

/// Microseconds since some moment in this process; not zero.
pub(super) fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed().as_micros();
    u64::try_from(elapsed).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_a_request_grows_until_it_is_answered() {
        let control = Control::default();
        assert_eq!((control.turns(), control.oldest_ready()), (0, None));
        control.has_ready();
        let first = control.oldest_ready.load(Relaxed);
        control.has_ready();
        assert_eq!(control.oldest_ready.load(Relaxed), first);
        std::thread::sleep(Duration::from_millis(2));
        assert!(control.oldest_ready().unwrap() >= Duration::from_millis(2));
        control.turn(None);
        assert_eq!((control.turns(), control.oldest_ready()), (1, None));
        assert!(!control.is_stopping());
        control.stop();
        assert!(control.is_stopping());
    }
}
