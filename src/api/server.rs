//! The server side of the daemon's API.

use std::{
    collections::HashMap,
    convert::Infallible,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hyper::{Request, Response, StatusCode, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Notify, mpsc},
};

use super::{
    AttachLine, CheckLine, DaemonInfo, Failure, HandOver, RestoreResult,
    body::{Body, REQUEST_TIME, answer_in_lines, json, read},
    control::{self, Control},
    metrics, openapi,
    routes::{self, Route},
    sockets::Sockets,
    space, status_of,
};
use crate::{
    blocking::{blocking, broken_off},
    engine::{
        AttachRequest, AttachedImage, Engine, Formats, ServingProgram,
        examine::check::{self, CheckRequest},
    },
    error::{Error, Kind, Result, ResultExt, report},
    keeper::{FdStore, Service, Succession},
    layer::close_spare_files,
};

/// Maximum time until the client of an attachment has fetched the mount and has sent `mounted`.
const MOUNT_TIME: Duration = Duration::from_secs(60);

/// How long it is waited when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The daemon's two sockets, bound. They are removed when this is dropped.
pub struct Server {
    engine: Arc<Engine>,
    sockets: Mutex<Arc<Sockets>>,
    /// Keeps the sockets for the next daemon.
    store: FdStore,
    /// Notified when the sockets were replaced.
    mended: Notify,
    /// Who follows this daemon; `None` where nothing is kept for it.
    succession: Option<Succession>,
    /// Notified when all is ready for the next daemon.
    handed_over: Notify,
    /// Whether it accepts attachments.
    attaches: bool,
    /// What clients may change.
    control: Option<Arc<dyn Control>>,
    /// How many clients are connected, and when one last was.
    clients: Mutex<(usize, Instant)>,
    /// Mounts that wait for their callers.
    waiting: Mutex<HashMap<String, OwnedFd>>,
}

impl Server {
    /// Binds the sockets in the runtime directory of the engine, or takes those of the daemon before. The engine holds the lock of the run
    /// directory, so another socket that exists there is stale.
    pub fn bind(
        engine: Arc<Engine>,
        service: Option<&mut Service>,
        control: Option<Arc<dyn Control>>,
    ) -> Result<Arc<Self>> {
        Self::bind_with(engine, true, service, control)
    }

    /// Like [`Server::bind`], for an engine with one attachment of its own that accepts no others: it can be listed and detached.
    pub fn bind_for_one(engine: Arc<Engine>) -> Result<Arc<Self>> {
        Self::bind_with(engine, false, None, None)
    }

    fn bind_with(
        engine: Arc<Engine>,
        attaches: bool,
        service: Option<&mut Service>,
        control: Option<Arc<dyn Control>>,
    ) -> Result<Arc<Self>> {
        let (sockets, store, succession) = match service {
            Some(service) => (
                Sockets::take(engine.run_dir(), service)?,
                service.store().clone(),
                service.succession(ServingProgram::own().path),
            ),
            None => {
                let store = FdStore::default();
                (Sockets::bind(engine.run_dir(), &store)?, store, None)
            }
        };
        Ok(Arc::new(Self {
            store,
            succession,
            handed_over: Notify::new(),
            engine,
            sockets: Mutex::new(Arc::new(sockets)),
            mended: Notify::new(),
            attaches,
            control,
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
        let (route, id) = routes::find(request.method(), request.uri().path())?;
        match route {
            Route::Daemon => Ok(json(
                StatusCode::OK,
                &DaemonInfo {
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    pid: std::process::id(),
                    root: self.engine.root().to_owned(),
                    is_ending: self.engine.is_refusing(),
                    program: Some(ServingProgram::own()),
                    formats: Some(Formats::OWN),
                },
            )),
            Route::OpenApi => Ok(json(StatusCode::OK, &openapi::document())),
            Route::Metrics => metrics::answer(&self.engine, request.headers()).await,
            Route::HandOver => {
                let request: HandOver = read(request).await?;
                let server = Arc::clone(&self);
                // it is completed although the client disconnects
                let handed_over =
                    tokio::spawn(async move { server.hand_over(&request.program).await });
                handed_over
                    .await
                    .map_err(|error| broken_off("a task of the daemon", error))??;
                Ok(json(StatusCode::OK, &()))
            }
            Route::List => Ok(json(StatusCode::OK, &self.engine.list().await?)),
            Route::Layers => Ok(json(StatusCode::OK, &self.engine.layers())),
            Route::Snapshots => {
                let engine = Arc::clone(&self.engine);
                let snapshots = blocking(move || engine.snapshots()).await?;
                Ok(json(StatusCode::OK, &snapshots))
            }
            Route::Attach if !self.attaches => Err(Error::new(
                Kind::Busy,
                format!(
                    "`attach --foreground` uses {}; stop it, or give another --run-dir and --root",
                    self.engine.run_dir().display()
                ),
            )),
            Route::Attach => {
                let request = read(request).await?;
                Ok(self.attach(request))
            }
            Route::Check => {
                let request = read(request).await?;
                Ok(self.check(request))
            }
            Route::Why => Ok(json(StatusCode::OK, &self.engine.why(&id).await?)),
            Route::Fetches => Ok(json(StatusCode::OK, &self.engine.fetches(&id).await?)),
            Route::Mounted => {
                self.engine.keep(&id).await?;
                self.engine.mounted(&id)?;
                Ok(json(StatusCode::OK, &()))
            }
            Route::Release => {
                drop(self.take(&id));
                match request.uri().query() {
                    Some("keep") => self.engine.release_for_now(&id).await?,
                    _ => self.engine.release(&id).await?,
                }
                Ok(json(StatusCode::OK, &()))
            }
            Route::Restore if !self.attaches => Err(Error::new(
                Kind::Unsupported,
                "`attach --foreground` restores nothing; start `socinbd daemon`",
            )),
            Route::Restore => {
                let restored = self.engine.restore().await?.into_iter();
                let results: Vec<_> = restored.map(RestoreResult::from).collect();
                Ok(json(StatusCode::OK, &results))
            }
            Route::Space => space::report(&self.engine).await,
            Route::Prune => space::prune(&self.engine, read(request).await?).await,
            Route::Pin => space::pin(&self.engine, read(request).await?).await,
            Route::Reload => control::reload(self.control.as_ref()).await,
            Route::LogFilter => control::log_filter(self.control.as_ref()),
            Route::SetLogFilter => {
                control::set_log_filter(self.control.as_ref(), &read(request).await?)
            }
        }
    }

    /// Prepares the end of this daemon, which another program follows.
    async fn hand_over(&self, program: &Path) -> Result<()> {
        let succession = self.succession.as_ref().ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                "nothing keeps the devices of this daemon while it is replaced: start it with `socinbd daemon`, or in a unit with FileDescriptorStoreMax=",
            )
        })?;
        succession.check(program)?;
        self.engine.hand_over().await?;
        if let Err(error) = succession.choose(program) {
            self.engine.serve_on();
            return Err(error);
        }
        self.handed_over.notify_one();
        Ok(())
    }

    /// Prepares the end of this daemon, which the program follows that has its path by then.
    pub async fn restart(&self) -> Result<()> {
        self.hand_over(&ServingProgram::own().path).await
    }

    /// Waits until another daemon was asked for, and all that this one has begun is complete.
    pub async fn handed_over(&self) {
        self.handed_over.notified().await;
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
                Err(_) if self.engine.is_refusing() => drop(lines.send(AttachLine::Ending).await),
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
