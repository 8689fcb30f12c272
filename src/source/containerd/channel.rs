//! A connection to containerd: gRPC over HTTP/2 on its Unix socket.
//!
//! It is made when the first request needs it, and made again when it was lost.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::UnixStream, sync::Mutex, time::timeout};
use tonic::{Code, Status, body::Body, codegen::http};

use crate::{
    error::{Error, Kind, Result},
    source::Limits,
};

/// Bytes that containerd may send before they are read, of a stream and altogether.
const WINDOW_BYTES: u32 = 4 << 20;

/// The socket of a containerd. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub(super) struct Channel(Arc<Inner>);

struct Inner {
    address: PathBuf,
    limits: Limits,
    sender: Mutex<Option<http2::SendRequest<Body>>>,
}

impl Channel {
    /// Connects later.
    pub(super) fn new(address: &Path, limits: Limits) -> Self {
        Self(Arc::new(Inner {
            address: address.to_owned(),
            limits,
            sender: Mutex::new(None),
        }))
    }

    pub(super) fn address(&self) -> &Path {
        &self.0.address
    }

    async fn send(self, request: http::Request<Body>) -> Result<http::Response<Incoming>> {
        let mut sender = self.sender().await?;
        let ready = sender.ready().await;
        ready.map_err(|error| self.lost(error.into()))?;
        let answer = sender.send_request(request).await;
        answer.map_err(|error| self.lost(error.into()))
    }

    async fn sender(&self) -> Result<http2::SendRequest<Body>> {
        let mut current = self.0.sender.lock().await;
        if let Some(sender) = current.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let connecting = async {
            let stream = UnixStream::connect(&self.0.address)
                .await
                .map_err(|error| self.refused(error))?;
            let mut http = http2::Builder::new(TokioExecutor::new());
            http.timer(TokioTimer::new())
                .initial_stream_window_size(WINDOW_BYTES)
                .initial_connection_window_size(WINDOW_BYTES);
            let handshake = http.handshake(TokioIo::new(stream)).await;
            handshake.map_err(|error| self.lost(error.into()))
        };
        let connected = timeout(self.0.limits.connect, connecting).await;
        let (sender, connection) = connected.map_err(|_| self.silent())??;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to containerd ended");
            }
        });
        *current = Some(sender.clone());
        Ok(sender)
    }

    fn refused(&self, error: io::Error) -> Error {
        let address = self.0.address.display();
        let (kind, text) = match error.kind() {
            io::ErrorKind::PermissionDenied => (
                Kind::Unauthorized,
                format!("the socket {address} of containerd needs root"),
            ),
            _ => (
                Kind::Unavailable,
                format!(
                    "containerd does not answer at {address}: start it, or give its socket with --containerd-address or CONTAINERD_ADDRESS"
                ),
            ),
        };
        Error::with_source(kind, text, error)
    }

    fn lost(&self, error: Box<dyn std::error::Error + Send + Sync>) -> Error {
        let text = format!(
            "the connection to containerd at {} was lost",
            self.0.address.display()
        );
        Error::with_source(Kind::Unavailable, text, error)
    }

    /// The error where containerd does not answer in time.
    pub(super) fn silent(&self) -> Error {
        let text = format!(
            "containerd at {} does not answer in time",
            self.0.address.display()
        );
        Error::new(Kind::Unavailable, text)
    }

    /// The answer to a request, or the error in its place.
    pub(super) async fn answer<T>(
        &self,
        request: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T> {
        match timeout(self.0.limits.first_byte, request).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(of_status(status)),
            Err(_) => Err(self.silent()),
        }
    }

    /// The next message of an answer in several; `None` at its end.
    pub(super) async fn next<T>(&self, answer: &mut tonic::Streaming<T>) -> Result<Option<T>> {
        match timeout(self.0.limits.stall, answer.message()).await {
            Ok(message) => message.map_err(of_status),
            Err(_) => Err(self.silent()),
        }
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

/// The error of an answer.
pub(super) fn of_status(status: Status) -> Error {
    let mut source = std::error::Error::source(&status);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<Error>() {
            return Error::new(error.kind(), error.report());
        }
        if error.is::<hyper::Error>() {
            let text = format!("the connection to containerd was lost: {error}");
            return Error::new(Kind::Unavailable, text);
        }
        source = error.source();
    }
    let kind = match status.code() {
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::Immutable,
        Code::InvalidArgument => Kind::InvalidArgument,
        Code::FailedPrecondition | Code::OutOfRange | Code::DataLoss => Kind::Corrupt,
        Code::PermissionDenied | Code::Unauthenticated => Kind::Unauthorized,
        Code::Unimplemented => Kind::Unsupported,
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Cancelled
        | Code::ResourceExhausted => Kind::Unavailable,
        _ => Kind::Io,
    };
    Error::new(kind, format!("containerd: {}", status.message()))
}

/// An offset or size as containerd has it.
pub(super) fn number(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| {
        let text = format!("{value} bytes are more than containerd can have");
        Error::new(Kind::Unsupported, text)
    })
}

/// Pauses before containerd is asked again.
pub(super) struct Waits(Duration);

impl Default for Waits {
    fn default() -> Self {
        Self(Duration::from_millis(50))
    }
}

impl Waits {
    pub(super) fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = wait.saturating_mul(2).min(Duration::from_secs(2));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let channel = Channel::new(&folder.path().join("none.sock"), Limits::default());
        let error = channel.sender().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        let text = error.to_string();
        assert!(text.contains("none.sock") && text.contains("--containerd-address"));
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deaf.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let limits = Limits {
            connect: Duration::from_millis(50),
            first_byte: Duration::from_millis(50),
            ..Limits::default()
        };
        let channel = Channel::new(&path, limits);
        let mut client = super::super::proto::images::images_client::ImagesClient::with_origin(
            channel.clone(),
            "http://localhost".parse().unwrap(),
        );
        let request = super::super::proto::images::GetImageRequest::default();
        let error = channel.answer(client.get(request)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    }

    #[test]
    fn statuses_become_kinds() {
        for (code, kind) in [
            (Code::NotFound, Kind::NotFound),
            (Code::Unavailable, Kind::Unavailable),
            (Code::FailedPrecondition, Kind::Corrupt),
            (Code::Unimplemented, Kind::Unsupported),
            (Code::Unknown, Kind::Io),
        ] {
            let error = of_status(Status::new(code, "the reason"));
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains("the reason"));
        }
    }
}
