//! Ranges of blobs, streams of whole ones, and servers that get them wrong.

use super::*;

#[tokio::test]
async fn a_range_is_exactly_the_bytes_asked_for() {
    let registry = Registry::start();
    let bytes = noise(100_000, 1);
    let blob = registry.add_blob("app", bytes.clone());
    let source = open(&registry, "app").await;
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
