//! The counters and histograms of this process. What happens is counted where it happens; `engine::observe::metrics` exposes the values.
//!
//! They are those of the process, like its CPU time: a process has one daemon, and a counter must not go back when a disk is closed. An
//! update is one or two relaxed atomic additions, without a lock and without an allocation.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::error::Kind;

/// All counters and histograms.
pub(crate) static METRICS: Metrics = Metrics::new();

/// See the table of `docs/metrics.md`, which has one row for each field.
pub(crate) struct Metrics {
    pub(crate) reads: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) read_errors: Errors,
    /// The time of one of [`SAMPLED`] reads of present data.
    pub(crate) present: Histogram,
    /// The time that a read has waited for absent data.
    pub(crate) absent: Histogram,
    pub(crate) fetches: Counter,
    pub(crate) fetched_bytes: Counter,
    pub(crate) fetch: Histogram,
    pub(crate) fetch_first_byte: Histogram,
    pub(crate) fetch_failures: Counters<{ Kind::ALL.len() }>,
    pub(crate) background_spans: Counters<{ Outcome::NAMES.len() }>,
    pub(crate) retries: Counters<{ RetryReason::NAMES.len() }>,
    pub(crate) verification_failures: Counters<{ Verified::NAMES.len() }>,
    pub(crate) false_diff_ids: Counter,
    pub(crate) conflicting_claims: Counter,
    pub(crate) layers_prepared: Counters<{ Prepared::NAMES.len() }>,
    pub(crate) layers_extracted: Counters<{ ExtractionReason::NAMES.len() }>,
    /// The time until containerd has a layer that it need not extract.
    pub(crate) layer_prepare: Histogram,
    pub(crate) attaches: Counters<{ Outcome::NAMES.len() }>,
    pub(crate) attach: Histogram,
    pub(crate) attach_first_byte: Histogram,
}

impl Metrics {
    const fn new() -> Self {
        Self {
            reads: Counter::new(),
            read_bytes: Counter::new(),
            read_errors: Errors::new(),
            present: Histogram::new(),
            absent: Histogram::new(),
            fetches: Counter::new(),
            fetched_bytes: Counter::new(),
            fetch: Histogram::new(),
            fetch_first_byte: Histogram::new(),
            fetch_failures: Counters::new(),
            background_spans: Counters::new(),
            retries: Counters::new(),
            verification_failures: Counters::new(),
            false_diff_ids: Counter::new(),
            conflicting_claims: Counter::new(),
            layers_prepared: Counters::new(),
            layers_extracted: Counters::new(),
            layer_prepare: Histogram::new(),
            attaches: Counters::new(),
            attach: Histogram::new(),
            attach_first_byte: Histogram::new(),
        }
    }
}

/// One of so many reads of present data is timed: a look at the clock costs more than the counters.
pub(crate) const SAMPLED: u64 = 16;

/// Why a request to a registry is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryReason {
    /// The connection cannot be made, or breaks.
    Connection,
    /// The registry does not answer in time, or its answer stalls.
    Timeout,
    /// It asks for a pause: status 429, or `Retry-After`.
    Pause,
    /// It answers with another status that may pass, as a rule 5xx.
    Status,
    /// Its answer ends early, or is another range than the one that was requested.
    Answer,
}

impl RetryReason {
    /// The names, in the order of the reasons.
    pub(crate) const NAMES: [&str; 5] = ["connection", "timeout", "pause", "status", "answer"];
}

/// What does not pass a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verified {
    /// The bytes that a source has sent for a span: their digest, or that they cannot be decoded.
    Span,
    /// A table that contradicts a span whose bytes are right.
    Table,
    /// A layer as a whole.
    Layer,
}

impl Verified {
    /// The names, in the order of the variants.
    pub(crate) const NAMES: [&str; 3] = ["span", "table", "layer"];
}

/// What stands for a layer that containerd need not extract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// A disk that was laid out from a table: reads fetch its spans.
    Lazy,
    /// A disk with all of the layer, which was compared with its diff ID.
    Disk,
    /// A snapshot that was there already.
    Existing,
}

impl Prepared {
    /// The names, in the order of the variants.
    pub(crate) const NAMES: [&str; 3] = ["lazy", "disk", "existing"];
}

/// Why containerd extracts a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExtractionReason {
    /// containerd does not name its image, or names it in a way that is not valid.
    Labels,
    /// No index has a table for it.
    Table,
    /// A rule or a label leaves it to containerd.
    Rule,
    /// It was not there in the time for which containerd may be held up.
    Late,
    /// Another image claims its chain ID for another layer.
    Conflict,
    /// It could not be opened or pulled.
    Failure,
}

impl ExtractionReason {
    /// The names, in the order of the reasons.
    pub(crate) const NAMES: [&str; 6] = ["labels", "table", "rule", "late", "conflict", "failure"];
}

/// How an operation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    Failure,
}

impl Outcome {
    /// The names, in the order of the outcomes.
    pub(crate) const NAMES: [&str; 2] = ["success", "failure"];

