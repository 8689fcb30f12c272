//! What fetching single spans costs the readers of an image, and what it saves them, from measurements of the link and of this machine.
//!
//! The cost is the time in which a reader waits and none of its bytes arrive: round trips and decoding. Two times are saved. One is the
//! time that a pull needs to unpack all layers after their bytes have arrived: as long as readers have not lost more than that, a program
//! that reads the whole image ends no later than after a pull. The other is the time in which the link transfers bytes that are not needed.
//! If that is short, as on a fast link with a long round trip, the waits soon exceed it.

use std::time::{Duration, Instant};

/// How much longer a pull needs to unpack a layer than decoding takes here: it decompresses one layer after another on one core, slower
/// than spans are decoded, hashes it and creates files. Four to eight times as long was measured.
const UNPACKING: u32 = 3;

/// Maximum time that counts of one wait: longer waits are caused by a failing source, and not by fetching single spans.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Resolution at which the arrival of bytes can be timed: a thread does not wake up faster.
const RESOLUTION: Duration = Duration::from_micros(100);

/// After this many bytes the previous measurements of a rate count half: the first bytes of a connection arrive slowly.
const RECENT: u64 = 16 << 20;

/// The measurements; bytes are compressed bytes.
#[derive(Debug, Default)]
pub(crate) struct Cost {
    waited: CoveredTime,
    /// Bytes that have arrived.
    fetched: u64,
    /// The shortest time to a first byte.
    round_trip: Option<Duration>,
    transfer: Rate,
    decoding: Rate,
}

impl Cost {
    /// A reader has waited successfully.
    pub(crate) fn waited(&mut self, from: Instant, to: Instant) {
        let longest = to.checked_sub(LONGEST_WAIT).unwrap_or(from);
        self.waited.add(from.max(longest), to);
    }

    /// Requested bytes have arrived: `first_piece` of them at the time `first`, the last ones at `last`.
    pub(crate) fn received(
        &mut self,
        bytes: u64,
        first_piece: u64,
        requested: Instant,
        first: Instant,
        last: Instant,
    ) {
        let waited = first.saturating_duration_since(requested);
        self.round_trip = Some(self.round_trip.map_or(waited, |least| least.min(waited)));
        self.fetched = self.fetched.saturating_add(bytes);
        // the transfer of the first piece cannot be timed; if it is all, its bytes are used
        let timed = match bytes.saturating_sub(first_piece) {
            0 => bytes,
            later => later,
        };
        let last = last.max(first + RESOLUTION);
        self.transfer.add(timed, first, last);
    }

    /// One thread has decoded bytes.
    pub(crate) fn decoded(&mut self, bytes: u64, took: Duration) {
        self.decoding.add_time(bytes, took);
    }

    /// Bytes in flight that keep the link in use all the time: its rate times its round trip. 0 as long as nothing was measured.
    pub(crate) fn in_flight_target(&self) -> u64 {
        self.round_trip
            .map_or(0, |round_trip| self.transfer.bytes_in(round_trip))
    }

    /// Whether readers have lost as much time as this many bytes take to transfer, or a pull takes to unpack them. False as long as nothing
    /// was measured.
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
        saved.is_some_and(|(unpacking, transfer)| lost >= Some(unpacking.min(transfer)))
    }
}

/// The length of the union of intervals. They are added in the order of their ends; the part of an interval that is before the end of an
/// earlier one is not counted.
#[derive(Debug, Default)]
struct CoveredTime {
    total: Duration,
    until: Option<Instant>,
}

impl CoveredTime {
    fn add(&mut self, from: Instant, to: Instant) {
        let from = self.until.map_or(from, |until| until.max(from));
        if let Some(more) = to.checked_duration_since(from) {
            self.total = self.total.saturating_add(more);
            self.until = Some(to);
        }
    }
}

/// A rate in bytes per time, in which recent measurements have more weight.
#[derive(Debug, Default)]
struct Rate {
    bytes: u64,
    time: CoveredTime,
}

