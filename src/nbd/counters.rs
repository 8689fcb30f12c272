//! Counters of connections.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The counters of connections, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests of any kind.
    pub requests: u64,
    /// Reads that were answered with data.
    pub reads: u64,
    /// Bytes of data in those answers, holes included.
    pub read_bytes: u64,
    /// Reads that had to wait for a fetch.
    pub waits: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
}

/// The sum over connections. Each adds its own before it blocks, not with every request.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    waits: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    /// The sum so far.
    pub fn get(&self) -> Counts {
        Counts {
            requests: self.requests.load(Relaxed),
            reads: self.reads.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            waits: self.waits.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }

    /// Adds the counts and resets them to zero.
    pub(super) fn add(&self, counts: &mut Counts) {
        let counts = std::mem::take(counts);
        for (sum, count) in [
            (&self.requests, counts.requests),
            (&self.reads, counts.reads),
            (&self.read_bytes, counts.read_bytes),
            (&self.waits, counts.waits),
            (&self.errors, counts.errors),
        ] {
            if count > 0 {
                sum.fetch_add(count, Relaxed);
            }
        }
    }
}
