//! Fetches the rest of the layers of an image although no reader has needed it: at once, or after a quiet time.
//!
//! `fill_decision` decides by what readers have missed; here the user has decided. The fetches are those of [`super::fill`]: in file order, in
//! the background, and readers have precedence.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{fill, fill_decision::FillPolicy};
use crate::{
    layer::{disk::Disk, store::Store, types::DiskProgress},
    units::SpanId,
};

/// The longest pause before layers are tried again that could not be fetched, or did not fit on the local disk. Each try doubles the pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

impl Store {
    /// Sets when the rest of these disks, those of one image, is fetched. Of several images with the same disk the most eager one counts.
    pub fn fill(self: &Arc<Self>, disks: impl Iterator<Item = Arc<Disk>>, policy: FillPolicy) {
        let disks: Vec<_> = disks
            .inspect(|disk| disk.ahead().fill().set_policy(policy))
            .filter(|disk| !disk.is_full())
            .map(|disk| Arc::downgrade(&disk))
            .collect();
        let waits = match policy {
            FillPolicy::Never | FillPolicy::Auto => return,
            FillPolicy::Delayed => true,
            FillPolicy::Always => false,
        };
        self.services().enter();
        let quiet = self.services().options().quiet_time;
        self.services().spawn(fill_all(disks, waits, quiet));
    }
}

/// Fetches the rest of the disks one after another. It ends when all are full or closed.
async fn fill_all(disks: Vec<Weak<Disk>>, waits: bool, quiet: Duration) {
    let mut pause = quiet;
    loop {
        let mut is_left = false;
        for disk in &disks {
            if waits
                && let Some(traffic) = disk.upgrade().map(|disk| disk.services().traffic().clone())
            {
                traffic.quiet(quiet).await;
            }
            let Some(disk) = disk.upgrade().filter(|disk| !disk.is_full()) else {
                continue;
            };
            is_left = true;
            let may_start = disk.rest_fits() && !disk.reader().local_disk_rejects();
            if may_start
                && disk
                    .ahead()
                    .fill()
                    .transition(&[DiskProgress::Lazy], DiskProgress::Filling)
            {
                fill::fetch_all(disk, SpanId(0)).await;
            }
        }
        if !is_left {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Disk {
    /// Whether the absent spans fit on the local disk without evicting others.
    pub(crate) fn rest_fits(&self) -> bool {
        let (present, count) = self.span_counts();
        let absent = u64::from(count - present.min(count)).saturating_mul(self.mean_span_bytes());
        self.services().space().fits(absent)
    }
}
