//! Counts the bytes in flight: when there are fewer than the link can carry, the next queued fetch starts.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::layer::disk::Disk;

/// Bytes of one fetch that have not arrived.
struct BytesLeft(AtomicU64);

impl BytesLeft {
    /// Removes this many bytes, and returns how many were left of them. Bytes that are fetched again after a failure arrive twice and count
    /// once.
    fn take(&self, bytes: u64) -> u64 {
        let take = |left: u64| Some(left.saturating_sub(bytes));
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        before.unwrap_or(0).min(bytes) // `take` never fails
    }
}

/// The bytes in flight of one fetch. When it is dropped, the rest is removed from the count.
pub(crate) struct BytesInFlight {
    disk: Arc<Disk>,
    left: BytesLeft,
}

impl BytesInFlight {
    pub(crate) fn new(disk: &Arc<Disk>, bytes: u64) -> Self {
        let in_flight = &disk.ahead().queue().in_flight;
        in_flight.fetch_add(bytes, Ordering::Relaxed);
        Self {
            disk: Arc::clone(disk),
            left: BytesLeft(AtomicU64::new(bytes)),
        }
    }

    /// Bytes have arrived.
    pub(crate) fn received(&self, bytes: u64) {
        self.remove(self.left.take(bytes));
    }

    fn remove(&self, bytes: u64) {
        let in_flight = &self.disk.ahead().queue().in_flight;
        in_flight.fetch_sub(bytes, Ordering::Relaxed);
        self.disk.fetch_queued();
    }
}

impl Drop for BytesInFlight {
    fn drop(&mut self) {
        self.remove(self.left.take(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the count would wrap below zero, to more than any limit, and nothing would be read ahead any more.
    #[test]
    fn bytes_that_arrive_twice_count_once() {
        let left = BytesLeft(AtomicU64::new(100));
        assert_eq!(left.take(60), 60);
        // the connection was lost, and the GET starts again
        assert_eq!(left.take(60), 40);
        assert_eq!(left.take(40), 0);
        assert_eq!(left.take(u64::MAX), 0);
    }
}
