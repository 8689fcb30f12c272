//! Starts the daemon if none runs.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Write as _},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, exit::BUSY},
    error::{Error, Kind, Result, ResultExt},
    keeper::{MAX_DESCRIPTORS, WATCHDOG},
    kernel::{handover::VARIABLES, session},
    layer::make_private,
    oci::Digest,
    regular_file,
};

/// Maximum time until a new daemon answers, or until a daemon that has locked the runtime directory listens.
const START_TIME: Duration = Duration::from_secs(20);
/// Maximum time to wait for a daemon with another runtime directory that has locked the root; it may be shutting down.
const ROOT_TIME: Duration = Duration::from_secs(3);
/// Maximum time for the service manager to start the daemon.
const MANAGER_TIME: Duration = Duration::from_secs(5);
/// Interval for polling whether a daemon answers.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Time until a daemon that could not lock its directories is started again.
const RETRY_TIME: Duration = Duration::from_millis(500);
/// Like [`RETRY_TIME`], for the service manager, which does not report that a start failed.
const SERVICE_RETRY_TIME: Duration = Duration::from_secs(2);
/// Time after which the user is told what the command waits for.
const SILENCE: Duration = Duration::from_secs(1);
/// Maximum time to wait for other commands that start a daemon or clean up after one.
const LOCK_TIME: Duration = Duration::from_secs(60);
/// Idle time after which a daemon that was started by a command exits.
const IDLE_EXIT_SECONDS: &str = "300";

/// Returns a client of the daemon of `--run-dir`, and starts the daemon if none runs.
pub(crate) async fn daemon(global: &GlobalArgs) -> Result<Client> {
    let (root, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
    let client = Client::new(&run_dir);
    make_private(&run_dir)?;
    if is_there(&client, &root, &run_dir).await? {
        return Ok(client);
    }
    let _starting = lock(&run_dir).await?;
    let mut start = DaemonStart::new(root, run_dir, global)?;
    let begun = Instant::now();
    let mut waiting = WaitNotice::default();
    loop {
        if is_there(&client, &start.root, &start.run_dir).await? {
            return Ok(client);
        }
        let limit = start.poll().await?;
        if begun.elapsed() > limit {
            return Err(start.failed(begun.elapsed()));
        }
        waiting.tell(|| format!("the daemon of {}", start.run_dir.display()));
        sleep(POLL_INTERVAL).await;
    }
}

/// Whether a daemon answers. It is an error if it uses another root.
async fn is_there(client: &Client, root: &Path, run_dir: &Path) -> Result<bool> {
    let Some(info) = client.daemon().await? else {
        return Ok(false);
    };
    // the daemon reports its root without symlinks
    if info.root != root.canonicalize().unwrap_or_else(|_| root.to_owned()) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "the daemon at {} uses the state directory {}, not {}; give another --run-dir",
                run_dir.display(),
                info.root.display(),
                root.display()
            ),
        ));
    }
    Ok(true)
}

/// Tells the user once, after a while, what the command waits for.
struct WaitNotice {
    begun: Instant,
    is_told: bool,
}

impl Default for WaitNotice {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            is_told: false,
        }
    }
}

impl WaitNotice {
    fn tell(&mut self, what: impl FnOnce() -> String) {
        if !self.is_told && self.begun.elapsed() > SILENCE {
            self.is_told = true;
            let _ = writeln!(std::io::stderr(), "socinbd: waiting for {}", what());
        }
    }
}

/// The lock of a process that starts a daemon or cleans up after one: of two processes, the second finds the result of the first.
pub(crate) async fn lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join("starting");
    let locking = || format!("locking {}", path.display());
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options.mode(0o600);
    let mut file = regular_file::open_or_replace(&path, &mut options).or_kind(Kind::Io, locking)?;
    let holder = || {
        let pid = regular_file::read(&path, 20).unwrap_or_default();
        let pid = String::from_utf8_lossy(&pid).into_owned();
        format!(
            "process {pid}, which starts the daemon of {} or cleans up after it",
            run_dir.display()
        )
    };
    let mut waiting = WaitNotice::default();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error).or_kind(Kind::Io, locking),
        }
        if waiting.begun.elapsed() > LOCK_TIME {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "timed out after {} s waiting for {}",
                    LOCK_TIME.as_secs(),
                    holder()
                ),
            ));
        }
        waiting.tell(holder);
        sleep(POLL_INTERVAL).await;
    }
    // for the processes that wait; without it their message has no process ID
    let _ = file.set_len(0);
    let _ = write!(file, "{}", std::process::id());
    Ok(file)
}

