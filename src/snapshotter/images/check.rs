//! The check of a lazy layer that is not proven.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    engine::Engine,
    layer::{Disk, DiskProgress},
};

/// Maximum time for the check of a layer.
const CHECK_TIME: Duration = Duration::from_secs(600);

/// How long the fetch for the check gives way to containers that start.
pub(in crate::snapshotter) const START_TIME: Duration = Duration::from_secs(60);

/// Fetches all of a layer in the background, so that it is compared with its diff ID soon, and waits for the comparison for some time. For
/// `patience` the fetch gives way to readers.
pub(in crate::snapshotter) async fn check_soon(
    engine: &Engine,
    disk: Arc<Disk>,
    patience: Duration,
) {
    if disk.is_verified() {
        return;
    }
    let store = engine.disks().store();
    store.fetch_after_others(&disk, patience);
    let mut progress = disk.progress();
    let complete = progress.wait_for(|progress| *progress == DiskProgress::Complete);
    // a layer that cannot be fetched now is checked when it is used
    let _ = timeout(CHECK_TIME, complete).await;
}
