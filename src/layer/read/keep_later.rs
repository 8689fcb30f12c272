//! Writes held spans ([`super::held_spans`]) to the local disk as soon as it accepts them.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{
    in_flight::{FetchEffort, Purpose},
    place_span::decode,
};
use crate::{
    error::Error,
    layer::{disk::Disk, read::held_spans::HeldSpan, verify::contradictions::Refutation},
    units::SpanId,
};

/// The pause before the first attempt; doubled after each attempt that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);

impl Disk {
    /// Holds a verified span in memory that the local disk did not accept, so that it is readable, and starts the task that writes it
    /// later. An error: the span was revoked meanwhile and is not readable.
    pub(super) fn hold(
        self: &Arc<Self>,
        span: SpanId,
        held: HeldSpan,
        error: Error,
    ) -> Result<(), Refutation> {
        let error = Arc::new(error);
        let mut is_first = false;
        let make_readable = || {
            is_first = self.reader().hold(span, held);
            self.health().local_disk_rejects(Some(&error));
        };
        if !self.verification().revoked().unless(span, make_readable) {
            return Err(self.refutation(span).unwrap_or(Refutation::Window)); // a revoked span has a reason
        }
        if is_first {
            tracing::warn!(
                "{}; readers get the span from memory until the local disk accepts it: check the free space and the kernel log",
                error.report()
            );
            // ends when the local disk has accepted all spans, or the disk is closed
            self.services().spawn(retry_writes(Arc::downgrade(self)));
        }
        Ok(())
    }
}

async fn retry_writes(disk: Weak<Disk>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Some(disk) = disk.upgrade() else {
            return;
        };
        if write_held(&disk).await {
            tracing::info!(layer = %disk.layer().digest, "the local disk accepts the layer's spans again");
            return;
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Tries to write the held spans. Returns true if none is left.
async fn write_held(disk: &Arc<Disk>) -> bool {
    while let Some((span, held)) = disk
        .reader()
        .next_held(|| disk.health().local_disk_rejects(None))
    {
        if !disk.reader().has(span) {
            let effort = FetchEffort::new(Purpose::Ahead, None);
            let (_, placed) = decode(disk, &effort, span, held.compressed, held.joint).await;
            if placed.is_ok() && !disk.reader().has(span) {
                return false; // it is held again
            }
        }
        disk.reader().drop_held(&[span]);
    }
    true
}
