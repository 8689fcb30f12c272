//! The server side of the daemon's API.

use std::{
    collections::HashMap,
    convert::Infallible,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode, body::Frame, server::conn::http1, service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Notify, mpsc},
};

use super::{AttachLine, CheckLine, DaemonInfo, Failure, sockets::Sockets, status_of};
use crate::{
    engine::{
        AttachRequest, AttachedImage, Engine,
        examine::check::{self, CheckRequest},
    },
    error::{Error, Kind, Result, ResultExt, report},
    keeper::{FdStore, Service},
    layer::close_spare_files,
};

/// Bytes of a request's body, at most.
const BODY_LIMIT: usize = 1 << 20;
/// Maximum time until the client of an attachment has fetched the mount and has sent `mounted`.
const MOUNT_TIME: Duration = Duration::from_secs(60);

/// Maximum time for receiving a request.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// How long it is waited when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The body of an answer.
pub type Body = BoxBody<Bytes, Infallible>;

/// The daemon's two sockets, bound. They are removed when this is dropped.
pub struct Server {
    engine: Arc<Engine>,
    sockets: Mutex<Arc<Sockets>>,
    /// Keeps the sockets for the next daemon.
    store: FdStore,
    /// Notified when the sockets were replaced.
    mended: Notify,
    /// Whether it accepts attachments.
    attaches: bool,
    /// How many clients are connected, and when one last was.
    clients: Mutex<(usize, Instant)>,
    /// Mounts that wait for their callers.
    waiting: Mutex<HashMap<String, OwnedFd>>,
}

impl Server {
    /// Binds the sockets in the runtime directory of the engine, or takes those of the daemon before. The engine holds the lock of the run
    /// directory, so another socket that exists there is stale.
    pub fn bind(engine: Arc<Engine>, service: Option<&mut Service>) -> Result<Arc<Self>> {
        Self::bind_with(engine, true, service)
    }

    /// Like [`Server::bind`], for an engine with one attachment of its own that accepts no others: it can be listed and detached.
    pub fn bind_for_one(engine: Arc<Engine>) -> Result<Arc<Self>> {
        Self::bind_with(engine, false, None)
    }

    fn bind_with(
        engine: Arc<Engine>,
        attaches: bool,
        service: Option<&mut Service>,
    ) -> Result<Arc<Self>> {
        let (sockets, store) = match service {
            Some(service) => (
                Sockets::take(engine.run_dir(), service)?,
                service.store().clone(),
            ),
            None => {
                let store = FdStore::default();
                (Sockets::bind(engine.run_dir(), &store)?, store)
            }
        };
        Ok(Arc::new(Self {
            store,
            engine,
            sockets: Mutex::new(Arc::new(sockets)),
            mended: Notify::new(),
            attaches,
            clients: Mutex::new((0, Instant::now())),
            waiting: Mutex::default(),
        }))
    }

