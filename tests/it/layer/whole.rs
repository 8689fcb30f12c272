//! A layer that is mostly wanted is fetched as a whole: once, in few requests, and with readers first.

use std::{ops::Range, sync::Arc, time::Duration};

use socinbd::{
    layer::{Disk, Options, Progress},
    units::DiskOffset,
};

use super::fixture::{Lab, Layer, Random, assert_holds, complete, range, read};
use crate::support::registry::{Fault, On, Times};

fn lab(seed: u64) -> Lab {
    Lab::with_options(Layer::new(seed), Options::default())
}

async fn reaches(disk: &Arc<Disk>, wanted: Progress) {
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
    for seed in 0..3 {
        let lab = lab(40 + seed);
        let disk = lab.disk().await;
        assert_eq!(*disk.progress().borrow(), Progress::Lazy);
        for path in shuffled(&lab, seed) {
            let bytes = read(&disk, lab.layer.place(&path)).await.unwrap();
            assert!(bytes == lab.layer.files[&path], "{path}");
        }
        reaches(&disk, Progress::Complete).await;
        complete(&disk).await;
        assert_holds(disk.path(), &lab.layer.files);
        let (requests, bytes) = lab.fetched();
        assert!(
            bytes * 100 <= lab.layer.layer.size * 102,
            "{bytes} bytes of {}",
            lab.layer.layer.size
        );
        // a miss for four spans, one more for each gap that they leave, and what readers asked for meanwhile
        let spans = lab.layer.spans.spans.len() as u64;
        assert!(
            requests <= spans * 2 / 3,
            "{requests} requests for {spans} spans"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_misses_bring_their_spans_and_many_bring_all() {
    let lab = lab(50);
    let disk = lab.disk().await;
    for number in 0..2 {
        read(&disk, scattered(&lab, number)).await.unwrap();
    }
    assert_eq!(*disk.progress().borrow(), Progress::Lazy);
    let mut number = 2;
    while *disk.progress().borrow() == Progress::Lazy {
        read(&disk, scattered(&lab, number)).await.unwrap();
        number += 1;
    }
    reaches(&disk, Progress::Complete).await;
    assert_holds(disk.path(), &lab.layer.files);
    // the next daemon finds a complete disk, once the layer has been checked
    let saved = async {
        while !lab.store.list().unwrap()[0].complete {
            disk.sync().unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), saved)
        .await
        .expect("the disk is saved as complete within a minute");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_ends_it_and_the_next_misses_begin_anew() {
    let lab = lab(51);
    let disk = lab.disk().await;
    let gone = Fault::Status {
        code: 404,
        retry_after: None,
    };
    lab.registry.fail(On::Data, gone, Times::UntilHealed);
    let reads = (0..12).map(|number| read(&disk, scattered(&lab, number)));
    let failed = futures_util::future::join_all(reads).await;
    assert!(failed.iter().all(Result::is_err));
    reaches(&disk, Progress::Lazy).await;
    assert_eq!(disk.span_counts().0 as usize, lab.layer.empty_spans());
    assert!(disk.degraded().is_some());

    lab.registry.heal();
    read(&disk, scattered(&lab, 0)).await.unwrap();
    reaches(&disk, Progress::Complete).await;
    assert_holds(disk.path(), &lab.layer.files);
    assert_eq!(disk.degraded(), None);
}
