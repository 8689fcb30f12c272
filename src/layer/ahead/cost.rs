//! What single spans cost an image's readers, and what they save them: both by what has been seen of the link and of this machine.
//!
//! They cost the time in which a reader waits and its bytes do not come: round trips, and decoding. They save two things: what a pull takes for
//! unpacking all layers after their bytes have come (as long as no more has been lost than that, whoever reads the whole image ends no
//! later than after a pull), and the time in which a link brings what nobody wants. Where that is short, over a fast link and a long
//! distance, it is soon lost in waits.

use std::time::{Duration, Instant};

/// How long a pull unpacks, by what decoding takes here: it decompresses one layer after another on one core, slower than spans are decoded,
/// hashes it and makes files. Four to eight times as long was measured.
const UNPACKING: u32 = 3;

/// What of one wait counts at most: longer ones are those for a source in trouble, and say nothing of single spans.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// How exactly the coming of bytes can be timed: a thread wakes up no faster.
const RESOLUTION: Duration = Duration::from_micros(100);

/// Bytes after which what was seen of a rate before counts for half: a connection's first bytes come slowly.
const RECENT: u64 = 16 << 20;

/// What was measured; bytes are compressed ones.
#[derive(Debug, Default)]
pub(crate) struct Cost {
    waited: WaitCover,
    /// Bytes that have come.
    fetched: u64,
    /// The least time that a first byte has taken.
    round_trip: Option<Duration>,
    transfer: DecodePace,
    decoding: DecodePace,
}

impl Cost {
    /// A reader has waited, and got what it wanted.
    pub(crate) fn waited(&mut self, from: Instant, to: Instant) {
        let longest = to.checked_sub(LONGEST_WAIT).unwrap_or(from);
        self.waited.add(from.max(longest), to);
    }

    /// Bytes have come that were `asked` for then: those of the `first_piece` at once, and the last ones at this moment.
    pub(crate) fn came(
        &mut self,
        bytes: u64,
        first_piece: u64,
        asked: Instant,
        first: Instant,
        last: Instant,
    ) {
        let waited = first.saturating_duration_since(asked);
        self.round_trip = Some(self.round_trip.map_or(waited, |least| least.min(waited)));
        self.fetched = self.fetched.saturating_add(bytes);
        // the first piece was on its way before it could be seen; where it is all, that is all that there is to see
        let timed = match bytes.saturating_sub(first_piece) {
            0 => bytes,
            later => later,
        };
        let last = last.max(first + RESOLUTION);
        self.transfer.add(timed, first, last);
    }

    /// Bytes were decoded, by one thread.
    pub(crate) fn decoded(&mut self, bytes: u64, took: Duration) {
        self.decoding.add_time(bytes, took);
    }

    /// Bytes that are on their way when the link is in use all the time.
    pub(crate) fn on_the_way(&self) -> u64 {
        self.round_trip
            .map_or(0, |round_trip| self.transfer.bytes_in(round_trip))
    }

    /// Whether readers have lost as much time as so many bytes take to come, or a pull to unpack them. False as long as nothing is known.
    pub(super) fn is_reached(&self, bytes: u64) -> bool {
        let lost = self
            .transfer
            .time_of(self.fetched)
            .map(|transfer| self.waited.total.saturating_sub(transfer));
        let unpacking = self
            .decoding
            .time_of(bytes)
            .and_then(|decoding| decoding.checked_mul(UNPACKING));
        let saved = unpacking.zip(self.transfer.time_of(bytes));
        saved.is_some_and(|(unpacking, coming)| lost >= Some(unpacking.min(coming)))
    }
}

/// The time that intervals cover together. They are added in the order of their ends; what a later one has before the end of an
/// earlier one is left out.
#[derive(Debug, Default)]
struct WaitCover {
    total: Duration,
    until: Option<Instant>,
}

impl WaitCover {
    fn add(&mut self, from: Instant, to: Instant) {
        let from = self.until.map_or(from, |until| until.max(from));
        if let Some(more) = to.checked_duration_since(from) {
            self.total = self.total.saturating_add(more);
            self.until = Some(to);
        }
    }
}

/// Bytes by time, those seen last above all.
#[derive(Debug, Default)]
struct DecodePace {
    bytes: u64,
    time: WaitCover,
}

impl DecodePace {
    fn add(&mut self, bytes: u64, from: Instant, to: Instant) {
        self.time.add(from, to);
        self.add_bytes(bytes);
    }

    fn add_time(&mut self, bytes: u64, time: Duration) {
        self.time.total = self.time.total.saturating_add(time);
        self.add_bytes(bytes);
    }

    fn add_bytes(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > RECENT {
            self.bytes /= 2;
            self.time.total /= 2;
        }
    }

    fn bytes_in(&self, time: Duration) -> u64 {
        let times = time.as_secs_f64() / self.time.total.as_secs_f64();
        (self.bytes as f64 * times) as u64 // the nearest number; 0 without any
    }