    fn sockets(&self) -> Arc<Sockets> {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&sockets)
    }

    /// Binds the sockets again if they were removed from the runtime directory: clients must reach the daemon while images are attached.
    pub fn mend_sockets(&self) {
        if !self.sockets().are_gone() {
            return;
        }
        match Sockets::bind(self.engine.run_dir(), &self.store) {
            Ok(sockets) => {
                tracing::warn!(
                    "a socket in the runtime directory was removed; the sockets are bound again"
                );
                let mut current = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
                *current = Arc::new(sockets);
                self.mended.notify_one();
            }
            Err(error) => tracing::warn!("a socket was removed: {}", error.report()),
        }
    }

    /// When a client was last connected; `None` while one is.
    pub fn last_client(&self) -> Option<Instant> {
        let (connected, last) = *self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        (connected == 0).then_some(last)
    }

    /// Counts a client until the guard is dropped.
    fn count_client(self: &Arc<Self>) -> ConnectedClient {
        self.clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0 += 1;
        ConnectedClient(Arc::clone(self))
    }

    /// Answers until it is dropped.
    pub async fn run(self: Arc<Self>) -> Infallible {
        loop {
            let server = Arc::clone(&self);
            let sockets = self.sockets();
            tokio::select! {
                () = self.mended.notified() => {}
                stream = accept(&sockets.control.listener) => {
                    let connected = server.count_client();
                    tokio::spawn(async move {
                        let _connected = connected;
                        let service = service_fn(move |request| Arc::clone(&server).answer(request));
                        let mut http = http1::Builder::new();
                        http.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIME);
                        if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                            tracing::debug!(%error, "a client of the control socket disconnected");
                        }
                    });
                }
                stream = accept(&sockets.mounts.listener) => {
                    tokio::spawn(async move {
                        if let Err(error) = server.hand_out(stream).await {
                            tracing::warn!(error = error.report(), "a mount was not passed to its client");
                        }
                    });
                }
            }
        }
    }

    /// Answers a request. What a request has begun is completed even if this future is dropped because the client has disconnected; only
    /// the streaming of a layer stops then.
    pub async fn answer<B>(
        self: Arc<Self>,
        request: Request<B>,
    ) -> Result<Response<Body>, Infallible>
    where
        B: hyper::body::Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Ok(self.route(request).await.unwrap_or_else(|error| {
            let status = StatusCode::from_u16(status_of(error.kind()))
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            json(status, &Failure::from(&error))
        }))
    }

    async fn route<B>(self: Arc<Self>, request: Request<B>) -> Result<Response<Body>>
    where
        B: hyper::body::Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match (request.method(), parts.as_slice()) {
            (&Method::GET, ["v1", "daemon"]) => Ok(json(
                StatusCode::OK,
                &DaemonInfo {
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    pid: std::process::id(),
                    root: self.engine.root().to_owned(),
                    is_ending: self.engine.is_ending(),
                },
            )),
            (&Method::GET, ["v1", "attachments"]) => {
                Ok(json(StatusCode::OK, &self.engine.list().await?))
            }
            (&Method::POST, ["v1", "attachments"]) if !self.attaches => Err(Error::new(
                Kind::Busy,
                format!(
                    "`attach --foreground` uses {}; stop it, or give another --run-dir and --root",
                    self.engine.run_dir().display()
                ),
            )),
            (&Method::POST, ["v1", "attachments"]) => {
                let request = read(request).await?;
                Ok(self.attach(request))
            }
            (&Method::POST, ["v1", "disks", "check"]) => {
                let request = read(request).await?;
                Ok(self.check(request))
            }
            (&Method::GET, ["v1", "attachments", id, "why"]) => {
                Ok(json(StatusCode::OK, &self.engine.why(id).await?))
            }
            (&Method::POST, ["v1", "attachments", id, "mounted"]) => {
                self.engine.mounted(id)?;
                Ok(json(StatusCode::OK, &()))
            }
            (&Method::DELETE, ["v1", "attachments", id]) => {
                drop(self.take(id));
                self.engine.release(id).await?;
                Ok(json(StatusCode::OK, &()))
            }
            (method, _) => Err(Error::new(
                Kind::NotFound,
                format!("{method} {path} is not part of this API"),
            )),
        }
    }

    /// Attaches in a task of its own, and answers line by line. The task stops if the client disconnects.
    fn attach(self: Arc<Self>, request: AttachRequest) -> Response<Body> {
        let (lines, receiver) = mpsc::channel::<AttachLine>(16);
        tokio::spawn(async move {
            let events = lines.clone();
            // progress that the caller is too slow to read is dropped
            let event = move |event: crate::engine::OpenEvent| {
                drop(events.try_send(AttachLine::Progress(event)))
            };
            let attached = tokio::select! {
                attached = self.engine.attach(request, &event) => attached,
                () = lines.closed() => return,
            };
            // an error: the caller has gone away
            match attached {
                Ok(attached) => self.offer(attached, &lines).await,
                Err(_) if self.engine.is_ending() => drop(lines.send(AttachLine::Ending).await),
                Err(error) => drop(lines.send(AttachLine::Failed(Failure::from(&error))).await),
            }
        });
        let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        answer_in_lines(lines)
    }

    /// Checks disks in a task of its own, and answers line by line. The task stops if the client disconnects.
    fn check(self: Arc<Self>, request: CheckRequest) -> Response<Body> {
        let (lines, receiver) = mpsc::unbounded_channel::<CheckLine>();
        tokio::spawn(async move {
            // a caller that has gone away needs no line
            let event = |event| drop(lines.send(CheckLine::Event(event)));
            let last = tokio::select! {
                checked = check::check(self.engine.disks().store(), &request, &event) => match checked {
                    Ok(()) => CheckLine::Done,
                    Err(error) => CheckLine::Failed(Failure::from(&error)),
                },
                () = lines.closed() => return,
            };
            drop(lines.send(last));
        });
        let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        answer_in_lines(lines)
    }

    /// Keeps the mount for its client, and announces it. A mount that is not fetched in time is dropped here, and then the engine releases
    /// its devices; it does the same if a client disconnects after it has fetched the mount.
    async fn offer(&self, attached: AttachedImage, lines: &mpsc::Sender<AttachLine>) {
        let id = attached.attachment.id.clone();
        self.waiting().insert(id.clone(), attached.mount);
        let line = AttachLine::Attached(Box::new(attached.attachment));
        let told = tokio::time::timeout(MOUNT_TIME, lines.send(line)).await;
        if matches!(told, Ok(Ok(()))) {
            tokio::select! {
                biased;
                () = self.engine.wait_mounted(&id) => {}
                () = lines.closed() => {}
                () = self.engine.wait_ending() => {}
                () = tokio::time::sleep(MOUNT_TIME) => {}
            }
        }
        if self.take(&id).is_some() {
            tracing::warn!(
                id,
                "no client has fetched the mount; the attachment is released"
            );
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, OwnedFd>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the mount that waits for its caller.
    fn take(&self, id: &str) -> Option<OwnedFd> {
        self.waiting().remove(id)
    }

    async fn hand_out(&self, stream: UnixStream) -> Result<()> {
        let mut stream = BufReader::new(stream.take(64));
        let mut id = String::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_line(&mut id)).await;
        read.or_kind(Kind::Unavailable, || {
            "a client of the mount socket sent no attachment ID".into()
        })?
        .or_kind(Kind::Io, || "reading an attachment ID".into())?;
        let id = id.trim_end();
        // a client that has gone away, or a look whether this socket is reached
        if id.is_empty() {
            return Ok(());
        }
        let mount = self.take(id).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("there is no mount for attachment ID {id:?}"),
            )
        })?;
        let socket = stream
            .into_inner()
            .into_inner()
            .into_std()
            .or_kind(Kind::Io, || "taking a socket".into())?;
        socket
            .set_nonblocking(false)
            .or_kind(Kind::Io, || "setting up a socket".into())?;
        crate::kernel::fdpass::send(&socket, mount.as_fd())
    }
}