    pub(crate) fn of<T, E>(result: &Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Success,
            Err(_) => Self::Failure,
        }
    }
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds, and returns the number before.
    pub(crate) fn add(&self, count: u64) -> u64 {
        self.0.fetch_add(count, Ordering::Relaxed)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts errors, and the five-minute periods that begin with one: soci's `fuse_failure_state`.
pub(crate) struct Errors {
    count: Counter,
    periods: Mutex<(u64, Option<Instant>)>,
}

/// Errors in this time after the first one count for one period.
const ERROR_PERIOD: Duration = Duration::from_secs(300);

impl Errors {
    const fn new() -> Self {
        Self {
            count: Counter::new(),
            periods: Mutex::new((0, None)),
        }
    }

    /// Counts one.
    pub(crate) fn count(&self) {
        self.count_at(Instant::now());
    }

    fn count_at(&self, now: Instant) {
        self.count.add(1);
        let mut periods = self.periods.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, last) = &mut *periods;
        if last.is_none_or(|last| now.saturating_duration_since(last) >= ERROR_PERIOD) {
            (*count, *last) = (*count + 1, Some(now));
        }
    }

    /// The errors.
    pub(crate) fn get(&self) -> &Counter {
        &self.count
    }

    /// The periods with errors.
    pub(crate) fn periods(&self) -> u64 {
        self.periods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// A counter for each of `N` values of a label.
pub(crate) struct Counters<const N: usize>([Counter; N]);

impl<const N: usize> Counters<N> {
    const fn new() -> Self {
        Self([const { Counter::new() }; N])
    }

    /// Counts one; `value` is the place of the value in its list of names.
    pub(crate) fn count(&self, value: usize) {
        self.add(value, 1);
    }

    /// Counts several.
    pub(crate) fn add(&self, value: usize, count: u64) {
        if let Some(counter) = self.0.get(value) {
            counter.add(count);
        }
    }

    pub(crate) fn get(&self) -> [u64; N] {
        self.0.each_ref().map(Counter::get)
    }
}

/// Upper bounds of the buckets in microseconds. A last bucket has no bound.
const BOUNDS_US: [u64; 22] = [
    2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 60_000_000,
];

/// A distribution of durations, from 2 µs to a minute.
pub(crate) struct Histogram {
    buckets: [Counter; BOUNDS_US.len() + 1],
    sum_ns: Counter,
}

/// The values of a histogram.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Distribution {
    /// Upper bounds in seconds, and the number of durations in each bucket. The last bound is `f64::INFINITY`.
    pub(crate) buckets: Vec<(f64, u64)>,
    pub(crate) sum_seconds: f64,
    pub(crate) count: u64,
}

impl Histogram {
    const fn new() -> Self {
        Self {
            buckets: [const { Counter::new() }; BOUNDS_US.len() + 1],
            sum_ns: Counter::new(),
        }
    }

    pub(crate) fn observe(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // a bound is part of its bucket
        let bucket = BOUNDS_US.partition_point(|bound| bound * 1000 < nanos);
        self.buckets[bucket].add(1); // one bucket more than bounds
        self.sum_ns.add(nanos);
    }

    pub(crate) fn get(&self) -> Distribution {
        let bounds = BOUNDS_US.iter().map(|us| *us as f64 / 1e6);
        let counts = self.buckets.iter().map(Counter::get);
        let buckets: Vec<_> = bounds.chain([f64::INFINITY]).zip(counts).collect();
        Distribution {
            count: buckets.iter().map(|(_, count)| count).sum(),
            sum_seconds: self.sum_ns.get() as f64 / 1e9,
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_whose_bound_is_not_below_it() {
        let histogram = Histogram::new();
        let micros = [0, 2, 3, 60_000_000, 60_000_001, u64::MAX];
        for micros in micros.map(Duration::from_micros) {
            histogram.observe(micros);
        }
        let Distribution {
            buckets,
            count,
            sum_seconds,
        } = histogram.get();
        let filled: Vec<_> = buckets.iter().filter(|bucket| bucket.1 > 0).collect();
        assert_eq!(
            filled,
            [
                &(0.000_002, 2),
                &(0.000_005, 1),
                &(60.0, 1),
                &(f64::INFINITY, 2)
            ]
        );
        assert_eq!(count, 6);
        assert!(sum_seconds > 120.0);
    }

    #[test]
    fn errors_within_five_minutes_are_one_period() {
        let errors = Errors::new();
        let start = Instant::now();
        for (seconds, periods) in [(0, 1), (1, 1), (299, 1), (300, 2), (301, 2), (10_000, 3)] {
            errors.count_at(start + Duration::from_secs(seconds));
            assert_eq!(errors.periods(), periods, "{seconds}");
        }
        assert_eq!(errors.get().get(), 6);
    }

    #[test]
    fn bounds_ascend() {
        assert!(BOUNDS_US.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn each_value_of_a_label_has_its_name() {
        assert_eq!(
            RetryReason::NAMES[RetryReason::Connection as usize],
            "connection"
        );
        assert_eq!(RetryReason::NAMES[RetryReason::Answer as usize], "answer");
        assert_eq!(Verified::NAMES[Verified::Layer as usize], "layer");
        assert_eq!(Outcome::NAMES[Outcome::Failure as usize], "failure");
        assert_eq!(Prepared::NAMES[Prepared::Existing as usize], "existing");
        let last = ExtractionReason::Failure as usize;
        assert_eq!(ExtractionReason::NAMES[last], "failure");
        let counters = Counters::<2>::new();
        counters.count(1);
        counters.count(2);
        assert_eq!(counters.get(), [0, 1]);
    }
}
