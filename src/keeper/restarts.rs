//! How long a daemon that has died is not started again.

use std::time::Duration;

/// The pauses before the next start: none, then one that doubles as long as daemons die soon.
#[derive(Clone, Debug)]
pub(super) struct Restarts {
    /// The first pause that is not nothing.
    first: Duration,
    /// The longest pause.
    longest: Duration,
    /// A daemon that has run this long has started well.
    good: Duration,
    /// How many have died in a row without.
    died: u32,
}

impl Restarts {
    pub(super) fn new(first: Duration, longest: Duration, good: Duration) -> Self {
        Self {
            first,
            longest,
            good,
            died: 0,
        }
    }

    /// The pause after a daemon that was ready for this long.
    pub(super) fn pause(&mut self, ran: Duration) -> Duration {
        if ran >= self.good {
            self.died = 0;
        }
        let pause = match self.died.checked_sub(1) {
            None => Duration::ZERO,
            Some(doubled) => {
                let factor = 1_u32.checked_shl(doubled).unwrap_or(u32::MAX);
                self.first.saturating_mul(factor).min(self.longest)
            }
        };
        self.died = self.died.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit_and_end_with_a_good_run() {
        let millis = Duration::from_millis;
        let mut restarts = Restarts::new(millis(100), millis(5000), millis(10_000));
        let mut pauses = |ran: u64, times: usize| -> Vec<u128> {
            let pauses = (0..times).map(|_| restarts.pause(millis(ran)).as_millis());
            pauses.collect()
        };
        assert_eq!(pauses(9_999, 8), [0, 100, 200, 400, 800, 1600, 3200, 5000]);
        assert_eq!(pauses(0, 100), [5000; 100]);
        assert_eq!(pauses(10_000, 2), [0, 0]);
        assert_eq!(pauses(0, 2), [100, 200]);
    }
}
