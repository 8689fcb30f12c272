//! Fetches all absent spans of a layer, when [`super::fill_decision`] decides so.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;

use super::{
    background::{BackgroundPermit, GivesWay},
    fill_decision::{FETCH_BYTES, Fill, absent, share},
};
use crate::{
    layer::{
        disk::Disk,
        read::{fetch, in_flight},
        types::DiskProgress,
    },
    units::SpanId,
};

/// Time limit of such a GET if no reader waits for it: [`FETCH_BYTES`] at half a megabit per second.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Makes the disks of an image share one ledger from now on, unless they do already.
pub(crate) fn share_ledger<'a>(disks: impl Iterator<Item = &'a Arc<Disk>>) {
    let lazy = disks.filter(|disk| !disk.is_full());
    let lazy: Vec<(&Fill, u64)> = lazy
        .map(|disk| {
            (
                disk.ahead().fill(),
                absent(disk.reader().presence().bitmap(), disk.layout().spans()),
            )
        })
        .collect();
    share(&lazy);
}

/// Fetches all absent spans of a disk, from `first` to the end and then those before `first`. It ends early when the disk has no other user
/// any more, or when a span cannot be fetched: then the next miss starts it again.
pub(crate) async fn fetch_all(disk: Arc<Disk>, first: SpanId) {
    let count = disk.layout().spans().count();
    let layer = disk.layer().digest;
    tracing::info!(%layer, "most of the layer was read: the rest of it is fetched in the background");
    // only a weak reference is kept: the disk is closed with its last user
    let disk = {
        let weak = Arc::downgrade(&disk);
        drop(disk);
        weak
    };
    let failed = Arc::new(AtomicBool::new(false));
    let mut fetches = JoinSet::new();
    let mut halves = [first.get()..count, 0..first.get()].into_iter();
    let mut rest = halves.next().unwrap_or_default();
    loop {
        let Some((disk, permit)) = background_permit(&disk, None).await else {
            break;
        };
        if failed.load(Ordering::Relaxed) {
            break;
        }
        let Some(run) = disk.reader().next_absent(rest.clone(), FETCH_BYTES) else {
            match halves.next() {
                Some(half) => rest = half,
                None => break,
            }
            continue;
        };
        rest.start = run.end;
        let failed = Arc::clone(&failed);
        fetches.spawn(async move {
            let deadline = in_flight::deadline(Some(TIMEOUT));
            for claim in disk.reader().claim_ahead(run, FETCH_BYTES, deadline) {
                let spans = claim.spans();
                fetch::fetch(Arc::clone(&disk), claim, None).await;
                if !spans.map(SpanId).all(|span| disk.reader().has(span)) {
                    failed.store(true, Ordering::Relaxed);
                }
            }
            drop(permit);
        });
        while fetches.try_join_next().is_some() {}
    }
    while fetches.join_next().await.is_some() {}
    if let Some(disk) = disk.upgrade() {
        // has no effect on a full or complete disk
        disk.ahead()
            .fill()
            .transition(&[DiskProgress::Filling], DiskProgress::Lazy);
    }
}

/// Waits for the permit of a background fetch of a disk, after others if it gives way; `None`: the disk has no user any more.
pub(super) async fn background_permit(
    weak: &Weak<Disk>,
    gives_way: Option<GivesWay>,
) -> Option<(Arc<Disk>, BackgroundPermit)> {
    let disk = weak.upgrade()?;
    let (traffic, concurrent) = (
        disk.services().traffic().clone(),
        disk.ahead().fill().concurrent_fetches(),
    );
    drop(disk); // its last user may close it during the wait
    let permit = match gives_way {
        Some(gives_way) => traffic.permit_after_others(gives_way, concurrent).await,
        None => traffic.permit(concurrent).await,
    };
    Some((weak.upgrade()?, permit))
}
