//! What a watchdog sees of a file's server.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::journal::THREADS;
use crate::kernel::kept::ServerPulse;

/// The turns of a thread that has ended.
const ENDED: u64 = u64::MAX;

/// The turns of the threads.
#[derive(Debug)]
pub(super) struct Pulse([AtomicU64; THREADS]);

impl Pulse {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// A thread makes a turn.
    pub(super) fn turn(&self, thread: usize) {
        self.0[thread].fetch_add(1, Relaxed);
    }

    /// A thread has ended.
    pub(super) fn ended(&self, thread: usize) {
        self.0[thread].store(ENDED, Relaxed);
    }
}

impl ServerPulse for Pulse {
    fn turns(&self) -> Vec<Option<u64>> {
        let turns = self.0.iter().map(|turns| turns.load(Relaxed));
        turns
            .map(|turns| (turns < ENDED).then_some(turns))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_count_until_a_thread_has_ended() {
        let pulse = Pulse::new();
        pulse.turn(0);
        assert_eq!(pulse.turns(), [Some(1), Some(0)]);
        pulse.turn(1);
        pulse.ended(0);
        assert_eq!(pulse.turns(), [None, Some(1)]);
    }
}
