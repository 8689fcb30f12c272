//! The NBD server: against a raw client that can say anything, and against the programs and libraries of others.

mod client;
mod export;
mod handshake;
mod hostile;
mod peers;
mod transmission;

/// Waits for a condition that another thread brings about.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "timed out: {what}");
        std::thread::yield_now();
    }
}
