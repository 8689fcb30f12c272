//! What several topics use.

pub mod compare;
pub mod docker_registry;
pub mod registry;
pub mod tars;
pub mod vm;

/// Waits for a condition, and says which did not come within ten seconds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), waiting)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// As [`until`], for tests that block.
pub fn wait(what: &str, condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !condition() {
        assert!(
            std::time::Instant::now() < deadline,
            "waited in vain: {what}"
        );
        std::thread::yield_now();
    }
}
