//! A layer that is mostly wanted is fetched as a whole: once, in few requests, and with readers first.

use std::{ops::Range, sync::Arc, time::Duration};

use socinbd::{
    layer::{Disk, DiskProgress, StoreOptions},
    oci::Packing,
    units::DiskOffset,
};

use super::fixture::{Files, Lab, Layer, Random, assert_holds, complete, gzip, range, read, tar};
use crate::support::{
    registry::{Fault, Link, On, Times},
    until,
};

/// Behind a link whose round trip costs far more than a span's bytes: so the rest of the layer follows before long.
fn lab(layer: Layer, round_trip_ms: u64) -> Lab {
    let lab = Lab::with_options(layer, StoreOptions::default());
    lab.registry.set_link(Link {
        round_trip: Duration::from_millis(round_trip_ms),
        bytes_per_second: 0,
    });
    lab
}

async fn reaches(disk: &Arc<Disk>, wanted: DiskProgress) {
    let mut progress = disk.progress();
    let reached = progress.wait_for(|progress| *progress == wanted);
    tokio::time::timeout(Duration::from_secs(60), reached)
        .await
        .unwrap_or_else(|_| panic!("the disk is not {wanted:?} within a minute"))
        .unwrap();
}

/// A block of the large file, of 42 that are more than a span apart; no two that follow each other are neighbours.
fn scattered(lab: &Lab, number: u64) -> Range<DiskOffset> {
    assert!(number < 42, "all of the file was read");
    let big = lab.layer.place("data/big").start.get();
    range(big + number * 17 % 42 * 70_000, 4096)
}

/// The files' paths in an order that is none.
fn shuffled(lab: &Lab, seed: u64) -> Vec<String> {
    let mut random = Random::new(seed);
    let files = lab
        .layer
        .files
        .iter()
        .filter(|(_, bytes)| !bytes.is_empty());
    let mut paths: Vec<String> = files.map(|(path, _)| path.clone()).collect();
    for index in (1..paths.len()).rev() {
        paths.swap(index, random.below(index as u64 + 1) as usize);
    }
    paths
}

#[tokio::test(flavor = "multi_thread")]
async fn all_files_in_random_order_cost_the_layer_once_in_few_requests() {
    for number in 0..3 {
        let lab = lab(Layer::new(number), 200);
        let disk = lab.disk().await;
        assert_eq!(*disk.progress().borrow(), DiskProgress::Lazy);
        for path in shuffled(&lab, number as u64) {
            let bytes = read(&disk, lab.layer.place(&path)).await.unwrap();
            assert!(bytes == lab.layer.files[&path], "{path}");
        }
        reaches(&disk, DiskProgress::Complete).await;
        complete(&disk).await;
        assert_holds(disk.path(), &lab.layer.files);
        let (requests, bytes) = lab.fetched();
        assert!(
            bytes * 100 <= lab.layer.layer.size * 102,
            "{bytes} bytes of {}",
            lab.layer.layer.size
        );
        // the misses before, one more for each gap that they leave, and what readers asked for meanwhile
        let spans = lab.layer.spans.spans.len() as u64;
        assert!(
            requests <= spans * 2 / 3,
            "{requests} requests for {spans} spans"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_misses_fetch_their_spans_and_many_fetch_all() {
    let lab = lab(Layer::new(0), 200);
    let disk = lab.disk().await;
    for number in 0..2 {
        read(&disk, scattered(&lab, number)).await.unwrap();
    }
    assert_eq!(*disk.progress().borrow(), DiskProgress::Lazy);
    let mut number = 2;
    while *disk.progress().borrow() == DiskProgress::Lazy {
        read(&disk, scattered(&lab, number)).await.unwrap();
        number += 1;
    }
    reaches(&disk, DiskProgress::Complete).await;
    assert_holds(disk.path(), &lab.layer.files);
    // the next daemon finds a complete disk, once the layer has been checked
    let is_saved = || {
        disk.sync().unwrap();
        lab.store.list().unwrap()[0].complete
    };
    until("the disk is saved as complete", is_saved).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_source_ends_the_fill_and_later_misses_start_it_again() {
    let mut random = Random::new(51);
    let files: Files = (0..12)
        .map(|number| (format!("data/{number:02}"), random.text(70_000)))
        .collect();
    let blob = gzip(&tar(&files));
    let lab = lab(Layer::of(files, blob, Packing::Gzip, 64 << 10), 400);
    let disk = lab.disk().await;
    // two misses have taken longer than all would
    for path in ["data/01", "data/05"] {
        read(&disk, lab.layer.place(path)).await.unwrap();
    }
    assert_eq!(*disk.progress().borrow(), DiskProgress::Lazy);
    lab.registry
        .fail(On::Data, Fault::status(404), Times::UntilHealed);
    lab.registry.reset_counters();
    read(&disk, lab.layer.place("data/09")).await.unwrap_err();
    reaches(&disk, DiskProgress::Lazy).await;
    let (requests, _) = lab.fetched();
    assert!(requests > 3, "{requests}: the reader's own alone");
    assert!(disk.degraded().is_some());

    lab.registry.heal();
    read(&disk, lab.layer.place("data/09")).await.unwrap();
    reaches(&disk, DiskProgress::Complete).await;
    assert_holds(disk.path(), &lab.layer.files);
    assert_eq!(disk.degraded(), None);
}
