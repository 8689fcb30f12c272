//! `socinbd daemon`.

use std::{
    ffi::CStr,
    fs,
    io::{self, ErrorKind, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use rustix::process::Signal;
use tokio::{sync::watch, time::timeout};

use super::{reload::RunningConfiguration, replace};
use crate::{
    api::{
        control::Control,
        metrics::{MetricsAddress, MetricsServer},
        server::Server,
    },
    blocking::blocking,
    cli::{
        GlobalArgs, absolute,
        exit::AGAIN,
        log, require_root,
        signals::{self, SignalReceiver},
        space::limits::DiskArgs,
    },
    engine::{Engine, KeptDescriptors, MetricNames},
    error::{Kind, Result, ResultExt},
    keeper::{self, Check, FdStore, Plan, Service, Times, watch},
    kernel::{memory, session},
    layer::{DiskLimits, StoreOptions},
    open_files,
    snapshotter::{Server as SnapshotterServer, SnapshotterOptions, take_over_credentials},
};

/// What ps(1) shows as the name of a keeper's process.
const KEEPER: &CStr = c"socinbd-keeper";
/// Maximum time until the client that has asked for another daemon has its answer.
const ANSWER_TIME: Duration = Duration::from_millis(200);
/// Maximum time until a signal that has come to this process is received.
const SIGNAL_TIME: Duration = Duration::from_millis(10);
/// Interval in which the daemon checks whether it is still needed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time that the daemon waits for its kept attachments before it answers clients, which wait for 7 s.
const RESTORE_TIME: Duration = Duration::from_secs(5);

/// Hold the block devices of attached images
///
/// At its start the daemon attaches the images of `attach --keep` again.
///
/// `attach` and `run` start a daemon if none runs; that one exits after five minutes without an attachment. On SIGTERM, SIGINT or SIGQUIT
/// the daemon refuses new attachments, unmounts images that are not in use, and exits. When its state or runtime directory has been
/// removed, it exits with the last attachment.
///
/// The command starts the daemon as a child, keeps descriptors for it, starts the next one when it dies, and kills it when it hangs. A service
/// manager does so instead where NOTIFY_SOCKET is set: then the command is the daemon.
///
/// On SIGHUP the daemon reads its configuration file again, as on `socinbd config reload`.
///
/// On SIGUSR2 the daemon completes what it has begun and exits without unmounting anything, and the next daemon takes over.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd daemon --root /srv/socinbd --run-dir /run/socinbd-2\n\
\x20 /opt/socinbd-new/socinbd daemon --replace")]
pub(crate) struct DaemonCommand {
    /// Time without attachments or requests until exit [default: none]
    #[arg(long, value_name = "SECONDS")]
    idle_exit: Option<u64>,
    /// Replace the running daemon by this program, and exit
    ///
    /// The daemon of --run-dir completes what it has begun and exits; this program starts in its place, with the options of the daemon, and
    /// takes over its attachments. Readers wait meanwhile. If this program cannot read what the daemon leaves, nothing is changed. Where a
    /// service manager runs the daemon, it starts the program of its unit: use `systemctl restart` or this option after that file has been
    /// replaced. Exit status 3: no daemon is running.
    #[arg(long, conflicts_with_all = ["idle_exit", "log_file", "disk_limit", "disk_reserve", "metrics_address"])]
    replace: bool,
    #[command(flatten)]
    disk: DiskArgs,
    /// Log file, rotated at 1 MiB, instead of standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Address for GET /metrics, e.g. 127.0.0.1:9101
    ///
    /// An IP address with a port, or unix:PATH.
    /// The metrics are also on the socket of the runtime directory. Anybody that can connect to the address can read them: they have no
    /// names of images or files.
    #[arg(long, value_name = "ADDR")]
    metrics_address: Option<MetricsAddress>,
}

impl DaemonCommand {
    /// Whether this is a client of the running daemon.
    pub(crate) fn is_replacement(&self) -> bool {
        self.replace
    }

    pub(crate) fn log_file(&self) -> Option<&Path> {
        self.log_file.as_deref().filter(|_| !self.replace)
    }

    /// The limits of the local disk.
    pub(crate) fn disk_limits(&self) -> DiskLimits {
        self.disk.limits()
    }

    /// Time without attachments or requests until exit.
    pub(crate) fn idle_exit(&self) -> Option<Duration> {
        self.idle_exit.map(Duration::from_secs)
    }
}

/// Becomes a keeper, which runs this same command.
pub(crate) fn keep(global: &GlobalArgs) -> Result<ExitCode> {
    require_root("the daemon")?;
    open_files::raise();
    let _ = rustix::thread::set_name(KEEPER); // only what ps(1) shows
    let starting = || "starting a keeper".to_owned();
    let signals = session::receive_signals(&[
        Signal::TERM,
        Signal::INT,
        Signal::QUIT,
        keeper::RESTART,
        keeper::RELOAD,
    ])
    .or_kind(Kind::Io, starting)?;
    let plan = Plan {
        program: std::env::current_exe().or_kind(Kind::Io, starting)?,
        // this works also when the file has been removed
        own: "/proc/self/exe".into(),
        arguments: std::env::args_os().collect(),
        run_dir: absolute(&global.run_dir)?,
        times: Times::default(),
    };
    memory::give_back();
    let status = keeper::keep(&plan, &signals, || {
        if let Err(error) = log::detach_from_stderr() {
            tracing::warn!("{}", error.report());
        }
    })?;
    Ok(ExitCode::from(status))
}

impl DaemonCommand {
    /// Serves, until it is ended or not needed any more.
    pub(crate) async fn run(
        self,
        global: &GlobalArgs,
        service: Option<Service>,
    ) -> Result<ExitCode> {
        if self.replace {
            return replace::replace(global).await;
        }
        let daemon = Daemon {
            idle_exit: self.idle_exit(),
            disk_limits: self.disk_limits(),
            metrics_address: self.metrics_address,
            metric_names: MetricNames::Socinbd,
            snapshotter: None,
        };
        daemon.run(global, service).await
    }
}

/// What a daemon does.
pub(super) struct Daemon {
    /// Time without attachments or requests until it exits.
    pub(super) idle_exit: Option<Duration>,
    /// The limits of the local disk.
    pub(super) disk_limits: DiskLimits,
    /// The address of the metrics.
    pub(super) metrics_address: Option<MetricsAddress>,
    /// The names of the metrics.
    pub(super) metric_names: MetricNames,
    /// The addresses of a snapshotter and its settings.
    pub(super) snapshotter: Option<(Vec<PathBuf>, SnapshotterOptions)>,
}

impl Daemon {
    /// Serves, until it is ended or not needed any more.
    pub(super) async fn run(
        self,
        global: &GlobalArgs,
        service: Option<Service>,
    ) -> Result<ExitCode> {
        let mut may_serve = service.as_ref().is_some_and(Service::is_successor);
        match self.serve(global, service, &mut may_serve).await {
            Err(error) if may_serve => {
                tracing::error!("{}", error.report());
                let _ = writeln!(io::stderr(), "socinbd: {}", error.report());
                Ok(ExitCode::from(AGAIN))
            }
            Err(error) => Err(error),
            Ok(()) => Ok(ExitCode::SUCCESS),
        }
    }

    /// `may_serve` becomes true when something may be mounted.
    async fn serve(
        self,
        global: &GlobalArgs,
        mut service: Option<Service>,
        may_serve: &mut bool,
    ) -> Result<()> {
        require_root("the daemon")?;
        open_files::raise();
        let mut ends = SignalReceiver::that_end_the_daemon()?;
        let mut restarts = SignalReceiver::that_restart_the_daemon()?;
        let mut reloads = SignalReceiver::that_reload_the_daemon()?;
        if let (Some(service), true) = (&mut service, self.snapshotter.is_some()) {
            take_over_credentials(service);
        }
        let kept = service.as_mut().map(KeptDescriptors::of);
        let (root, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
        let options = StoreOptions {
            disk_limits: self.disk_limits,
            ..StoreOptions::default()
        };
        let engine = Engine::open_daemon(&root, &run_dir, kept.unwrap_or_default(), options)?;
        engine.disks().verifiers().set(global.settings.verifiers());
        engine.set_metric_names(self.metric_names);
        let directories = [engine.root(), engine.run_dir()].map(WatchedDirectory::of);
        let store = service
            .as_ref()
            .map_or_else(FdStore::default, |service| service.store().clone());
        let configuration = Arc::new(RunningConfiguration::new(
            global.settings.clone(),
            Arc::clone(&engine),
            store,
            self.idle_exit,
        ));
        let control = Arc::clone(&configuration) as Arc<dyn Control>;
        let server = Server::bind(Arc::clone(&engine), service.as_mut(), Some(control))?;
        let snapshotter = match self.snapshotter {
            Some((addresses, options)) => {
                Some(SnapshotterServer::bind(&engine, &addresses, options, service.as_mut()).await?)
            }
            None => None,
        };
        // From its records it answers now: containerd asks once, at its start, and drops a snapshotter that does not answer soon. What mounts
        // or unmounts waits for the devices.
        let snapshots = snapshotter.as_ref().map(|snapshotter| {
            snapshotter.resume();
            tokio::spawn(Arc::clone(snapshotter).run())
        });
        if let Some(service) = &mut service {
            service.close_rest();
            if !service.store().is_kept() {
                tracing::warn!(
                    "what runs this daemon keeps no descriptors: a unit of systemd needs FileDescriptorStoreMax="
                );
            }
        }
        engine.take_over().await?;
        tracing::info!(root = %engine.root().display(), run_dir = %engine.run_dir().display(), "the daemon is ready");
        let metrics = match self.metrics_address {
            // the address may be in use by the daemon before, which ends soon
            Some(address) if *may_serve => {
                Some(MetricsServer::bind_later(Arc::clone(&engine), address).await)
            }
            Some(address) => Some(MetricsServer::bind(Arc::clone(&engine), address).await?),
            None => None,
        };
        log::detach_from_stderr()?;
        *may_serve = true;
        // before clients are answered, so that they find what is kept; meanwhile they wait
        restore(&engine).await;
        let answering = tokio::spawn(Arc::clone(&server).run());
        // it ends with the runtime
        drop(metrics.map(|metrics| tokio::spawn(metrics.run())));
        let notify = service.as_ref().map(Service::notify);
        let watchdog = service.as_ref().and_then(Service::watchdog);
        let watched = async {
            match (notify, watchdog) {
                (Some(notify), Some(period)) => {
                    let checks = vec![Check::threads(), servers_of(&engine, period / 4)];
                    watch(Arc::clone(notify), period, checks).await
                }
                _ => std::future::pending().await,
            }
        };
        if let Some(notify) = notify {
            notify.ready();
        }
        let idle_exit = configuration.idle_exit();
        let reloading = async {
            loop {
                reloads.next().await;
                let configuration = Arc::clone(&configuration);
                // it logs what it has changed, or why it has changed nothing
                let _ = blocking(move || configuration.reload()).await;
            }
        };
        let handed_over = async {
            loop {
                tokio::select! {
                    () = server.handed_over() => break,
                    _ = restarts.next() => if let Err(error) = server.restart().await {
                        tracing::warn!("the daemon is not restarted: {}", error.report());
                    },
                }
            }
            wait_until_answered(&server).await;
        };
        tokio::select! {
            () = handed_over => match timeout(SIGNAL_TIME, ends.next()).await {
                Ok(signal) => tracing::info!(?signal, "the daemon exits instead of handing over"),
                Err(_) => leave(),
            },
            signal = ends.next() => tracing::info!(?signal, "the daemon exits"),
            why = unwanted(&engine, &server, snapshotter.as_deref(), &directories, idle_exit) => tracing::info!("the daemon exits: {why}"),
            ended = answering => match ended.or_kind(Kind::Io, || "answering on the sockets of the daemon".into())? {},
            never = watched => match never {},
            never = reloading => match never {},
        }
        if let Some(notify) = notify {
            notify.stopping();
        }
        if let Some(snapshots) = snapshots {
            snapshots.abort();
        }
        if let Some(snapshotter) = snapshotter {
            snapshotter.remove_files();
        }
        engine.end().await;
        Ok(())
    }
}

/// The threads that answer requests of the kernel.
fn servers_of(engine: &Arc<Engine>, limit: Duration) -> Check {
    let engine = Arc::clone(engine);
    Check {
        what: "the threads that serve devices",
        ask: Box::new(move || {
            let checked = engine.check_servers(limit);
            Box::pin(async move { checked })
        }),
    }
}

/// Attaches kept attachments again, which are logged if they fail. What takes longer than [`RESTORE_TIME`] goes on in the background.
async fn restore(engine: &Arc<Engine>) {
    let engine = Arc::clone(engine);
    let restored = tokio::spawn(async move {
        if let Err(error) = engine.restore().await {
            tracing::error!("kept attachments are not restored: {}", error.report());
        }
    });
    if timeout(RESTORE_TIME, restored).await.is_err() {
        tracing::warn!("the kept attachments are still being restored");
    }
}

/// Waits until the client that has asked for another daemon has its answer.
async fn wait_until_answered(server: &Server) {
    let answered = async {
        while server.last_client().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = timeout(ANSWER_TIME, answered).await;
}

/// Ends this process as one that is killed, so that the next daemon takes all of it over.
fn leave() -> ! {
    signals::end_as_usual();
    tracing::info!("the daemon exits, and the next one takes over");
    log::end();
    std::process::exit(i32::from(AGAIN))
}

/// A directory whose removal is detected.
struct WatchedDirectory {
    path: PathBuf,
    /// Its device and inode numbers.
    id: Option<(u64, u64)>,
}

impl WatchedDirectory {
    fn of(path: &Path) -> Self {
        let metadata = fs::metadata(path).ok();
        Self {
            path: path.to_owned(),
            id: metadata.map(|metadata| (metadata.dev(), metadata.ino())),
        }
    }

    /// Whether it has been removed or replaced by another directory.
    fn is_gone(&self) -> bool {
        match fs::metadata(&self.path) {
            Ok(metadata) => self
                .id
                .is_some_and(|id| id != (metadata.dev(), metadata.ino())),
            Err(error) => matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        }
    }
}

/// Returns the reason when the daemon is not needed any more: nothing is attached, and either its directory is gone or the idle time is
/// over.
async fn unwanted(
    engine: &Arc<Engine>,
    server: &Server,
    snapshotter: Option<&SnapshotterServer>,
    directories: &[WatchedDirectory],
    idle_exit: watch::Receiver<Option<Duration>>,
) -> String {
    let mut wanted = Instant::now();
    let mut is_told = false;
    loop {
        tokio::time::sleep(POLL_INTERVAL).await;
        let is_idle = engine.is_idle();
        wanted = match server.last_client() {
            Some(last) if is_idle => wanted.max(last),
            _ => Instant::now(),
        };
        if let Some(directory) = directories.iter().find(|directory| directory.is_gone()) {
            let path = directory.path.display();
            if is_idle {
                return format!("its directory {path} has been removed");
            }
            if !is_told {
                tracing::error!(
                    "the directory {path} has been removed; the daemon exits when nothing is mounted"
                );
                is_told = true;
            }
            // clients may not be able to request it any more
            engine.release_unmounted().await;
        } else {
            server.mend_sockets();
            if let Some(snapshotter) = snapshotter {
                snapshotter.mend_sockets();
            }
        }
        let idle_exit = *idle_exit.borrow();
        if idle_exit.is_some_and(|limit| wanted.elapsed() >= limit) {
            return "nothing has been attached for a while".to_owned();
        }
    }
}
