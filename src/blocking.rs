//! Work that waits for the local disk or the kernel, away from the async workers.

use tokio::task::JoinError;

use crate::error::{Error, Kind, Result};

/// Runs work that may wait, or takes long, on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| broken_off("a worker thread", error))?
}

/// Work that has come to no end. A process that ends does not begin what is asked for in its last moment: another one may.
pub(crate) fn broken_off(what: &str, error: JoinError) -> Error {
    let kind = match error.is_cancelled() {
        true => Kind::Unavailable,
        false => Kind::Io,
    };
    Error::with_source(kind, what, error)
}
