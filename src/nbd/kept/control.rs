//! What other threads see of a connection's thread.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::kernel::kept::ServerPulse;

/// The turns of a connection's thread, for a watchdog.
#[derive(Debug, Default)]
pub struct Control(AtomicU64);

impl Control {
    /// A turn ends.
    pub(super) fn turn(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}

impl ServerPulse for Control {
    fn turns(&self) -> Vec<Option<u64>> {
        vec![Some(self.0.load(Relaxed))]
    }
}
