//! A socket that serves gRPC over HTTP/2.

use std::{
    convert::Infallible,
    error::Error as StdError,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::{
    Request, Response,
    body::{Body, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::Notify;

use crate::{
    api::sockets::Socket,
    error::Result,
    keeper::{self, FdStore},
};

/// Requests of one connection at a time, at most.
const MAX_REQUESTS: u32 = 256;
/// How long it is waited when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket, bound. Its file is removed by [`GrpcSocket::remove_file`].
pub(super) struct GrpcSocket {
    /// The name in the descriptor store.
    name: String,
    address: PathBuf,
    socket: Mutex<Arc<Socket>>,
    /// Notified when the socket was replaced.
    mended: Notify,
    store: FdStore,
}

impl GrpcSocket {
    /// Binds a socket, or takes that of the daemon before. The engine holds the lock of the state directory, so a file that is at its place
    /// and leads nowhere else is stale.
    pub(super) fn bind(
        name: String,
        address: &Path,
        service: Option<&mut keeper::Service>,
    ) -> Result<Self> {
        let store = service.as_ref().map(|service| service.store().clone());
        Ok(Self {
            socket: Mutex::new(Arc::new(Socket::of(&name, address, service)?)),
            name,
            address: address.to_owned(),
            mended: Notify::new(),
            store: store.unwrap_or_default(),
        })
    }

    /// Answers requests until it is dropped.
    pub(super) async fn serve<F, A, B, E>(&self, answer: F) -> Infallible
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
        A: Future<Output = Result<Response<B>, E>> + Send + 'static,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
        E: Into<Box<dyn StdError + Send + Sync>> + Send + 'static,
    {
        loop {
            let socket = self.current();
            let accepted = tokio::select! {
                () = self.mended.notified() => continue,
                accepted = socket.listener().accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, socket = %self.address.display(), "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut http = http2::Builder::new(TokioExecutor::new());
                http.timer(TokioTimer::new())
                    .max_concurrent_streams(MAX_REQUESTS);
                let served = http.serve_connection(TokioIo::new(stream), service_fn(answer));
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a client of the snapshotter disconnected");
                }
            });
        }
    }

    /// Binds the socket again if its file was removed.
    pub(super) fn mend(&self) {
        if !self.current().is_gone() {
            return;
        }
        match Socket::bind(&self.name, &self.address, &self.store) {
            Ok(socket) => {
                tracing::warn!(
                    socket = %self.address.display(),
                    "the socket was removed; it is bound again"
                );
                let mut current = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
                *current = Arc::new(socket);
                self.mended.notify_one();
            }
            Err(error) => tracing::warn!("a socket was removed: {}", error.report()),
        }
    }

    /// Removes the file of the socket: the daemon ends, and no other one follows.
    pub(super) fn remove_file(&self) {
        self.current().remove_file();
    }

    fn current(&self) -> Arc<Socket> {
        Arc::clone(&self.socket.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
