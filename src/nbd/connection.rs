//! One connection, from its first byte to its last, and the reasons why it can end.

use std::time::Duration;

use tokio::runtime::Handle;

use super::{
    error::ConnectionError, export::Exports, handshake, stream::Stream, transmission::Transmission,
};

/// How long a client may take from connecting to the transmission.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);

/// Serves one client: handshake and transmission. Blocks until the connection ends; not for a thread of the async runtime.
pub fn serve_connection(
    stream: impl Into<Stream>,
    exports: &Exports,
    runtime: &Handle,
) -> Result<(), ConnectionError> {
    serve(&stream.into(), exports, runtime, HANDSHAKE_LIMIT)
}

pub(super) fn serve(
    stream: &Stream,
    exports: &Exports,
    runtime: &Handle,
    handshake_limit: Duration,
) -> Result<(), ConnectionError> {
    stream
        .prepare()
        .map_err(ConnectionError::io("setting up the socket"))?;
    match handshake::negotiate(stream, exports, handshake_limit)? {
        Some(session) => Transmission::new(stream, session, exports.shared(), runtime)?.run(),
        None => Ok(()),
    }
}
