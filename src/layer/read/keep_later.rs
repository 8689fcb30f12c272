//! Writes spans from memory ([`super::held_spans`]) to the local disk as soon as it accepts them.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{
    in_flight::{Effort, Purpose},
    place_span::decode,
};
use crate::layer::disk::Disk;

/// The pause before the first try to keep spans; doubled after each that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);

impl Disk {
    /// Starts a task that tries until the local disk has all spans, or nobody has the disk.
    pub(super) fn keep_later(self: &Arc<Self>) {
        self.services().spawn(keep_again(Arc::downgrade(self)));
    }
}

async fn keep_again(disk: Weak<Disk>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Some(disk) = disk.upgrade() else {
            return;
        };
        if keep_held(&disk).await {
            tracing::info!(layer = %disk.layer().digest, "the local disk takes the layer's spans again");
            return;
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Tries to keep the spans in memory. True when none is left: then the disk is well.
async fn keep_held(disk: &Arc<Disk>) -> bool {
    while let Some((span, held)) = disk.next_held() {
        if !disk.has(span) {
            let effort = Effort::new(Purpose::Later, None);
            let (_, placed) = decode(disk, &effort, span, held.compressed, held.joint).await;
            if placed.is_ok() && !disk.has(span) {
                return false; // and is in memory again
            }
        }
        disk.drop_held(&[span]);
    }
    true
}
