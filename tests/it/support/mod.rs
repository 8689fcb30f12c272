//! What several topics use.

pub mod compare;
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
