//! The state of a disk's damaged table, and the repairs that were made when the disk was opened.

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
    repairs: Mutex<Vec<String>>,
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

    /// The stored table was restored.
    pub(crate) fn table_is_restored(&self) {
        self.lacks_table.store(false, Ordering::Release);
    }

    /// The lock of the task that fetches the table again.
    pub(crate) async fn lock_fetch(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.fetching.lock().await
    }

    /// Records repairs, for the next check of the disk.
    pub(crate) fn add_repairs(&self, repairs: Vec<String>) {
        locked(&self.repairs).extend(repairs);
    }

    /// Takes the repairs since the last check of the disk.
    pub(crate) fn take_repairs(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.repairs))
    }
}
