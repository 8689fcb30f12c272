//! What is known of damage of a disk's stored table, and what was repaired when the disk was opened.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use crate::layer::locked::locked;

/// The repair of one disk's stored table.
#[derive(Default)]
pub(crate) struct TableRepair {
    lacks_table: AtomicBool,
    fetching: tokio::sync::Mutex<()>,
    mended: Mutex<Vec<String>>,
}

impl TableRepair {
    /// Whether the stored table is damaged, and has to be fetched again.
    pub(crate) fn lacks_table(&self) -> bool {
        self.lacks_table.load(Ordering::Acquire)
    }

    /// The stored table is damaged.
    pub(crate) fn table_is_damaged(&self) {
        self.lacks_table.store(true, Ordering::Release);
    }

    /// The stored table is right again.
    pub(crate) fn has_table_again(&self) {
        self.lacks_table.store(false, Ordering::Release);
    }

    /// The lock of the task that fetches the table again.
    pub(crate) async fn lock_fetch(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.fetching.lock().await
    }

    /// Keeps what was repaired, for the next check of the disk.
    pub(crate) fn note_mended(&self, what: Vec<String>) {
        locked(&self.mended).extend(what);
    }

    /// Takes what was repaired since the last check of the disk.
    pub(crate) fn take_mended(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.mended))
    }
}