    fn time_of(&self, bytes: u64) -> Option<Duration> {
        let times = bytes as f64 / self.bytes as f64; // infinite or none without any
        Duration::try_from_secs_f64(self.time.total.as_secs_f64() * times).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn moments() -> impl Fn(u32) -> Instant {
        let start = Instant::now();
        move |milliseconds| start + MILLISECOND * milliseconds
    }

    #[test]
    fn waits_that_overlap_count_once() {
        let at = moments();
        let mut cover = WaitCover::default();
        for (from, to) in [(0, 10), (5, 15), (12, 15), (30, 40)] {
            cover.add(at(from), at(to));
        }
        assert_eq!(cover.total, MILLISECOND * 25);
        // it began first and ended last
        cover.add(at(20), at(50));
        assert_eq!(cover.total, MILLISECOND * 35);
    }

    /// Of a disk of which a thousand bytes take four milliseconds to come, and one to be decoded.
    fn known(at: &impl Fn(u32) -> Instant) -> Cost {
        let mut cost = Cost::default();
        cost.came(1000, 0, at(0), at(0), at(4));
        cost.decoded(1000, MILLISECOND);
        cost
    }

    #[test]
    fn what_is_lost_is_waiting_without_the_transfer() {
        let at = moments();
        let mut cost = Cost::default();
        cost.waited(at(0), at(1000));
        assert!(!cost.is_reached(1), "nothing is known of either");
        let mut cost = known(&at);
        cost.waited(at(0), at(304));
        assert!(cost.is_reached(100_000));
        assert!(!cost.is_reached(100_001));
        // what came while nobody waited is time saved
        cost.came(1000, 0, at(400), at(400), at(404));
        assert!(cost.is_reached(98_666));
        assert!(!cost.is_reached(98_667));
    }

    #[test]
    fn what_comes_sooner_than_a_pull_unpacks_it_is_worth_no_more_waits() {
        let at = moments();
        let mut cost = Cost::default();
        // a thousand bytes take one millisecond to come, and three to be unpacked
        cost.came(1000, 0, at(0), at(0), at(1));
        cost.decoded(1000, MILLISECOND);
        cost.waited(at(0), at(101));
        assert!(cost.is_reached(100_000));
        assert!(!cost.is_reached(100_001));
    }

    #[test]
    fn what_is_on_the_way_is_a_round_trip_long() {
        let at = moments();
        let mut cost = Cost::default();
        assert_eq!(cost.on_the_way(), 0);
        cost.came(1 << 20, 0, at(0), at(100), at(110));
        assert_eq!(cost.on_the_way() >> 20, 10);
        // it was in a queue
        cost.came(1 << 20, 0, at(200), at(500), at(510));
        assert_eq!(cost.on_the_way() >> 20, 10);
    }

    #[test]
    fn a_wait_for_a_source_in_trouble_counts_in_part() {
        let at = moments();
        let mut cost = known(&at);
        cost.waited(at(0), at(60_000));
        assert!(cost.is_reached(665_000));
        assert!(!cost.is_reached(666_000));
    }

    #[test]
    fn a_pace_is_that_of_late() {
        let at = moments();
        let mut pace = DecodePace::default();
        // a slow start
        pace.add(RECENT, at(0), at(10_000));
        for number in 0..20 {
            let start = 20_000 + number * 100;
            pace.add(RECENT / 2, at(start), at(start + 50));
        }
        let time = pace.time_of(RECENT).unwrap();
        assert!(time < 105 * MILLISECOND, "{time:?}");
        assert_eq!(DecodePace::default().time_of(7), None);
    }

    #[test]
    fn the_first_piece_says_nothing_of_the_pace() {
        let at = moments();
        // 900 of a thousand bytes were there at once, and the other hundred took ten milliseconds: ten bytes a millisecond
        let mut pieces = Cost::default();
        pieces.came(1000, 900, at(0), at(0), at(10));
        assert_eq!(pieces.transfer.time_of(100), Some(10 * MILLISECOND));
        assert_eq!(pieces.fetched, 1000);
        // what came at once is all that there is to see
        let mut whole = Cost::default();
        whole.came(1000, 1000, at(0), at(0), at(10));
        assert_eq!(whole.transfer.time_of(1000), Some(10 * MILLISECOND));
    }

    #[test]
    fn bytes_that_come_at_one_moment_have_taken_what_can_be_timed() {
        let at = moments();
        let mut cost = Cost::default();
        // the clock has not moved, or went back between two threads
        for last in [at(10), at(9)] {
            cost.came(1000, 0, at(0), at(10), last);
        }
        assert_eq!(cost.transfer.time_of(2000), Some(RESOLUTION));
        assert_eq!(cost.on_the_way(), 200_000);
        cost.decoded(1000, MILLISECOND);
        cost.waited(at(0), at(12));
        assert!(cost.is_reached(100_000) && !cost.is_reached(1_000_000));
    }
}
