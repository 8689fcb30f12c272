//! Writes spans from memory ([`super::held_spans`]) to the local disk as soon as it accepts them.

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
    layer::{disk::Disk, read::held_spans::HeldSpan, verify::lies::Refutation},
    units::SpanId,
};

/// The pause before the first try to keep spans; doubled after each that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);

impl Disk {
    /// Makes a verified span readable from memory that the local disk did not accept, and tries to keep it later. It is not readable if it
    /// was revoked meanwhile.
    pub(super) fn hold(
        self: &Arc<Self>,
        span: SpanId,
        held: HeldSpan,
        error: Error,
    ) -> Result<(), Refutation> {
        let error = Arc::new(error);
        let mut is_first = false;
        let appear = || {
            is_first = self.reader().hold(span, held);
            self.health().not_kept(Some(&error));
        };
        if !self.verification().revoked().unless(span, appear) {
            return Err(self.refutation(span).unwrap_or(Refutation::Window)); // there is one
        }
        if is_first {
            tracing::warn!(
                "{}; readers get it from memory, and it is tried again until the local disk takes it",
                error.report()
            );
            // ends when the local disk has all spans, or the disk is closed
            self.services().spawn(keep_again(Arc::downgrade(self)));
        }
        Ok(())
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
    while let Some((span, held)) = disk.reader().next_held(|| disk.health().not_kept(None)) {
        if !disk.reader().has(span) {
            let effort = FetchEffort::new(Purpose::Later, None);
            let (_, placed) = decode(disk, &effort, span, held.compressed, held.joint).await;
            if placed.is_ok() && !disk.reader().has(span) {
                return false; // and is in memory again
            }
        }
        disk.reader().drop_held(&[span]);
    }
    true
}
