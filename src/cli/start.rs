//! Starting the daemon where none runs.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{Global, absolute};
use crate::{
    api::client::Client,
    error::{Error, Kind, Result, ResultExt},
    layer::make_private,
};

/// How long a new daemon may take until it answers.
const START_TIME: Duration = Duration::from_secs(20);

/// A client of the daemon of `--run-dir`, which is started where none runs.
pub(super) async fn daemon(global: &Global) -> Result<Client> {
    let (root, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
    let client = Client::new(&run_dir);
    make_private(&run_dir)?;
    let _starting = lock(&run_dir).await?;
    if let Some(info) = client.daemon().await? {
        // the daemon's is without symlinks
        if info.root != root.canonicalize().unwrap_or_else(|_| root.clone()) {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "the daemon at {} works on {}, not on {}; give it a --run-dir of its own",
                    run_dir.display(),
                    info.root.display(),
                    root.display()
                ),
            ));
        }
        return Ok(client);
    }
    let log = run_dir.join("daemon.log");
    let mut child = start(&root, &run_dir, &log, &global.log)?;
    let deadline = Instant::now() + START_TIME;
    loop {
        if client.daemon().await?.is_some() {
            return Ok(client);
        }
        let ended = child
            .try_wait()
            .or_kind(Kind::Io, || "waiting for the daemon".into())?;
        // systemd-run ends at once, and well; another daemon that was faster is fine too
        if ended.is_some_and(|status| !status.success()) && client.daemon().await?.is_none() {
            return Err(Error::new(
                Kind::Unavailable,
                format!("the daemon did not start: {}", tail(&log)),
            ));
        }
        if Instant::now() > deadline {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "the daemon did not answer within {} s: {}",
                    START_TIME.as_secs(),
                    tail(&log)
                ),
            ));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The lock of who starts a daemon, or cleans up after one: of two at once, the second finds what the first has done.
pub(super) async fn lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join("starting");
    let work = move || {
        let take = || -> std::io::Result<File> {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            file.lock()?;
            Ok(file)
        };
        take().or_kind(Kind::Io, || format!("locking {}", path.display()))
    };
    tokio::task::spawn_blocking(work)
        .await
        .or_kind(Kind::Io, || "a worker thread".into())?
}

/// Starts a daemon that outlives this login: as a transient service where systemd runs, else in a session of its own.
fn start(root: &Path, run_dir: &Path, log: &Path, filter: &str) -> Result<std::process::Child> {
    let program = std::env::current_exe().or_kind(Kind::Io, || "finding this program".into())?;
    let open = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log);
    let output = open.or_kind(Kind::Io, || format!("opening the log {}", log.display()))?;
    let mut arguments: Vec<OsString> = vec!["daemon".into()];
    for (flag, folder) in [("--root", root), ("--run-dir", run_dir)] {
        arguments.extend([flag.into(), folder.into()]);
    }
    let filter = if filter == "warn" { "info" } else { filter };
    arguments.extend(["--log".into(), filter.into()]);
    let mut command = if Path::new("/run/systemd/system").is_dir() {
        let file = |kind: &str| {
            let mut property = OsString::from(format!("--property=Standard{kind}=append:"));
            property.push(log);
            property
        };
        let mut command = Command::new("systemd-run");
        command
            .args(["--quiet", "--collect", "--description=socinbd daemon"])
            .args([file("Output"), file("Error")])
            .arg("--")
            .arg(program)
            .args(arguments.iter().map(|argument| without_variables(argument)));
        command
    } else {
        let mut command = Command::new(program);
        command.args(arguments);
        command
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| {
        name.to_string_lossy()
            .to_ascii_uppercase()
            .ends_with("_PROXY")
    }) {
        command.env_remove(name); // they come with each request
    }
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stderr(
            output
                .try_clone()
                .or_kind(Kind::Io, || "the daemon's log".into())?,
        )
        .stdout(output);
    crate::kernel::session::detach(&mut command);
    command
        .spawn()
        .or_kind(Kind::Io, || "starting the daemon".into())
}

/// The argument as the service manager has to get it: it replaces `$NAME` and `${NAME}`, and reads `$$` as `$`.
fn without_variables(argument: &OsStr) -> OsString {
    let mut escaped = Vec::with_capacity(argument.len());
    for &byte in argument.as_bytes() {
        escaped.extend(std::iter::repeat_n(byte, if byte == b'$' { 2 } else { 1 }));
    }
    OsString::from_vec(escaped)
}

/// The last lines of the daemon's log.
fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
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