/// A daemon that is being started.
struct DaemonStart {
    root: PathBuf,
    run_dir: PathBuf,
    log: PathBuf,
    program: PathBuf,
    /// `socinbd daemon` with its options.
    arguments: Vec<OsString>,
    state: StartState,
    /// Error message of the last daemon that could not start.
    said: Option<String>,
}

enum StartState {
    /// No daemon is starting. It is started at `again`; the command gives up after `limit`.
    Not {
        again: Instant,
        limit: Duration,
    },
    Child(Child),
    /// A transient service with this unit name, started at this time.
    Service(String, Instant),
}

impl DaemonStart {
    fn new(root: PathBuf, run_dir: PathBuf, global: &GlobalArgs) -> Result<Self> {
        let settings = &global.settings;
        let mut arguments: Vec<OsString> = vec!["daemon".into()];
        for (flag, directory) in [("--root", &root), ("--run-dir", &run_dir)] {
            arguments.extend([flag.into(), directory.into()]);
        }
        // the daemon itself reads the configuration file: what it has can be changed while the daemon runs
        if let Some(file) = settings.given_path() {
            arguments.extend(["--config".into(), file.into()]);
        }
        if settings.is_explicit("log") {
            arguments.extend(["--log", &global.log].map(OsString::from));
        }
        if settings.is_explicit("log-format") {
            arguments.extend(["--log-format", global.log_format.name()].map(OsString::from));
        }
        if !settings.is_in_file("idle-exit") {
            arguments.extend(["--idle-exit", IDLE_EXIT_SECONDS].map(OsString::from));
        }
        Ok(Self {
            log: run_dir.join("daemon.log"),
            root,
            run_dir,
            program: std::env::current_exe().or_kind(Kind::Io, || "finding this program".into())?,
            arguments,
            state: StartState::Not {
                again: Instant::now(),
                limit: START_TIME,
            },
            said: None,
        })
    }

