//! Ranges of blobs and servers that get them wrong.

use std::time::Instant;

use bytes::Bytes;
use socinbd::error::Kind;

use super::*;
use crate::support::registry::{Fault, On, Times};

/// A registry with one blob of 100,000 bytes.
async fn one_blob() -> (Registry, Vec<u8>, Digest, Source) {
    let registry = Registry::start();
    let bytes = noise(100_000, 1);
    let blob = registry.add_blob("app", bytes.clone());
    let source = open(&registry, "app").await;
    (registry, bytes, blob, source)
}

#[tokio::test]
async fn a_range_is_exactly_the_bytes_asked_for() {
    let (registry, bytes, blob, source) = one_blob().await;
    for range in [0..1_u64, 0..100_000, 5_000..70_001, 99_999..100_000, 7..7] {
        let got = source.range(&blob, range.clone()).await.expect("the range");
        assert_eq!(got, bytes[range.start as usize..range.end as usize]);
    }
    let counters = registry.counters();
    assert_eq!(
        counters.ranges(&blob),
        [0..1, 0..100_000, 5_000..70_001, 99_999..100_000]
    );
    assert_eq!(counters.blob(&blob).bytes, 1 + 100_000 + 65_001 + 1);
    for entry in &counters.log {
        assert_eq!(entry.headers["accept-encoding"], "identity");
        assert_eq!(
            entry.headers["user-agent"],
            concat!("socinbd/", env!("CARGO_PKG_VERSION"))
        );
    }
}

#[tokio::test]
async fn a_body_that_is_cut_goes_on_where_it_broke_off() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::Cut { after: 40_000 }, Times::Next(2));
    let got = source.range(&blob, 1_000..99_000).await.expect("the range");
    assert_eq!(got, bytes[1_000..99_000]);
    let ranges = registry.counters().ranges(&blob);
    assert_eq!(ranges.len(), 3, "{ranges:?}");
    assert!(ranges[0].start < ranges[1].start && ranges[1].start < ranges[2].start);
    assert!(ranges.iter().all(|range| range.end == 99_000), "{ranges:?}");
}

#[tokio::test]
async fn a_body_that_ends_early_in_good_form_goes_on() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::Truncate { to: 30_000 }, Times::Next(3));
    let got = source.range(&blob, 0..100_000).await.expect("the range");
    assert_eq!(got, bytes);
    assert_eq!(
        registry.counters().ranges(&blob),
        [
            0..100_000,
            30_000..100_000,
            60_000..100_000,
            90_000..100_000
        ]
    );
}

#[tokio::test]
async fn a_server_that_sends_parts_of_a_range_is_asked_for_the_next_at_once() {
    let (registry, bytes, blob, _) = one_blob().await;
    registry.fail(On::Data, Fault::Part { of: 30_000 }, Times::UntilHealed);
    // whoever has no patience at all gets it: a part that is whole is no failure
    let limits = Limits {
        data_patience: Duration::ZERO,
        ..IMPATIENT
    };
    let reference = registry.reference("app").parse().expect("a reference");
    let source = Source::open_with(&reference, &Access::default(), limits).await;
    let source = source.expect("opening touches no network");
    let got = source.range(&blob, 1..100_000).await.expect("the range");
    assert_eq!(got, bytes[1..]);
    let starts: Vec<u64> = registry
        .counters()
        .ranges(&blob)
        .iter()
        .map(|range| range.start)
        .collect();
    assert_eq!(starts, [1, 30_001, 60_001, 90_001]);
    // parts so small that they are no progress are
    registry.heal();
    registry.fail(On::Data, Fault::Part { of: 1_000 }, Times::UntilHealed);
    let error = source.range(&blob, 1..100_000).await.expect_err("parts");
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
}

#[tokio::test]
async fn a_body_that_gives_nothing_is_not_asked_for_for_ever() {
    for fault in [
        Fault::Truncate { to: 0 },
        Fault::Cut { after: 0 },
        Fault::Truncate { to: 1 },
    ] {
        let (registry, _, blob, _) = one_blob().await;
        let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
        registry.fail(On::Data, fault.clone(), Times::UntilHealed);
        let error = source
            .range(&blob, 0..9_000)
            .await
            .expect_err("nothing came");
        assert_eq!(error.kind(), Kind::Unavailable, "{fault:?}: {error:?}");
        assert!(registry.counters().blob(&blob).requests > 1);
    }
}