impl Rate {
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
        (self.bytes as f64 * times) as u64 // rounded; 0 if nothing was measured
    }

    fn time_of(&self, bytes: u64) -> Option<Duration> {
        let times = bytes as f64 / self.bytes as f64; // not finite if nothing was measured
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
        let mut cover = CoveredTime::default();
        for (from, to) in [(0, 10), (5, 15), (12, 15), (30, 40)] {
            cover.add(at(from), at(to));
        }
        assert_eq!(cover.total, MILLISECOND * 25);
        // this interval began first and ended last
        cover.add(at(20), at(50));
        assert_eq!(cover.total, MILLISECOND * 35);
    }

    /// A link and a machine where 1000 bytes take four milliseconds to transfer and one to decode.
    fn measured(at: &impl Fn(u32) -> Instant) -> Cost {
        let mut cost = Cost::default();
        cost.received(1000, 0, at(0), at(0), at(4));
        cost.decoded(1000, MILLISECOND);
        cost
    }

    #[test]
    fn the_lost_time_is_waiting_without_the_transfer() {
        let at = moments();
        let mut cost = Cost::default();
        cost.waited(at(0), at(1000));
        assert!(!cost.is_reached(1), "nothing was measured");
        let mut cost = measured(&at);
        cost.waited(at(0), at(304));
        assert!(cost.is_reached(100_000));
        assert!(!cost.is_reached(100_001));
        // a transfer while no reader waits is time saved
        cost.received(1000, 0, at(400), at(400), at(404));
        assert!(cost.is_reached(98_666));
        assert!(!cost.is_reached(98_667));
    }

    #[test]
    fn the_limit_is_the_shorter_of_transfer_and_unpacking() {
        let at = moments();
        let mut cost = Cost::default();
        // 1000 bytes take one millisecond to transfer, and three to unpack
        cost.received(1000, 0, at(0), at(0), at(1));
        cost.decoded(1000, MILLISECOND);
        cost.waited(at(0), at(101));
        assert!(cost.is_reached(100_000));
        assert!(!cost.is_reached(100_001));
    }

    #[test]
    fn the_in_flight_target_is_the_rate_times_the_round_trip() {
        let at = moments();
        let mut cost = Cost::default();
        assert_eq!(cost.in_flight_target(), 0);
        cost.received(1 << 20, 0, at(0), at(100), at(110));
        assert_eq!(cost.in_flight_target() >> 20, 10);
        // the request was queued
        cost.received(1 << 20, 0, at(200), at(500), at(510));
        assert_eq!(cost.in_flight_target() >> 20, 10);
    }

    #[test]
    fn a_wait_for_a_failing_source_counts_in_part() {
        let at = moments();
        let mut cost = measured(&at);
        cost.waited(at(0), at(60_000));
        assert!(cost.is_reached(665_000));
        assert!(!cost.is_reached(666_000));
    }

    #[test]
    fn recent_measurements_determine_a_rate() {
        let at = moments();
        let mut rate = Rate::default();
        // a slow start
        rate.add(RECENT, at(0), at(10_000));
        for number in 0..20 {
            let start = 20_000 + number * 100;
            rate.add(RECENT / 2, at(start), at(start + 50));
        }
        let time = rate.time_of(RECENT).unwrap();
        assert!(time < 105 * MILLISECOND, "{time:?}");
        assert_eq!(Rate::default().time_of(7), None);
    }

    #[test]
    fn the_first_piece_does_not_count_for_the_rate() {
        let at = moments();
        // 900 of 1000 bytes arrived at once, and the other hundred in ten milliseconds: ten bytes per millisecond
        let mut pieces = Cost::default();
        pieces.received(1000, 900, at(0), at(0), at(10));
        assert_eq!(pieces.transfer.time_of(100), Some(10 * MILLISECOND));
        assert_eq!(pieces.fetched, 1000);
        // if all bytes arrived at once, all are used
        let mut whole = Cost::default();
        whole.received(1000, 1000, at(0), at(0), at(10));
        assert_eq!(whole.transfer.time_of(1000), Some(10 * MILLISECOND));
    }

    #[test]
    fn bytes_that_arrive_at_one_moment_have_taken_the_resolution() {
        let at = moments();
        let mut cost = Cost::default();
        // the clock has not moved, or it went back between two threads
        for last in [at(10), at(9)] {
            cost.received(1000, 0, at(0), at(10), last);
        }
        assert_eq!(cost.transfer.time_of(2000), Some(RESOLUTION));
        assert_eq!(cost.in_flight_target(), 200_000);
        cost.decoded(1000, MILLISECOND);
        cost.waited(at(0), at(12));
        assert!(cost.is_reached(100_000) && !cost.is_reached(1_000_000));
    }
}