    /// Starts the daemon if needed, and checks its state. Returns the maximum time for the whole start.
    async fn poll(&mut self) -> Result<Duration> {
        match &mut self.state {
            StartState::Not { again, limit } => {
                let limit = *limit;
                if *again <= Instant::now() {
                    self.state = self.start().await?;
                }
                return Ok(limit);
            }
            StartState::Child(child) => {
                let ended = child
                    .try_wait()
                    .or_kind(Kind::Io, || "waiting for the daemon".into())?;
                let Some(status) = ended else {
                    return Ok(START_TIME);
                };
                let mut said = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    let _ = stderr.read_to_string(&mut said);
                }
                let said = said.trim().trim_start_matches("socinbd: ").to_owned();
                if status.code() != Some(BUSY.into()) {
                    let said = if said.is_empty() {
                        tail(&self.log)
                    } else {
                        said
                    };
                    return Err(Error::new(
                        Kind::Io,
                        format!("the daemon did not start ({status}): {said}"),
                    ));
                }
                self.said = Some(said);
            }
            // systemd-run does not report that the daemon could not lock its directories: the daemon just does not answer
            StartState::Service(_, since) => {
                if since.elapsed() > SERVICE_RETRY_TIME && !self.is_run_dir_taken() {
                    self.state = self.start().await?;
                }
                return Ok(START_TIME);
            }
        }
        // the process that holds the directories may be about to listen, or to exit
        let limit = match self.is_run_dir_taken() {
            true => START_TIME,
            false => ROOT_TIME,
        };
        self.state = StartState::Not {
            again: Instant::now() + RETRY_TIME,
            limit,
        };
        Ok(limit)
    }

    /// Whether a process has locked the runtime directory.
    fn is_run_dir_taken(&self) -> bool {
        let path = self.run_dir.join("lock");
        let lock = regular_file::open(&path, OpenOptions::new().read(true));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Starts a daemon that outlives this login session: as a transient service if a service manager answers, else in its own session.
    async fn start(&self) -> Result<StartState> {
        // the daemon would wait for the reader of a FIFO
        if fs::symlink_metadata(&self.log).is_ok_and(|there| !there.is_file()) {
            let cannot = || {
                format!(
                    "cannot remove {}, which is not a regular file",
                    self.log.display()
                )
            };
            regular_file::remove_one(&self.log).or_kind(Kind::Io, cannot)?;
        }
        // the test of sd_booted(3)
        if Path::new("/run/systemd/system").is_dir() {
            match self.start_service().await {
                Ok(unit) => return Ok(StartState::Service(unit, Instant::now())),
                Err(why) => tracing::warn!("starting the daemon without systemd: {why}"),
            }
        }
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .arg("--log-file")
            .arg(&self.log)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // read until the daemon is ready
            .stderr(Stdio::piped());
        for name in variables_of_this_process() {
            command.env_remove(name);
        }
        session::detach(&mut command);
        let child = command.spawn();
        Ok(StartState::Child(
            child.or_kind(Kind::Io, || "starting the daemon".into())?,
        ))
    }

    /// Starts the daemon as a transient service of systemd, which writes its log to the journal. Returns the name of the unit, or the
    /// reason why this failed.
    async fn start_service(&self) -> Result<String, String> {
        let place = Digest::of(self.run_dir.as_os_str().as_bytes()).hex()[..8].to_owned();
        // a unit of an earlier daemon may still exist
        let unit = format!("socinbd-{place}-{}", std::process::id());
        let mut command = tokio::process::Command::new("systemd-run");
        command
            .args([
                "--quiet",
                "--collect",
                "--no-block",
                "--description=socinbd daemon",
            ])
            .arg(format!("--unit={unit}"))
            .args(properties().map(|property| format!("--property={property}")))
            .arg("--")
            .arg(&self.program)
            .args(
                self.arguments
                    .iter()
                    .map(|argument| without_variables(argument)),
            )
            .current_dir("/")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        for name in variables_of_this_process() {
            command.env_remove(name);
        }
        match timeout(MANAGER_TIME, command.output()).await {
            Err(_) => Err(format!(
                "systemd-run has not exited after {} s",
                MANAGER_TIME.as_secs()
            )),
            Ok(Err(error)) => Err(format!("systemd-run: {error}")),
            Ok(Ok(output)) if output.status.success() => Ok(unit),
            Ok(Ok(output)) => Err(format!(
                "systemd-run failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )),
        }
    }

    /// The error if no daemon has answered in this time.
    fn failed(self, time: Duration) -> Error {
        let (kind, why) = match (self.said, self.state) {
            (Some(said), _) => (Kind::Busy, said),
            (None, StartState::Service(unit, _)) => {
                (Kind::Unavailable, format!("see `journalctl --unit {unit}`"))
            }
            (None, _) => (Kind::Unavailable, tail(&self.log)),
        };
        let time = time.as_secs();
        Error::new(
            kind,
            format!(
                "no daemon of {} has answered within {time} s: {why}",
                self.run_dir.display()
            ),
        )
    }
}

/// What the daemon does not get from this process: what is meant for a service that this process may be. It gets the variables of proxies:
/// proxies come with each request, but their passwords are not stored, and the next daemon has only its environment.
fn variables_of_this_process() -> impl Iterator<Item = OsString> {
    let names = std::env::vars_os().map(|(name, _)| name);
    names.filter(|name| {
        let name = name.to_string_lossy().to_ascii_uppercase();
        VARIABLES.contains(&name.as_str())
    })
}

/// The properties of the daemon's service: it keeps descriptors, and is started again whenever it dies. A first start that fails is not
/// repeated: its exit status is that of a kind of error.
fn properties() -> [String; 12] {
    let statuses: Vec<String> = (1..=9).map(|status| status.to_string()).collect();
    [
        "Type=notify".to_owned(),
        "NotifyAccess=main".to_owned(),
        format!("FileDescriptorStoreMax={MAX_DESCRIPTORS}"),
        format!("WatchdogSec={}", WATCHDOG.as_secs()),
        // until it is killed, and until it is followed by another one although a thread of it sleeps uninterruptibly
        "TimeoutAbortSec=3".to_owned(),
        "TimeoutStopSec=30".to_owned(),
        "Restart=on-failure".to_owned(),
        "RestartSec=100ms".to_owned(),
        format!("RestartPreventExitStatus={}", statuses.join(" ")),
        "StartLimitIntervalSec=0".to_owned(),
        "RestartKillSignal=SIGUSR2".to_owned(),
        // what else is in its control group is stopped by it
        "KillMode=mixed".to_owned(),
    ]
}

/// Escapes an argument for the service manager, which replaces `$NAME` and `${NAME}`, and reads `$$` as `$`.
fn without_variables(argument: &OsStr) -> OsString {
    let mut escaped = Vec::with_capacity(argument.len());
    for &byte in argument.as_bytes() {
        escaped.extend(std::iter::repeat_n(byte, if byte == b'$' { 2 } else { 1 }));
    }
    OsString::from_vec(escaped)
}

/// The last lines of the daemon's log.
fn tail(log: &Path) -> String {
    let text = regular_file::read_end(log, 2000).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    if lines.is_empty() {
        return format!("its log {} is empty", log.display());
    }
    format!(
        "its log {} ends with: {}",
        log.display(),
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_finds_no_variables() {
        let escaped = |text: &str| without_variables(OsStr::new(text));
        assert_eq!(escaped("/var/lib/socinbd"), "/var/lib/socinbd");
        assert_eq!(escaped("/$HOME/${x}$"), "/$$HOME/$${x}$$");
    }
}
