//! OCI layouts and images as sources, SOCI indexes found and made.

mod commands;
mod convert;
mod create;
mod discovery;
mod golden;
mod image;
mod interop;
mod layout;
pub mod make;
mod moving;
mod nested;
mod oras;
mod pipeline;
mod registries;
mod scenarios;
mod snapshotter;
mod sparse;

/// Runs async code in a test, on a runtime of its own.
fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// Opens what a reference names.
async fn open(reference: &str) -> socinbd::error::Result<socinbd::source::Source> {
    let reference = reference.parse().unwrap();
    socinbd::source::Source::open(&reference, &socinbd::source::Access::default()).await
}
