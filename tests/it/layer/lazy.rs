//! What is fetched when, asserted by counts.

use std::{os::unix::fs::PermissionsExt as _, sync::Arc, time::Duration};

use socinbd::{
    error::Kind,
    layer::{Allocation, ListedSpans, Store},
    oci::Packing,
    units::{DiskOffset, SpanId},
};

use super::fixture::{
    Files, Lab, Layer, Random, assert_holds, complete, open_when_free, range, read, tar,
};
use crate::support::{registry::Link, until};

#[tokio::test(flavor = "multi_thread")]
async fn import_fetches_nothing_and_the_complete_disk_is_right() {
    for layer in [Layer::new(0), Layer::plain()] {
        let lab = Lab::new(layer);
        let disk = lab.disk().await;
        // what udev and mount read: both ends, and the metadata
        read(&disk, range(0, 4096)).await.unwrap();
        read(&disk, range(disk.size() - (2 << 20), 2 << 20))
            .await
            .unwrap();
        assert_eq!(lab.fetched(), (0, 0));
        assert!(!disk.is_complete());

        complete(&disk).await;
        let (present, all) = disk.span_counts();
        assert_eq!(present, all);
        assert!(lab.fetched().1 <= lab.layer.layer.size);
        assert_holds(disk.path(), &lab.layer.files);
        assert_eq!(disk.degraded(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_costs_its_span_and_a_file_its_spans() {
    for layer in [Layer::new(0), Layer::plain()] {
        let lab = Lab::new(layer);
        let disk = lab.disk().await;
        let big = lab.layer.place("data/big");
        let mut seen = [false; 2];
        let mut fetched = std::collections::BTreeSet::new();
        // far from each other, so that no span is met twice by chance
        for block in (0..500).step_by(97) {
            let block = range(big.start.get() + block * 4096, 4096);
            let spans = lab.layer.spans_of(block.clone());
            lab.registry.reset_counters();
            read(&disk, block).await.unwrap();
            let missing: Vec<_> = spans
                .iter()
                .filter(|span| fetched.insert(**span))
                .copied()
                .collect();
            let expected = u64::from(!missing.is_empty());
            assert_eq!(lab.fetched(), (expected, lab.layer.compressed(&missing)));
            seen[usize::from(spans.len() > 1)] = true;
        }
        assert!(seen[0], "no block lay in one span");

        let lab = Lab::new(lab.layer);
        let disk = lab.disk().await;
        let bytes = read(&disk, big.clone()).await.unwrap();
        assert!(bytes == lab.layer.files["data/big"]);
        let spans = lab.layer.spans_of(big);
        assert_eq!(lab.fetched(), (1, lab.layer.compressed(&spans)));
        assert_eq!(disk.counters().fetches, 1);
        // and nothing the second time
        read(&disk, lab.layer.place("data/big")).await.unwrap();
        assert_eq!(lab.fetched().0, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_read_in_small_steps_costs_its_spans_and_no_more() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let big = lab.layer.place("data/big");
    let mut position = big.start;
    let mut misses = 0;
    while position < big.end {
        let end = DiskOffset((position.get() + 16384).min(big.end.get()));
        misses += u32::from(!disk.is_present(position..end));
        read(&disk, position..end).await.unwrap();
        position = end;
    }
    let spans = lab.layer.spans_of(big.clone());
    let (requests, bytes) = lab.fetched();
    // spans that are fetched apart share a byte
    let shared = spans.len() as u64;
    let least = lab.layer.compressed(&spans);
    assert!(
        (least..=least + shared).contains(&bytes),
        "{bytes} bytes of {least}"
    );
    assert!(
        requests < spans.len() as u64,
        "nothing was fetched ahead in runs"
    );
    assert!(
        misses < spans.len() as u32 / 2,
        "{misses} reads had to wait"
    );
    let (present, _) = disk.span_counts();
    assert_eq!(present as usize, spans.len() + lab.layer.empty_spans());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_of_the_whole_costs_the_layer_once_in_few_requests() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    for start in (0..disk.size()).step_by(128 << 10) {
        let length = (128 << 10).min(disk.size() - start);
        read(&disk, range(start, length)).await.unwrap();
    }
    complete(&disk).await;
    let (requests, bytes) = lab.fetched();
    assert!(bytes * 100 <= lab.layer.layer.size * 102, "{bytes} bytes");
    let spans = lab.layer.spans.spans.len() as u64;
    assert!(
        requests * 2 <= spans,
        "{requests} requests for {spans} spans"
    );
}

/// GETs share the link: what is wanted last must not slow down what is wanted next.
#[tokio::test(flavor = "multi_thread")]
async fn read_ahead_waits_for_room_on_the_link() {
    let big = Random::new(13).text(24 << 20);
    let files = Files::from([("data/big".to_owned(), big)]);
    let blob = tar(&files);
    let lab = Lab::new(Layer::of(files, blob, Packing::Plain, 1 << 20));
    lab.registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 30_000_000,
    });
    let disk = lab.disk().await;
    let place = lab.layer.place("data/big");
    let on_the_way = || {
        let counters = lab.registry.counters();
        let blobs = counters.log.iter().filter_map(|entry| {
            let range = entry.range.clone()?;
            Some(range.end - range.start - entry.bytes)
        });
        blobs.sum::<u64>()
    };
    let mut seen = Vec::new();
    for start in (place.start.get()..place.end.get()).step_by(256 << 10) {
        let length = (256 << 10).min(place.end.get() - start);
        let bytes = read(&disk, range(start, length)).await.unwrap();
        let from = (start - place.start.get()) as usize;
        assert!(bytes == lab.layer.files["data/big"][from..from + bytes.len()]);
        seen.push(on_the_way());
    }
    // 2 MiB are enough for this link, and a GET has up to 2 MiB; when this process had to wait for a processor it can be more
    seen.sort_unstable();
    let most = seen[seen.len() * 9 / 10];
    assert!(
        (1 << 20..5 << 20).contains(&most),
        "{seen:?} bytes at a time"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_share_one_fetch_a_span() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let big = lab.layer.place("data/big");
    let readers = (0..64).map(|reader| {
        let disk = Arc::clone(&disk);
        let big = big.clone();
        tokio::spawn(async move {
            // each another part, all over the same spans
            let start = big.start.get() + reader * 512;
            read(&disk, range(start, 1 << 20)).await.unwrap()
        })
    });
    for (reader, bytes) in futures_util::future::join_all(readers)
        .await
        .into_iter()
        .enumerate()
    {
        let from = reader * 512;
        assert!(bytes.unwrap() == lab.layer.files["data/big"][from..from + (1 << 20)]);
    }
    let mut starts: Vec<_> = lab.registry.counters().ranges(&lab.layer.layer.digest);
    starts.sort_by_key(|range| range.start);
    for pair in starts.windows(2) {
        assert!(
            pair[0].end <= pair[1].start + 1,
            "{pair:?} overlap by more than a shared byte"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_reads_return_the_bytes_of_the_complete_disk() {
    let whole = Lab::new(Layer::new(0));
    let disk = whole.disk().await;
    complete(&disk).await;
    assert_holds(disk.path(), &whole.layer.files);
    let model = std::fs::read(disk.path()).unwrap();

    for seed in 0..4 {
        let lab = Lab::new(Layer::new(0));
        let disk = lab.disk().await;
        let mut random = Random::new(seed * 77 + 5);
        for _ in 0..60 {
            let start = random.below(disk.size());
            let limit = [1, 700, 5000, 300_000][random.below(4) as usize];
            let length = (random.below(limit) + 1).min(disk.size() - start);
            let bytes = read(&disk, range(start, length)).await.unwrap();
            assert!(bytes == model[start as usize..(start + length) as usize]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn allocation_follows_what_is_present() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let big = lab.layer.place("data/big");
    let sum = |extents: &[(u64, Allocation)]| extents.iter().map(|(length, _)| length).sum::<u64>();

    let extents = disk.allocation(range(0, disk.size()));
    assert_eq!(sum(&extents), disk.size());
    assert!(extents.iter().all(|(length, _)| length % 4096 == 0));
    assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1));
    let kinds: Vec<_> = extents.iter().map(|(_, kind)| *kind).collect();
    assert!(
        [Allocation::Present, Allocation::Absent, Allocation::Zero]
            .iter()
            .all(|kind| kinds.contains(kind))
    );
    let (last, kind) = extents[extents.len() - 1];
    assert!(kind == Allocation::Zero && last >= 2 << 20);

    assert_eq!(
        disk.allocation(big.clone()),
        [(3_000_000, Allocation::Absent)]
    );
    let block = range(big.start.get() + (1 << 20), 4096);
    read(&disk, block.clone()).await.unwrap();
    assert_eq!(disk.allocation(block), [(4096, Allocation::Present)]);
    let extents = disk.allocation(big);
    let kinds: Vec<_> = extents.iter().map(|(_, kind)| *kind).collect();
    assert_eq!(
        kinds,
        [Allocation::Absent, Allocation::Present, Allocation::Absent]
    );
    assert_eq!(sum(&extents), 3_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_layer_and_table_give_the_same_open_disk() {
    let lab = Lab::new(Layer::new(0));
    let asked = futures_util::future::join_all((0..8).map(|_| lab.disk())).await;
    assert!(asked.iter().all(|disk| Arc::ptr_eq(disk, &asked[0])));
    let listed = lab.store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].layer, lab.layer.layer);
    assert_eq!(listed[0].table, lab.layer.table);
    assert!(!listed[0].complete && !listed[0].verified);
    assert_eq!(listed[0].spans as usize, lab.layer.spans.spans.len());
    assert!(lab.store.verified(&lab.layer.layer).unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_store_of_a_root_is_refused() {
    let lab = Lab::new(Layer::new(0));
    let error = Store::open(lab.root.path()).err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.report().contains(&std::process::id().to_string()));
    drop(lab.store);
    open_when_free(lab.root.path()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_users_cannot_read_a_disk() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    complete(&disk).await;
    disk.sync().unwrap();
    let mut files = 0;
    let mut waiting = vec![lab.root.path().join("layers")];
    while let Some(path) = waiting.pop() {
        let metadata = std::fs::metadata(&path).unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        if metadata.is_dir() {
            assert_eq!(mode, 0o700, "{}", path.display());
            let entries = std::fs::read_dir(&path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else {
            assert_eq!(mode, 0o600, "{}", path.display());
            files += 1;
        }
    }
    assert_eq!(files, 10, "the lock and nine files of the disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uncompressed_tar_may_have_padding_after_its_end() {
    let files = super::fixture::files(0);
    let mut blob = super::fixture::tar(&files);
    blob.resize(blob.len() + 7000, 0);
    let lab = Lab::new(Layer::of(files, blob, Packing::Plain, 100_000));
    let disk = lab.disk().await;
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_past_the_last_span_fetches_the_existing_ones() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let (_, all) = disk.span_counts();
    let listed = |spans: std::ops::Range<u32>| ListedSpans {
        disk: Arc::clone(&disk),
        spans: SpanId(spans.start)..SpanId(spans.end),
    };
    lab.store.prefetch(vec![
        listed(all..u32::MAX),
        listed(u32::MAX - 1..u32::MAX),
        listed(all - 1..all + 1),
        listed(0..u32::MAX),
    ]);
    until("all spans are here", || disk.span_counts().0 == all).await;
    assert_eq!(disk.degraded(), None);
}
