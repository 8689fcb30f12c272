//! Fetches all of a layer, when [`super::fill_decision`] says so.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;

use super::{
    background::BackgroundTurn,
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

/// How long such a GET goes on when nobody waits for it: [`FETCH_BYTES`] over half a megabit a second.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Has the disks of an image lose and save together from now on, unless they do already.
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

/// Fetches all absent spans of a disk, from `first` on and then those before it. Ends early when nobody has the disk any more, or when
/// a span cannot be had: then the next miss begins anew.
pub(crate) async fn fetch_all(disk: Arc<Disk>, first: SpanId) {
    let count = disk.layout().spans().count();
    let layer = disk.layer().digest;
    tracing::info!(%layer, "most of the layer is wanted: all of it is fetched");
    // the disk goes when its last user goes
    let disk = {
        let weak = Arc::downgrade(&disk);
        drop(disk);
        weak
    };
    let failed = Arc::new(AtomicBool::new(false));
    let mut fetches = JoinSet::new();
    let mut parts = [first.get()..count, 0..first.get()].into_iter();
    let mut rest = parts.next().unwrap_or_default();
    loop {
        let Some((disk, turn)) = background_turn(&disk).await else {
            break;
        };
        if failed.load(Ordering::Relaxed) {
            break;
        }
        let Some(run) = disk.reader().next_absent(rest.clone(), FETCH_BYTES) else {
            match parts.next() {
                Some(part) => rest = part,
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
            drop(turn);
        });
        while fetches.try_join_next().is_some() {}
    }
    while fetches.join_next().await.is_some() {}
    if let Some(disk) = disk.upgrade() {
        // not where it is complete
        disk.ahead()
            .fill()
            .turn(&[DiskProgress::Filling], DiskProgress::Lazy);
    }
}

/// Waits for the turn of a background fetch of a disk; `None` when nobody has the disk any more.
pub(super) async fn background_turn(weak: &Weak<Disk>) -> Option<(Arc<Disk>, BackgroundTurn)> {
    let disk = weak.upgrade()?;
    let (traffic, side_by_side) = (
        disk.services().traffic().clone(),
        disk.ahead().fill().side_by_side(),
    );
    drop(disk); // while it waits its last user may go
    let turn = traffic.turn(side_by_side).await;
    Some((weak.upgrade()?, turn))
}
