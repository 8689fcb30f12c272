//! The check of a lazy layer that is not proven.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    engine::Engine,
    layer::{Disk, DiskProgress, ListedSpans},
    units::SpanId,
};

/// Maximum time for the check of a layer.
const CHECK_TIME: Duration = Duration::from_secs(600);

/// Fetches all of a layer in the background, so that it is compared with its diff ID soon, and waits for the comparison for some time.
pub(in crate::snapshotter) async fn check_soon(engine: &Engine, disk: Arc<Disk>) {
    if disk.is_verified() {
        return;
    }
    engine.disks().store().prefetch(vec![ListedSpans {
        disk: Arc::clone(&disk),
        spans: SpanId(0)..SpanId(u32::MAX),
    }]);
    let mut progress = disk.progress();
    let complete = progress.wait_for(|progress| *progress == DiskProgress::Complete);
    // a layer that cannot be fetched now is checked when it is used
    let _ = timeout(CHECK_TIME, complete).await;
}
