//! `socinbd daemon`.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;

use crate::{
    api::server::Server,
    cli::{GlobalArgs, absolute, log, require_root, signals::SignalReceiver},
    engine::Engine,
    error::{Kind, Result, ResultExt},
    open_files,
};

/// Interval in which the daemon checks whether it is still needed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Hold the block devices of attached images
///
/// `attach` and `run` start a daemon if none runs; that one exits after five minutes without an attachment. On SIGTERM, SIGINT or SIGQUIT
/// the daemon refuses new attachments, unmounts images that are not in use, and exits. When its state or runtime directory has been
/// removed, it exits with the last attachment.
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

    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("the daemon")?;
        open_files::raise();
        let mut ends = SignalReceiver::that_end_the_daemon()?;
        let engine = Engine::open(&absolute(&global.root)?, &absolute(&global.run_dir)?).await?;
        let directories = [engine.root(), engine.run_dir()].map(WatchedDirectory::of);
        let server = Server::bind(Arc::clone(&engine))?;
        tracing::info!(root = %engine.root().display(), run_dir = %engine.run_dir().display(), "the daemon is ready");
        log::detach_from_stderr()?;
        let answering = tokio::spawn(Arc::clone(&server).run());
        let idle_exit = self.idle_exit.map(Duration::from_secs);
        tokio::select! {
            signal = ends.next() => tracing::info!(?signal, "the daemon exits"),
            why = unwanted(&engine, &server, &directories, idle_exit) => tracing::info!("the daemon exits: {why}"),
            ended = answering => match ended.or_kind(Kind::Io, || "answering on the sockets of the daemon".into())? {},
        }
        engine.end().await;
        Ok(ExitCode::SUCCESS)
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
