//! Whole blobs as streams.

use futures_util::StreamExt as _;
use socinbd::error::Kind;

use super::*;
use crate::support::{
    registry::{Fault, On, Times},
    until,
};

const PART: usize = 4 << 20;
const SIZE: usize = 5 * PART + 12_345;

async fn big_blob() -> (Registry, Vec<u8>, Digest, Source) {
    let registry = Registry::start();
    let bytes = noise(SIZE, 3);
    let blob = registry.add_blob("app", bytes.clone());
    let source = open(&registry, "app").await;
    (registry, bytes, blob, source)
}

#[tokio::test]
async fn a_large_blob_comes_in_parts_and_in_order() {
    let (registry, bytes, blob, source) = big_blob().await;
    assert!(streamed(&source, &blob, SIZE).await.expect("the blob") == bytes);
    let mut ranges = registry.counters().ranges(&blob);
    ranges.sort_by_key(|range| range.start);
    let parts: Vec<_> = (0..6)
        .map(|part| (part * PART) as u64..((part + 1) * PART).min(SIZE) as u64)
        .collect();
    assert_eq!(ranges, parts);
    assert_eq!(registry.counters().blob(&blob).bytes, SIZE as u64);
}

#[tokio::test]
async fn a_small_blob_is_one_request() {
    let registry = Registry::start();
    let source = open(&registry, "app").await;
    for size in [1, 70_000, PART] {
        let bytes = noise(size, size as u64);
        let blob = registry.add_blob("app", bytes.clone());
        assert!(streamed(&source, &blob, size).await.expect("the blob") == bytes);
        assert_eq!(registry.counters().blob(&blob).requests, 1, "{size}");
    }
    let empty = registry.add_blob("app", "");
    assert!(
        streamed(&source, &empty, 0)
            .await
            .expect("nothing")
            .is_empty()
    );
}

#[tokio::test]
async fn cuts_failures_and_refusals_on_the_way_do_not_show() {
    let (registry, bytes, blob, source) = big_blob().await;
    for fault in [
        Fault::Cut { after: 1_000_000 },
        Fault::status(503),
        Fault::Truncate { to: 3_000_000 },
        Fault::WrongRange { shift: 5 },
        Fault::Close,
        Fault::TooLong { by: 100_000 },
    ] {
        registry.fail(On::Data, fault, Times::Next(2));
    }
    assert!(streamed(&source, &blob, SIZE).await.expect("the blob") == bytes);
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_read_in_one_answer() {
    let (registry, bytes, blob, source) = big_blob().await;
    registry.fail(On::Data, Fault::IgnoreRange, Times::UntilHealed);
    assert!(streamed(&source, &blob, SIZE).await.expect("the blob") == bytes);
    let count = registry.counters().blob(&blob);
    assert_eq!((count.requests, count.bytes), (1, SIZE as u64));
}

#[tokio::test]
async fn a_server_that_forgets_ranges_half_way_is_still_read_right() {
    let (registry, bytes, blob, source) = big_blob().await;
    registry.fail(On::Data, Fault::Truncate { to: 2_000_000 }, Times::Next(1));
    registry.fail(On::Data, Fault::IgnoreRange, Times::UntilHealed);
    assert!(streamed(&source, &blob, SIZE).await.expect("the blob") == bytes);
}

#[tokio::test]
async fn a_reader_that_pauses_holds_four_parts_at_most() {
    let (registry, _, blob, source) = big_blob().await;
    let mut stream = source.stream(&blob, SIZE as u64).await.expect("a stream");
    stream.next().await.expect("a piece").expect("bytes");
    until("four parts are sent", || {
        registry.counters().blob(&blob).bytes == 4 * PART as u64
    })
    .await;
    assert_eq!(registry.counters().ranges(&blob).len(), 4);
    drop(stream);
    // a new stream works while the old one's requests end
    assert!(streamed(&source, &blob, SIZE).await.is_ok());
}

#[tokio::test]
async fn a_wrong_size_is_corrupt() {
    let (_registry, _, blob, source) = big_blob().await;
    for size in [SIZE - 1, SIZE + 1, PART - 1] {
        let error = streamed(&source, &blob, size)
            .await
            .expect_err("another size");
        assert_eq!(error.kind(), Kind::Corrupt, "{size}: {error:?}");
    }
}

#[tokio::test]
async fn a_stream_that_fails_ends_after_its_error() {
    let (registry, bytes, blob, _) = big_blob().await;
    let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
    let mut stream = source.stream(&blob, SIZE as u64).await.expect("a stream");
    let first = stream.next().await.expect("a piece").expect("bytes");
    assert_eq!(first, bytes[..first.len()]);
    registry.fail(On::Any, Fault::Cut { after: 0 }, Times::UntilHealed);
    drop(registry);
    let mut error = None;
    while let Some(piece) = stream.next().await {
        assert!(error.is_none(), "pieces after the error");
        error = piece.err();
    }
    assert_eq!(
        error.expect("the registry is gone").kind(),
        Kind::Unavailable
    );
}
