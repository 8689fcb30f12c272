//! The bytes of fetches that are on their way: when less are than keeps the link in use, the next fetch begins.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::layer::disk::Disk;

/// Bytes of one fetch that have not come.
struct BytesLeft(AtomicU64);

impl BytesLeft {
    /// Takes so many of them, and gives how many there were: what is asked for again after a failure comes twice, and counts once.
    fn take(&self, bytes: u64) -> u64 {
        let take = |left: u64| Some(left.saturating_sub(bytes));
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        before.unwrap_or(0).min(bytes) // it always takes
    }
}

/// The bytes of one fetch. When it is dropped, those that have not come are not on their way any more.
pub(crate) struct OnTheWay {
    disk: Arc<Disk>,
    left: BytesLeft,
}

impl OnTheWay {
    pub(crate) fn new(disk: &Arc<Disk>, bytes: u64) -> Self {
        let on_the_way = &disk.ahead().queue().on_the_way;
        on_the_way.fetch_add(bytes, Ordering::Relaxed);
        Self {
            disk: Arc::clone(disk),
            left: BytesLeft(AtomicU64::new(bytes)),
        }
    }

    /// So many of them have come.
    pub(crate) fn came(&self, bytes: u64) {
        self.leave(self.left.take(bytes));
    }

    fn leave(&self, bytes: u64) {
        let on_the_way = &self.disk.ahead().queue().on_the_way;
        on_the_way.fetch_sub(bytes, Ordering::Relaxed);
        self.disk.fetch_queued();
    }
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        self.leave(self.left.take(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else the bytes on their way would fall below none, which is more than enough: nothing would be read ahead any more.
    #[test]
    fn what_comes_twice_counts_once() {
        let left = BytesLeft(AtomicU64::new(100));
        assert_eq!(left.take(60), 60);
        // the connection was lost, and the GET begins anew
        assert_eq!(left.take(60), 40);
        assert_eq!(left.take(40), 0);
        assert_eq!(left.take(u64::MAX), 0);
    }
}
