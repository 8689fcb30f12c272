//! systemd and containerd on this machine: restart, and the check that containerd uses the snapshotter.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use tokio::{net::UnixStream, process::Command};

use super::containerd::{NAME, SERVICE};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// A program that has not ended by then is killed.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The same for a restart: k3s and RKE2 have started when Kubernetes answers.
const RESTART: Duration = Duration::from_secs(600);
/// After this time without an answer, a service counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The service of the daemon.
const DAEMON: &str = "socinbd.service";

/// Whether systemd manages this machine.
pub(super) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Runs a program, and returns its output whatever its status.
pub(super) async fn output(program: &Path, arguments: &[&str]) -> Result<Output> {
    output_in(TIMEOUT, program, arguments).await
}

async fn output_in(timeout: Duration, program: &Path, arguments: &[&str]) -> Result<Output> {
    let named = || format!("running {} {}", program.display(), arguments.join(" "));
    let mut command = Command::new(program);
    let output = command.args(arguments).kill_on_drop(true).output();
    match tokio::time::timeout(timeout, output).await {
        Ok(output) => output.or_kind(Kind::NotFound, named),
        Err(_) => {
            let what = format!("{}: no answer in {} s", named(), timeout.as_secs());
            Err(Error::new(Kind::Unavailable, what))
        }
    }
}

async fn systemctl(arguments: &[&str]) -> Result<()> {
    let output = output_in(RESTART, Path::new("systemctl"), arguments).await?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let what = format!("systemctl {}: {}", arguments.join(" "), said.trim());
    Err(Error::new(Kind::Unavailable, what))
}

/// A property of the daemon's service.
async fn property(name: &str) -> Result<String> {
    let arguments = ["show", "--value", "--property", name, DAEMON];
    let output = output(Path::new("systemctl"), &arguments).await?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The process of the daemon, if the service runs.
pub(super) async fn daemon() -> Result<Option<u32>> {
    let process = property("MainPID").await?.parse().ok();
    Ok(process.filter(|process| *process != 0))
}

/// Whether a process runs the program that is now at a path, and not one that it has replaced.
pub(super) fn runs(process: u32, program: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let running = file(Path::new(&format!("/proc/{process}/exe")));
    running.is_ok_and(|running| file(program).is_ok_and(|program| program == running))
}

/// Starts the daemon anew.
pub(super) async fn restart_daemon() -> Result<()> {
    systemctl(&["daemon-reload"]).await?;
    systemctl(&["restart", DAEMON]).await
}

/// Waits until the daemon answers containerd.
pub(super) async fn answers(socket: &Path) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = UnixStream::connect(socket).await {
        if start.elapsed() > PATIENCE {
            return Err(Error::with_source(
                Kind::Unavailable,
                format!("{} (see `journalctl -u socinbd`)", socket.display()),
                error,
            ));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Starts containerd anew, by the services that start it. Containers go on meanwhile.
pub(super) async fn restart_containerd(services: &[String]) -> Result<()> {
    systemctl(&["daemon-reload"]).await?;
    for service in services {
        systemctl(&[verb(service), service]).await?;
    }
    Ok(())
}

/// How a service that starts containerd is started anew: a node may have units of a distribution that it does not use.
fn verb(service: &str) -> &'static str {
    match service {
        SERVICE => "restart",
        _ => "try-restart",
    }
}

/// The commands that start the services anew, for a person.
pub(super) fn restarts(services: &[String]) -> String {
    let short = |service: &String| service.trim_end_matches(".service").to_owned();
    let names: Vec<String> = services.iter().map(short).collect();
    match services {
        [service, ..] => format!("`systemctl {} {}`", verb(service), names.join(" ")),
        [] => "a restart of containerd".to_owned(),
    }
}

/// Ends the daemon. A packaged one is as it was before after its next start.
pub(super) async fn stop_daemon() -> Result<()> {
    // a service that has ended and has no unit any more cannot be stopped
    match property("ActiveState").await?.as_str() {
        "inactive" => Ok(()),
        _ => systemctl(&["stop", DAEMON]).await,
    }
}

/// Ends a daemon that was not there before its installation, which has failed, and forgets that.
pub(super) async fn forget_daemon() -> Result<()> {
    stop_daemon().await?;
    match property("ActiveState").await?.as_str() {
        "failed" => systemctl(&["reset-failed", DAEMON]).await,
        _ => Ok(()),
    }
}

/// Waits until containerd says that it has the plugin.
pub(super) async fn check(ctr: &Path, address: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let output = output(ctr, &["--address", address, "plugins", "ls"]).await?;
        let said = String::from_utf8_lossy(&output.stdout);
        // containerd may not answer yet
        let state = state(&said).filter(|_| output.status.success());
        if state == Some("ok") {
            return Ok(());
        }
        if state.is_some() || start.elapsed() > PATIENCE {
            let what = format!(
                "`ctr plugins ls` does not say that {NAME} is ok (see the log of containerd)"
            );
            return Err(Error::new(Kind::Unavailable, what));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The state of the plugin in the output of `ctr plugins ls`.
fn state(said: &str) -> Option<&str> {
    said.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let is_it =
            words.next() == Some("io.containerd.snapshotter.v1") && words.next() == Some(NAME);
        words.last().filter(|_| is_it)
    })
}