#[tokio::test]
async fn a_body_that_is_too_long_is_left_at_the_end_of_the_range() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::TooLong { by: 50_000 }, Times::UntilHealed);
    for range in [0..500_u64, 20_000..90_000, 99_000..100_000] {
        let got = source.range(&blob, range.clone()).await.expect("the range");
        assert_eq!(got, bytes[range.start as usize..range.end as usize]);
    }
}

#[tokio::test]
async fn a_part_that_is_not_the_one_asked_for_is_never_taken() {
    for fault in [
        Fault::WrongRange { shift: 1 },
        Fault::WrongRange { shift: 50_000 },
        Fault::ContentRange(String::new()),
        Fault::ContentRange("bytes 3-2/100000".to_owned()),
        Fault::ContentRange("bytes 0-8999/100000".to_owned()),
        Fault::ContentRange("lines 1000-9999/100000".to_owned()),
        Fault::Multipart,
    ] {
        let (registry, bytes, blob, source) = one_blob().await;
        registry.fail(On::Data, fault.clone(), Times::Next(1));
        let got = source
            .range(&blob, 1_000..10_000)
            .await
            .expect("once wrong");
        assert_eq!(got, bytes[1_000..10_000], "{fault:?}");
        assert_eq!(registry.counters().blob(&blob).requests, 2, "{fault:?}");
        // always wrong: then the whole blob, and the part of it
        registry.fail(On::Data, fault.clone(), Times::UntilHealed);
        let got = source
            .range(&blob, 1_000..10_000)
            .await
            .expect("always wrong");
        assert_eq!(got, bytes[1_000..10_000], "{fault:?}");
        let last = registry
            .counters()
            .log
            .last()
            .and_then(|entry| entry.range.clone());
        assert_eq!(last, None, "{fault:?}");
    }
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_read_no_further_than_the_range() {
    let registry = Registry::start();
    let bytes = noise(64 << 20, 2);
    let blob = registry.add_blob("app", bytes.clone());
    let source = open(&registry, "app").await;
    registry.fail(On::Data, Fault::IgnoreRange, Times::UntilHealed);
    let got = source
        .range(&blob, 70_000..80_000)
        .await
        .expect("the range");
    assert_eq!(got, bytes[70_000..80_000]);
    let count = registry.counters().blob(&blob);
    assert_eq!(count.requests, 1);
    assert!(count.bytes < 32 << 20, "{} bytes were sent", count.bytes);
}

#[tokio::test]
async fn a_server_that_ignores_ranges_and_breaks_off_is_read_again() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::Cut { after: 60_000 }, Times::Next(1));
    registry.fail(On::Data, Fault::IgnoreRange, Times::UntilHealed);
    let got = source.range(&blob, 0..100_000).await.expect("the range");
    assert_eq!(got, bytes);
}

#[tokio::test]
async fn a_416_for_a_good_range_is_answered_by_taking_the_whole() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::Unsatisfiable, Times::Next(1));
    let got = source.range(&blob, 10..20).await.expect("the range");
    assert_eq!(got, bytes[10..20]);
    let log = registry.counters().log;
    assert_eq!((log[0].status, log[1].status), (416, 200));
}

#[tokio::test]
async fn a_range_past_the_end_is_corrupt_and_says_the_size() {
    let (registry, _, blob, source) = one_blob().await;
    for range in [
        100_000..100_001_u64,
        99_999..100_001,
        0..100_001,
        200_000..300_000,
    ] {
        let before = registry.counters().total().requests;
        let error = source
            .range(&blob, range.clone())
            .await
            .expect_err("no such bytes");
        assert_eq!(error.kind(), Kind::Corrupt, "{range:?}: {error:?}");
        assert!(error.report().contains("100000 bytes"), "{error:?}");
        assert_eq!(
            registry.counters().total().requests,
            before + 1,
            "{range:?}"
        );
    }
}

#[tokio::test]
async fn a_connection_that_stops_is_left_and_the_rest_asked_for() {
    for fault in [
        Fault::Stall { after: 20_000 },
        Fault::Hang,
        Fault::Drip {
            bytes: 16,
            pause: Duration::from_millis(20),
        },
    ] {
        let (registry, bytes, blob, _) = one_blob().await;
        let limits = Limits {
            stall: Duration::from_millis(300),
            first_byte: Duration::from_millis(1300),
            ..LIMITS
        };
        let source = open_with(&registry, "app", &Access::default(), limits).await;
        registry.fail(On::Data, fault.clone(), Times::Next(1));
        let began = Instant::now();
        let got = source.range(&blob, 0..100_000).await.expect("the range");
        assert_eq!(got, bytes, "{fault:?}");
        assert!(began.elapsed() < Duration::from_secs(4), "{fault:?}");
        assert_eq!(registry.counters().blob(&blob).requests, 2, "{fault:?}");
    }
}

