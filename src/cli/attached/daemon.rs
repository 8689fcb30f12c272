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

use crate::{
    api::server::Server,
    cli::{AGAIN, GlobalArgs, absolute, log, require_root, signals::SignalReceiver},
    engine::{Engine, KeptDescriptors},
    error::{Kind, Result, ResultExt},
    keeper::{self, Check, Plan, Service, Times, watch},
    kernel::{memory, session},
    open_files,
};

/// What ps(1) shows as the name of a keeper's process.
const KEEPER: &CStr = c"socinbd-keeper";
/// Interval in which the daemon checks whether it is still needed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Hold the block devices of attached images
///
/// `attach` and `run` start a daemon if none runs; that one exits after five minutes without an attachment. On SIGTERM, SIGINT or SIGQUIT
/// the daemon refuses new attachments, unmounts images that are not in use, and exits. When its state or runtime directory has been
/// removed, it exits with the last attachment.
///
/// The command starts the daemon as a child, keeps descriptors for it, starts the next one when it dies, and kills it when it hangs. A service
/// manager does so instead where NOTIFY_SOCKET is set: then the command is the daemon.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd daemon --root /srv/socinbd --run-dir /run/socinbd-2")]
pub(crate) struct DaemonCommand {
    /// Time without attachments or requests until exit [default: no limit]
    #[arg(long, value_name = "SECONDS")]
    idle_exit: Option<u64>,
    /// Log file, rotated at 1 MiB, instead of standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

impl DaemonCommand {
    pub(crate) fn log_file(&self) -> Option<&Path> {
        self.log_file.as_deref()
    }

    /// Becomes a keeper, which runs this same command.
    pub(crate) fn keep(&self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("the daemon")?;
        open_files::raise();
        let _ = rustix::thread::set_name(KEEPER); // only what ps(1) shows
        let starting = || "starting a keeper".to_owned();
        let signals = session::receive_signals(&[Signal::TERM, Signal::INT, Signal::QUIT])
            .or_kind(Kind::Io, starting)?;
        let plan = Plan {
            program: std::env::current_exe().or_kind(Kind::Io, starting)?,
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

    /// Serves, until it is ended or not needed any more.
    pub(crate) async fn run(
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
        let kept = service.as_mut().map(KeptDescriptors::take);
        let (root, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
        let engine = Engine::open_daemon(&root, &run_dir, kept.unwrap_or_default()).await?;
        let directories = [engine.root(), engine.run_dir()].map(WatchedDirectory::of);
        let server = Server::bind(Arc::clone(&engine), service.as_mut())?;
        if let Some(service) = &mut service {
            service.close_rest();
            if !service.store().is_kept() {
                tracing::warn!(
                    "what runs this daemon keeps no descriptors: a unit of systemd needs FileDescriptorStoreMax="
                );
            }
        }
        tracing::info!(root = %engine.root().display(), run_dir = %engine.run_dir().display(), "the daemon is ready");
        log::detach_from_stderr()?;
        *may_serve = true;
        let answering = tokio::spawn(Arc::clone(&server).run());
        let notify = service.as_ref().map(Service::notify);
        let watchdog = service.as_ref().and_then(Service::watchdog);
        let watched = async {
            match (notify, watchdog) {
                // what reads go through has to answer too
                (Some(notify), Some(period)) => {
                    watch(Arc::clone(notify), period, vec![Check::threads()]).await
                }
                _ => std::future::pending().await,
            }
        };
        if let Some(notify) = notify {
            notify.ready();
        }
        let idle_exit = self.idle_exit.map(Duration::from_secs);
        tokio::select! {
            signal = ends.next() => tracing::info!(?signal, "the daemon exits"),
            why = unwanted(&engine, &server, &directories, idle_exit) => tracing::info!("the daemon exits: {why}"),
            ended = answering => match ended.or_kind(Kind::Io, || "answering on the sockets of the daemon".into())? {},
            never = watched => match never {},
        }
        if let Some(notify) = notify {
            notify.stopping();
        }
        engine.end().await;
        Ok(())
    }
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
    directories: &[WatchedDirectory],
    idle_exit: Option<Duration>,
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
        }
        if idle_exit.is_some_and(|limit| wanted.elapsed() >= limit) {
            return "nothing has been attached for a while".to_owned();
        }
    }
}
