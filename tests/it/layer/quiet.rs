//! When the rest of a layer is fetched: `attach --fill`.

use std::{ops::Range, sync::Arc, time::Duration};

use socinbd::layer::{Disk, DiskProgress, FillPolicy, StoreOptions};

use super::fixture::{Lab, Layer, assert_holds, complete, range, read};
use crate::support::{registry::Link, until};

fn lab() -> Lab {
    let options = StoreOptions {
        quiet_time: Duration::from_millis(300),
        ..StoreOptions::default()
    };
    Lab::with_options(Layer::new(0), options)
}

fn fill(lab: &Lab, disk: &Arc<Disk>, policy: FillPolicy) {
    lab.store.fill([Arc::clone(disk)].into_iter(), policy);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_quiet_time_the_rest_follows() {
    let lab = lab();
    let disk = lab.disk().await;
    read(&disk, lab.layer.place("data/200")).await.unwrap();
    fill(&lab, &disk, FillPolicy::Delayed);
    until("it is complete", || disk.is_complete()).await;
    let ranges = lab.registry.counters().ranges(&lab.layer.layer.digest);
    let starts: Vec<_> = ranges.iter().map(|range| range.start).collect();
    assert!(starts.len() > 1, "{starts:?}");
    let fetched = disk.counters().fetched_bytes;
    let size = lab.layer.layer.size;
    assert!(fetched <= size + size / 20, "{fetched} of {size}");
    disk.sync().unwrap();
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_follows_at_once_or_never() {
    let lab = lab();
    let disk = lab.disk().await;
    fill(&lab, &disk, FillPolicy::Never);
    // from the end, so that nothing is read ahead
    let files = lab.layer.files.iter().rev();
    for (path, _) in files.filter(|it| !it.1.is_empty()) {
        // all but the end of the layer
        if path.as_str() < "data/280" {
            read(&disk, lab.layer.place(path)).await.unwrap();
        }
    }
    assert!(!disk.is_full());
    assert_eq!(*disk.progress().borrow(), DiskProgress::Lazy);
    // another image has the layer, too: the more eager one counts
    fill(&lab, &disk, FillPolicy::Always);
    until("it is complete", || disk.is_complete()).await;
}

/// A container may find all that it reads at its start: the comparison of its layers gives way to it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_gives_way_begins_after_the_last_read_also_if_no_read_waits() {
    let lab = lab();
    let disk = lab.disk().await;
    lab.store.fetch_after_others(&disk, Duration::from_secs(60));
    let place = lab.layer.place("data/200");
    let ranges = || {
        lab.registry
            .counters()
            .ranges(&lab.layer.layer.digest)
            .len()
    };
    let began = std::time::Instant::now();
    let mut after_one_second = None;
    // the first read waits: the quiet time after it is five seconds
    while began.elapsed() < Duration::from_millis(6500) {
        read(&disk, place.clone()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(250)).await;
        if began.elapsed() > Duration::from_secs(1) {
            after_one_second = after_one_second.or(Some(ranges()));
        }
    }
    assert_eq!(after_one_second, Some(ranges()));
    until("it is complete", || disk.is_complete()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_does_not_fit_is_not_filled() {
    let lab = lab();
    let disk = lab.disk().await;
    let used = lab
        .store
        .bytes_of(&lab.layer.layer.digest, &lab.layer.table);
    let limits = |bytes| socinbd::layer::DiskLimits {
        limit: Some(bytes),
        reserve: None,
    };
    lab.store.set_disk_limits(limits(used + (1 << 20))).unwrap();
    fill(&lab, &disk, FillPolicy::Always);
    for (path, bytes) in lab.layer.files.iter().filter(|it| !it.1.is_empty()) {
        disk.make_present(lab.layer.place(path)).await.unwrap();
        let _ = bytes;
    }
    assert_eq!(*disk.progress().borrow(), DiskProgress::Lazy);
    lab.store.set_disk_limits(limits(64 << 20)).unwrap();
    until("it is complete", || disk.is_complete()).await;
}

const BLOCK: u64 = 4096;
/// Fetches in the background that run at a time.
const AT_ONCE: usize = 8;

/// A layer of which every second span is present, so that its rest takes many requests.
async fn partly_present() -> (Lab, Arc<Disk>) {
    let lab = lab();
    let disk = lab.disk().await;
    fill(&lab, &disk, FillPolicy::Never);
    // from the end, so that nothing is read ahead
    for region in lab.layer.regions.iter().rev() {
        let (start, end) = (region.disk.start.get(), region.disk.end.get());
        for block in (start / BLOCK..end.div_ceil(BLOCK)).rev() {
            let place = range(block * BLOCK, 1);
            let spans = lab.layer.spans_of(place.clone());
            if spans.iter().all(|span| span.get() % 2 == 0) {
                read(&disk, place).await.unwrap();
            }
        }
    }
    let (present, count) = disk.span_counts();
    assert!(
        count - present >= 2 * AT_ONCE as u32,
        "{present} of {count}"
    );
    (lab, disk)
}

fn requested(lab: &Lab) -> Vec<Range<u64>> {
    lab.registry.counters().ranges(&lab.layer.layer.digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_follows_in_the_order_of_the_files() {
    let (lab, disk) = partly_present().await;
    lab.registry.reset_counters();
    fill(&lab, &disk, FillPolicy::Always);
    until("it is complete", || disk.is_complete()).await;
    let starts: Vec<u64> = requested(&lab).iter().map(|range| range.start).collect();
    assert!(starts.len() > AT_ONCE + 4, "{starts:?}");
    let mut sorted = starts.clone();
    sorted.sort_unstable();
    // those that run at a time may reach the registry in any order
    for (place, start) in starts.iter().enumerate() {
        let expected = sorted.binary_search(start).unwrap();
        assert!(place.abs_diff(expected) < AT_ONCE, "{start} in {starts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_has_precedence_over_the_rest() {
    let (lab, disk) = partly_present().await;
    lab.registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 300_000,
    });
    let before = requested(&lab).len();
    fill(&lab, &disk, FillPolicy::Always);
    until("the rest is being fetched", || {
        requested(&lab).len() >= before + AT_ONCE
    })
    .await;
    // the last span that is absent
    let last = lab.layer.regions.iter().rev();
    let mut places = last.map(|region| range(region.disk.start.get(), 1));
    let place = places.find(|it| !disk.is_present(it.clone())).unwrap();
    let before = requested(&lab).len();
    let absent_before = disk.span_counts().1 - disk.span_counts().0;
    read(&disk, place).await.unwrap();
    let started = requested(&lab).len() - before;
    let absent = disk.span_counts().1 - disk.span_counts().0;
    // the reader's own, one beside it, and one that was on its way to the registry; without precedence as many as have ended meanwhile
    assert!(started <= 4, "{started} requests while the reader waited");
    assert!(absent > absent_before / 3, "{absent} of {absent_before}");
    lab.registry.set_link(Link::default());
    complete(&disk).await;
    disk.sync().unwrap();
    assert_holds(disk.path(), &lab.layer.files);
}