#[tokio::test]
async fn a_slow_connection_is_not_a_stopped_one() {
    let (registry, bytes, blob, _) = one_blob().await;
    let limits = Limits {
        stall: Duration::from_millis(400),
        ..LIMITS
    };
    let source = open_with(&registry, "app", &Access::default(), limits).await;
    // five times the stall time in all, and more than 4 KiB in each
    registry.fail(
        On::Data,
        Fault::Drip {
            bytes: 5_000,
            pause: Duration::from_millis(100),
        },
        Times::UntilHealed,
    );
    assert_eq!(
        source.range(&blob, 0..100_000).await.expect("the range"),
        bytes
    );
    assert_eq!(registry.counters().blob(&blob).requests, 1);
}

#[tokio::test]
async fn failures_that_pass_are_tried_through() {
    for fault in [
        Fault::status(500),
        Fault::status(502),
        Fault::status(503),
        Fault::status(504),
        Fault::status(429),
        Fault::status(408),
        Fault::Close,
    ] {
        let (registry, bytes, blob, source) = one_blob().await;
        registry.fail(On::Data, fault.clone(), Times::Next(3));
        assert_eq!(
            source.range(&blob, 0..50).await.expect("the range"),
            bytes[..50]
        );
        assert_eq!(registry.counters().total().requests, 4, "{fault:?}");
    }
}

#[tokio::test]
async fn failures_that_do_not_pass_are_not_tried_again() {
    for (code, kind) in [
        (400, Kind::Unsupported),
        (403, Kind::Unauthorized),
        (404, Kind::NotFound),
        (410, Kind::NotFound),
        (501, Kind::Unsupported),
    ] {
        let (registry, _, blob, source) = one_blob().await;
        registry.fail(On::Data, Fault::status(code), Times::UntilHealed);
        let error = source.range(&blob, 0..50).await.expect_err("it says no");
        assert_eq!(error.kind(), kind, "{error:?}");
        let report = error.report();
        for part in [
            &code.to_string(),
            &blob.to_string(),
            &registry.host(),
            "FAULT",
        ] {
            assert!(report.contains(part), "{part} in {report}");
        }
        assert_eq!(registry.counters().total().requests, 1, "{code}");
    }
}

#[tokio::test]
async fn retry_after_is_obeyed_within_the_patience() {
    let (registry, bytes, blob, source) = one_blob().await;
    let slow_down = |retry_after: &str| Fault::Status {
        code: 429,
        retry_after: Some(retry_after.to_owned()),
    };
    registry.fail(On::Data, slow_down("1"), Times::Next(1));
    let began = Instant::now();
    assert_eq!(
        source.range(&blob, 0..50).await.expect("the range"),
        bytes[..50]
    );
    assert!(began.elapsed() >= Duration::from_secs(1));

    registry.fail(On::Data, slow_down("3600"), Times::UntilHealed);
    registry.reset_counters();
    let error = source.range(&blob, 0..50).await.expect_err("too long");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.report().contains("3600 s"), "{error:?}");
    assert_eq!(registry.counters().total().requests, 1);
}

#[tokio::test]
async fn a_registry_that_stays_down_is_named_with_the_tries() {
    let (registry, _, blob, _) = one_blob().await;
    let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
    registry.fail(On::Any, Fault::status(503), Times::UntilHealed);
    let error = source.range(&blob, 0..50).await.expect_err("it stays down");
    assert_eq!(error.kind(), Kind::Unavailable);
    let report = error.report();
    let tries = registry.counters().total().requests;
    assert!(tries > 1);
    for part in [
        &format!("gave up after {tries} tries"),
        "503 Service Unavailable",
        "bytes 0-49",
        &blob.to_string(),
        &registry.reference("app"),
    ] {
        assert!(report.contains(part), "{part} in {report}");
    }
}

#[tokio::test]
async fn a_registry_that_comes_back_is_found_again() {
    let (registry, bytes, blob, _) = one_blob().await;
    let limits = Limits {
        data_patience: Duration::from_secs(20),
        ..LIMITS
    };
    let source = open_with(&registry, "app", &Access::default(), limits).await;
    let address = registry.host().parse().expect("an address");
    // its connection is in the pool when the registry goes
    source.range(&blob, 0..10).await.expect("the range");
    drop(registry);
    let reading = tokio::spawn(async move { source.range(&blob, 0..50_000).await });
    let registry = Registry::listen(address);
    registry.add_blob("app", bytes.clone());
    let got = reading.await.expect("no panic").expect("the range");
    assert_eq!(got, bytes[..50_000]);
}

