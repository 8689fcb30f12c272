//! Registries that fail, and disks that are full.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use socinbd::{
    error::Kind,
    layer::{Disk, StoreOptions, TableBytes},
};

use super::fixture::{Lab, Layer, assert_holds, complete, read, source};
use crate::support::{
    registry::{Fault, On, Registry, Times},
    until,
};

fn patient(seconds: u64) -> StoreOptions {
    StoreOptions {
        io_timeout: Some(Duration::from_secs(seconds)),
        ..StoreOptions::default()
    }
}

fn start_read(
    lab: &Lab,
    disk: &Arc<Disk>,
) -> tokio::task::JoinHandle<Result<Vec<u8>, Arc<socinbd::error::Error>>> {
    let (disk, place) = (Arc::clone(disk), lab.layer.place("data/big"));
    tokio::spawn(async move { read(&disk, place).await })
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_fetched_again_and_never_reach_the_disk() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    lab.registry
        .fail(On::Data, Fault::WrongByte { at: 5000 }, Times::Next(1));
    let bytes = read(&disk, lab.layer.place("data/big")).await.unwrap();
    assert!(bytes == lab.layer.files["data/big"]);
    // the one span that was wrong, alone
    let (requests, bytes) = lab.fetched();
    let spans = lab.layer.spans_of(lab.layer.place("data/big"));
    assert_eq!(requests, 2);
    assert!(bytes < 2 * lab.layer.compressed(&spans));
    assert_eq!(disk.degraded(), None);
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_is_not_asked_before_the_time_that_it_states() {
    let lab = Lab::with_options(Layer::new(0), patient(60));
    let disk = lab.disk().await;
    let busy = Fault::Status {
        code: 429,
        retry_after: Some("4".to_owned()),
    };
    lab.registry.fail(On::Data, busy, Times::Next(1));
    let began = Instant::now();
    let (big, small) = (lab.layer.place("data/big"), lab.layer.place("data/001"));
    // two readers of different spans, and only one of them has heard of it
    let first = start_read(&lab, &disk);
    until("the disk is degraded", || disk.degraded().is_some()).await;
    let second = read(&disk, small).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(4));
    assert!(first.await.unwrap().unwrap() == lab.layer.files["data/big"]);
    assert!(second == lab.layer.files["data/001"]);
    let refused = lab.registry.counters().log;
    let refused = refused.iter().filter(|request| request.status == 429);
    assert_eq!(refused.count(), 1);
    assert_eq!(disk.degraded(), None);

    // for longer than a read may wait
    let lab = Lab::with_options(Layer::new(0), patient(1));
    let disk = lab.disk().await;
    let busy = Fault::Status {
        code: 503,
        retry_after: Some("50".to_owned()),
    };
    lab.registry.fail(On::Data, busy, Times::Next(1));
    let error = read(&disk, big).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_eq!(lab.fetched().0, 1);
    assert!(disk.degraded().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_error_is_returned_soon_and_the_next_read_asks_again() {
    let waits = StoreOptions {
        io_timeout: None,
        ..StoreOptions::default()
    };
    let lab = Lab::with_options(Layer::new(0), waits);
    let disk = lab.disk().await;
    for (status, kind) in [(404, Kind::NotFound), (403, Kind::Unauthorized)] {
        lab.registry.reset_counters();
        lab.registry
            .fail(On::Data, Fault::status(status), Times::UntilHealed);
        let error = read(&disk, lab.layer.place("data/001")).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", error.report());
        assert_eq!(lab.fetched().0, 3);
        assert_eq!(disk.degraded(), Some(error.report()));
        lab.registry.heal();
    }
    let bytes = read(&disk, lab.layer.place("data/001")).await.unwrap();
    assert!(bytes == lab.layer.files["data/001"]);
    assert_eq!(disk.degraded(), None);
}

/// Who comes while a fetch is failing hears of what comes after, not of what was before.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_joined_a_failed_fetch_starts_its_own() {
    for failures in [Times::Next(3), Times::UntilHealed] {
        let lab = Lab::with_options(Layer::new(0), patient(60));
        let disk = lab.disk().await;
        let place = lab.layer.place("data/001");
        lab.registry.fail(On::Data, Fault::status(404), failures);
        let first = tokio::spawn({
            let (disk, place) = (Arc::clone(&disk), place.clone());
            async move { read(&disk, place).await }
        });
        until("the disk is degraded", || disk.degraded().is_some()).await;
        let second = read(&disk, place).await;
        assert_eq!(first.await.unwrap().unwrap_err().kind(), Kind::NotFound);
        match failures {
            // the outage ends with the first one's last try
            Times::Next(_) => {
                assert!(second.unwrap() == lab.layer.files["data/001"]);
                assert_eq!(lab.fetched().0, 4);
            }
            _ => {
                assert_eq!(second.unwrap_err().kind(), Kind::NotFound);
                assert_eq!(lab.fetched().0, 6);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_stay_wrong_are_an_error_and_degrade_the_disk() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let small = lab.layer.place("data/150");
    lab.registry
        .fail(On::Data, Fault::WrongByte { at: 0 }, Times::UntilHealed);
    let error = read(&disk, small.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let report = error.report();
    let span = lab.layer.spans_of(small.clone())[0];
    for part in [
        format!("span {span} "),
        lab.layer.layer.digest.to_string(),
        lab.registry.host(),
    ] {
        assert!(report.contains(&part), "{part} is missing in: {report}");
    }
    assert_eq!(disk.degraded(), Some(report));
    assert!(!disk.is_present(small.clone()));
    lab.registry.heal();
    let bytes = read(&disk, small).await.unwrap();
    assert!(bytes == lab.layer.files["data/150"]);
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_source_is_asked_if_one_sends_wrong_bytes() {
    let lab = Lab::new(Layer::new(0));
    let other = Registry::start();
    other.add_blob(super::fixture::REPOSITORY, lab.layer.blob.clone());
    let disk = lab.disk().await;
    lab.store
        .indexed(
            &lab.layer.layer,
            &lab.layer.table,
            TableBytes::of(lab.layer.ztoc.clone()),
            &source(&other).await,
        )
        .await
        .unwrap();
    // the one that was added last is asked first
    other.fail(On::Data, Fault::WrongByte { at: 0 }, Times::UntilHealed);
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
    assert!(lab.fetched().0 > 0);
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_survives_an_outage() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    lab.registry
        .fail(On::Data, Fault::status(503), Times::UntilHealed);
    let reading = start_read(&lab, &disk);
    until("the disk is degraded", || disk.degraded().is_some()).await;
    assert!(!reading.is_finished());
    lab.registry.heal();
    let bytes = reading.await.unwrap().unwrap();
    assert!(bytes == lab.layer.files["data/big"]);
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_the_timeout_is_an_error_and_the_next_read_tries_again() {
    let lab = Lab::with_options(Layer::new(0), patient(1));
    let disk = lab.disk().await;
    for fault in [Fault::status(500), Fault::Hang, Fault::Close] {
        lab.registry.fail(On::Data, fault, Times::UntilHealed);
        let error = start_read(&lab, &disk).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
        assert!(error.report().contains(&lab.layer.layer.digest.to_string()));
        assert!(disk.degraded().is_some());
        lab.registry.heal();
    }
    let bytes = start_read(&lab, &disk).await.unwrap().unwrap();
    assert!(bytes == lab.layer.files["data/big"]);
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_read_does_not_affect_other_readers() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    lab.registry
        .fail(On::Data, Fault::status(503), Times::UntilHealed);
    let first = start_read(&lab, &disk);
    until("the disk is degraded", || disk.degraded().is_some()).await;
    let second = start_read(&lab, &disk);
    first.abort();
    lab.registry.heal();
    assert!(second.await.unwrap().unwrap() == lab.layer.files["data/big"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_blob_is_an_error_soon() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    lab.registry
        .remove(super::fixture::REPOSITORY, &lab.layer.layer.digest);
    let read = tokio::time::timeout(Duration::from_secs(30), start_read(&lab, &disk));
    let error = read
        .await
        .expect("not the whole timeout")
        .unwrap()
        .unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{}", error.report());
}
