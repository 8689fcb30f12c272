//! A disk from a compact index: what is fetched when, and that the bytes are right.

use socinbd::layer::{Store, StoreOptions, TableBytes};

use super::CompactLab;
use crate::layer::fixture::{Layer, Random, assert_holds, complete, open_when_free, range, read};

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_is_right_and_its_first_span_needs_no_window() {
    for layer in [Layer::new(0), Layer::plain()] {
        let lab = CompactLab::new(layer);
        let disk = lab.disk().await;
        // what udev and mount read
        read(&disk, range(0, 4096)).await.unwrap();
        assert_eq!(lab.lab.fetched(), (0, 0));
        complete(&disk).await;
        assert_eq!(lab.windows_fetched(), (0, 0));
        assert!(lab.lab.fetched().1 <= lab.lab.layer.layer.size);
        assert_holds(disk.path(), &lab.lab.layer.files);
        assert_eq!(disk.degraded(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_costs_its_window_unless_the_one_before_was_decoded() {
    let lab = CompactLab::new(Layer::new(0));
    let disk = lab.disk().await;
    let span = lab.span_in_big();
    let window = |span: usize| lab.table.spans.spans[span].window.clone().unwrap();
    let at = |span: usize| window(span).start as u64..window(span).end as u64;
    // GETs of the layer, and whether the span's own window was fetched; more may be read ahead
    let read_in = async |span: usize| {
        lab.lab.registry.reset_counters();
        let (place, content) = lab.place_in(span);
        assert!(read(&disk, place).await.unwrap() == content, "span {span}");
        let windows = lab.lab.registry.counters().ranges(&lab.index.blob);
        (lab.lab.fetched().0 > 0, windows.contains(&at(span)))
    };
    let first = read_in(span).await;
    assert_eq!(first, (true, true), "the first of a run");
    assert_eq!(lab.windows_fetched(), (1, window(span).len() as u64));
    let next = lab.end_of_miss(&disk, span).await;
    assert!(next > span + 1, "a miss brings more than its span");
    assert_eq!(read_in(next).await, (true, false), "the one after it");
    assert_eq!(read_in(span - 1).await, (true, true), "the one before it");
    assert_eq!(read_in(span).await, (false, false), "it is there");
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_windows_outlives_the_daemon() {
    let lab = CompactLab::new(Layer::new(0));
    let disk = lab.disk().await;
    let span = lab.span_in_big();
    let (place, content) = lab.place_in(span);
    assert!(read(&disk, place).await.unwrap() == content);
    lab.end_of_miss(&disk, span).await;
    disk.sync().unwrap();
    drop(disk);
    let CompactLab { lab: inner, .. } = &lab;
    let root = tempfile::tempdir().unwrap();
    // another store on a copy of the root: the first one is still open
    let copied = std::process::Command::new("cp")
        .args(["-a", "--sparse=always"])
        .arg(inner.root.path().join("layers"))
        .arg(root.path())
        .status();
    assert!(copied.unwrap().success());
    let store = open_when_free(root.path()).await;
    let disk = lab.disk_in(&store).await;
    lab.lab.registry.reset_counters();
    let (place, content) = lab.place_in(span);
    assert!(read(&disk, place).await.unwrap() == content);
    assert_eq!(lab.lab.fetched().0, 0);
    let next = lab.end_of_miss(&disk, span).await;
    let (place, content) = lab.place_in(next);
    assert!(read(&disk, place).await.unwrap() == content);
    assert_eq!((lab.lab.fetched().0, lab.windows_fetched().0), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_in_any_order_give_the_files() {
    for number in 0..3 {
        let lab = CompactLab::new(Layer::new(number));
        let disk = lab.disk().await;
        let mut random = Random::new(number as u64);
        let big = lab.lab.layer.place("data/big");
        let content = &lab.lab.layer.files["data/big"];
        for _ in 0..60 {
            let from = random.below(content.len() as u64 - 9000);
            let length = 1 + random.below(8999);
            let place = range(big.start.get() + from, length);
            let found = read(&disk, place).await.unwrap();
            assert!(found == content[from as usize..(from + length) as usize]);
        }
        complete(&disk).await;
        assert_holds(disk.path(), &lab.lab.layer.files);
        // nobody needs the notes of windows any more
        let notes = disk.path().with_file_name("windows");
        let kept = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(notes).unwrap());
        assert!(kept * 512 <= 64 << 10, "{} bytes of notes", kept * 512);
        assert_eq!(disk.degraded(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_another_version_is_told_from_one_that_is_damaged() {
    let lab = CompactLab::new(Layer::new(0));
    for (at, kind) in [
        (8, socinbd::error::Kind::Unsupported),
        (0, socinbd::error::Kind::Corrupt),
        (64, socinbd::error::Kind::Corrupt),
    ] {
        let mut blob = lab.blob.to_vec();
        blob[at] ^= 0x40;
        let mut index = lab.index;
        index.table = socinbd::oci::Digest::of(&blob[..index.table_size as usize]);
        let root = tempfile::tempdir().unwrap();
        let store = Store::open_with(root.path(), StoreOptions::default()).unwrap();
        let source = lab.lab.source().await;
        let table = bytes::Bytes::from(blob).slice(..index.table_size as usize);
        let error = store
            .compact(
                &lab.lab.layer.layer,
                &index,
                TableBytes::of(table),
                &source,
                &source,
            )
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind(), kind, "{}", error.report());
        assert!(
            error.report().contains("compact table"),
            "{}",
            error.report()
        );
    }
}
