//! A connection of a client of the snapshots API. A benchmark includes this file.

use std::{
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use hyper_util::rt::{TokioExecutor, TokioIo};
use socinbd::snapshotter::proto::snapshots::snapshots_client::SnapshotsClient;
use tonic::{body::Body, codegen::http};

/// One connection over HTTP/2.
#[derive(Clone)]
pub struct Connection(hyper::client::conn::http2::SendRequest<Body>);

impl tonic::codegen::Service<http::Request<Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Connects to a socket. `None`: nobody answers.
pub async fn connect(socket: &Path) -> Option<SnapshotsClient<Connection>> {
    let stream = tokio::net::UnixStream::connect(socket).await.ok()?;
    let stream = TokioIo::new(stream);
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream);
    let (sender, connection) = handshake.await.ok()?;
    tokio::spawn(connection);
    let origin = "http://localhost".parse().ok()?;
    Some(SnapshotsClient::with_origin(Connection(sender), origin))
}