/// A client that is connected, until this is dropped.
struct ConnectedClient(Arc<Server>);

impl Drop for ConnectedClient {
    fn drop(&mut self) {
        let mut clients = self
            .0
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *clients = (clients.0 - 1, Instant::now());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.sockets().remove_files();
    }
}

/// The next connection. Errors of `accept` are temporary: no free descriptor, no memory, or a client that has disconnected already. They
/// must not end the daemon, which holds the devices of running containers; clients wait meanwhile.
async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!("accepting a connection: {}", report(&error));
                close_spare_files();
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Parses the body of a request.
async fn read<B, T: serde::de::DeserializeOwned>(request: Request<B>) -> Result<T>
where
    B: hyper::body::Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
    let body = tokio::time::timeout(REQUEST_TIME, body)
        .await
        .or_kind(Kind::InvalidArgument, || "waiting for the request".into())?;
    let body = body
        .map_err(|error| Error::with_source(Kind::InvalidArgument, "reading the request", error))?
        .to_bytes();
    serde_json::from_slice(&body).or_kind(Kind::InvalidArgument, || "reading the request".into())
}

/// An answer that is sent as events happen, each a line of JSON.
fn answer_in_lines<T: serde::Serialize>(
    lines: impl Stream<Item = T> + Send + Sync + 'static,
) -> Response<Body> {
    let lines = lines.map(|line| {
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default(); // plain data with string keys always serialises
        bytes.push(b'\n');
        Ok(Frame::data(Bytes::from(bytes)))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(lines)));
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static("application/x-ndjson"),
    );
    response
}

fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    let body = serde_json::to_vec(value).unwrap_or_default(); // plain data with string keys always serialises
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}
