//! systemd and containerd on this machine: restart, and the check that containerd uses the snapshotter.

use std::{
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

/// Starts the daemon anew, and waits until it answers containerd.
pub(super) async fn restart_daemon(socket: &Path) -> Result<()> {
    systemctl(&["daemon-reload"]).await?;
    systemctl(&["restart", "socinbd.service"]).await?;
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
    systemctl(&["stop", "socinbd.service"]).await
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
