//! What a watchdog sees of a file's server.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::journal::{SLOTS, THREADS};

/// The turns of the threads, and since when what could be answered has not been. Times are those of [`now`], or zero.
#[derive(Debug)]
pub(super) struct Pulse {
    turns: [AtomicU64; THREADS],
    in_hand: [AtomicU64; THREADS],
    fetched: [AtomicU64; SLOTS],
}

impl Pulse {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            turns: std::array::from_fn(|_| zero()),
            in_hand: std::array::from_fn(|_| zero()),
            fetched: std::array::from_fn(|_| zero()),
        }
    }

    /// A thread makes a turn; with a request in its hand or without.
    pub(super) fn turn(&self, thread: usize, has_request: bool) {
        self.turns[thread].fetch_add(1, Relaxed);
        let since = if has_request { now() } else { 0 };
        self.in_hand[thread].store(since, Relaxed);
    }

    /// The data of the read in a slot has come, or the read is answered.
    pub(super) fn fetched(&self, slot: usize, is_waiting: bool) {
        let since = if is_waiting { now() } else { 0 };
        self.fetched[slot].store(since, Relaxed);
    }

    /// Turns of the thread that has made the fewest.
    pub(super) fn turns(&self) -> u64 {
        let turns = self.turns.iter().map(|turns| turns.load(Relaxed));
        turns.min().unwrap_or(0)
    }

    /// The age of the oldest request that could be answered.
    pub(super) fn oldest_ready(&self) -> Option<Duration> {
        let times = self.in_hand.iter().chain(&self.fetched);
        let oldest = times
            .map(|time| time.load(Relaxed))
            .filter(|time| *time != 0)
            .min();
        oldest.map(|since| Duration::from_micros(now().saturating_sub(since)))
    }
}

/// Microseconds since some moment in this process; not zero.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed().as_micros();
    u64::try_from(elapsed).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_the_oldest_grows_until_it_is_answered() {
        let pulse = Pulse::new();
        assert_eq!((pulse.turns(), pulse.oldest_ready()), (0, None));
        pulse.turn(0, true);
        assert_eq!(pulse.turns(), 0, "the other thread has made none");
        std::thread::sleep(Duration::from_millis(2));
        pulse.fetched(7, true);
        pulse.turn(1, false);
        assert_eq!(pulse.turns(), 1);
        assert!(pulse.oldest_ready().unwrap() >= Duration::from_millis(2));
        pulse.turn(0, false);
        assert!(pulse.oldest_ready().unwrap() < Duration::from_millis(2));
        pulse.fetched(7, false);
        assert_eq!(pulse.oldest_ready(), None);
    }
}