#[tokio::test]
async fn a_blob_is_checked_against_size_and_digest() {
    let (registry, bytes, blob, source) = one_blob().await;
    let whole = source
        .blob(&blob, 100_000, 1 << 20)
        .await
        .expect("the blob");
    assert_eq!(whole, bytes);

    registry.fail(On::Data, Fault::WrongByte { at: 70_000 }, Times::Next(1));
    let whole = source
        .blob(&blob, 100_000, 1 << 20)
        .await
        .expect("once wrong");
    assert_eq!(whole, bytes);

    registry.fail(
        On::Data,
        Fault::WrongByte { at: 70_000 },
        Times::UntilHealed,
    );
    let error = source
        .blob(&blob, 100_000, 1 << 20)
        .await
        .expect_err("always wrong");
    assert_eq!(error.kind(), Kind::Corrupt);
    registry.heal();

    for size in [99_999, 100_001] {
        let error = source
            .blob(&blob, size, 1 << 20)
            .await
            .expect_err("another size");
        assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    }
    let before = registry.counters().total();
    let error = source
        .blob(&blob, 100_000, 99_999)
        .await
        .expect_err("too large");
    assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
    assert_eq!(
        registry.counters().total(),
        before,
        "nothing is fetched that is too large"
    );

    let empty = registry.add_blob("app", Bytes::new());
    assert!(
        source
            .blob(&empty, 0, 10)
            .await
            .expect("the empty blob")
            .is_empty()
    );
}

#[tokio::test]
async fn a_blob_that_breaks_off_goes_on_by_range() {
    let (registry, bytes, blob, source) = one_blob().await;
    registry.fail(On::Data, Fault::Truncate { to: 30_000 }, Times::Next(1));
    // in good form its length is a lie about the size, so only a cut connection breaks off
    let error = source
        .blob(&blob, 100_000, 1 << 20)
        .await
        .expect_err("another size");
    assert_eq!(error.kind(), Kind::Corrupt);
    registry.fail(On::Data, Fault::Cut { after: 64_000 }, Times::Next(1));
    registry.reset_counters();
    let whole = source
        .blob(&blob, 100_000, 1 << 20)
        .await
        .expect("the blob");
    assert_eq!(whole, bytes);
    let log = registry.counters().log;
    assert_eq!(log[0].range, None);
    assert!(
        log[1].range.as_ref().is_some_and(|range| range.start > 0),
        "{log:?}"
    );
}

/// An answer that calls itself the whole, with a `Content-Range`.
fn called_whole(content_range: String, body: &[u8]) -> Fault {
    Fault::Answer {
        code: 200,
        headers: vec![("content-range".to_owned(), content_range)],
        body: body.to_vec().into(),
    }
}

/// A server that calls a part the whole says by its `Content-Range` which part it is.
#[tokio::test]
async fn a_200_with_a_content_range_is_that_part() {
    let (registry, bytes, blob, source) = one_blob().await;
    for (start, end) in [(100, 200), (50, 300), (100, 150), (0, 100_000)] {
        let said = format!("bytes {start}-{}/100000", end - 1);
        let part = called_whole(said, &bytes[start..end]);
        registry.fail(On::Data, part, Times::Next(1));
        let before = registry.counters().total().requests;
        let found = source.range(&blob, 100..200).await.expect("the part");
        assert_eq!(found, bytes[100..200], "{start}-{end}");
        // what it has is not asked for again
        let asked = registry.counters().total().requests - before;
        assert_eq!(asked, if end < 200 { 2 } else { 1 }, "{start}-{end}");
    }
}

#[tokio::test]
async fn a_200_that_says_another_part_or_none_is_asked_again() {
    let (registry, bytes, blob, source) = one_blob().await;
    for (said, body) in [
        ("bytes 300-399/100000", &bytes[300..400]),
        // a part by its name and the whole by its length
        ("bytes 100-199/100000", &bytes[..]),
        ("lines 1-2/3", &bytes[300..400]),
    ] {
        registry.fail(
            On::Data,
            called_whole(said.to_owned(), body),
            Times::Next(1),
        );
        let found = source.range(&blob, 100..200).await.expect("once wrong");
        assert_eq!(found, bytes[100..200], "{said}");
    }
    // always, and it is the whole: it is taken when the whole was asked for
    let whole = called_whole("all of it".to_owned(), &bytes);
    registry.fail(On::Data, whole, Times::UntilHealed);
    let found = source.range(&blob, 100..200).await.expect("the whole");
    assert_eq!(found, bytes[100..200]);
}
