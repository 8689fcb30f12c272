//! `socinbd daemon --replace`: another daemon in the place of the one that runs.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::time::sleep;

use crate::{
    api::{DaemonInfo, client::Client},
    cli::{GlobalArgs, absolute, output},
    engine::{AttachmentState, AttachmentStatus, ServingProgram},
    error::{Error, Kind, Result},
};

/// Maximum time until the next daemon answers.
const START_TIME: Duration = Duration::from_secs(60);
/// Interval for polling whether it does.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The result with `--json`.
#[derive(Serialize)]
struct Replacement {
    before: ServingProgram,
    now: ServingProgram,
    /// Attachments that the next daemon serves.
    attachments: usize,
}

/// Replaces the daemon of `--run-dir` by this program.
pub(super) async fn replace(global: &GlobalArgs) -> Result<ExitCode> {
    let run_dir = absolute(&global.run_dir)?;
    let client = Client::new(&run_dir);
    let before = client.running_daemon().await?;
    let (Some(program), Some(formats)) = (&before.program, &before.formats) else {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "the running daemon, socinbd {}, cannot be replaced while images are attached: detach them, end it, and start the new one",
                before.version
            ),
        ));
    };
    formats.check()?;
    let own = ServingProgram::own();
    if own.is_replaced {
        return Err(Error::new(
            Kind::NotFound,
            format!(
                "{} has been removed or replaced since this command was started; try again",
                own.path.display()
            ),
        ));
    }
    let served = served(&client.attachments().await?);
    client.hand_over(own.path.clone()).await?;
    let now = wait_for_other(&client, &before).await?;
    let lost = lost(&served, &client.attachments().await?);
    if now.path != own.path || now.version != own.version {
        return Err(Error::new(
            Kind::Unavailable,
            format!(
                "{} did not start, and {} serves again; see the log of the daemon",
                own.path.display(),
                now.path.display()
            ),
        ));
    }
    if !lost.is_empty() {
        return Err(Error::new(
            Kind::Io,
            format!(
                "the new daemon does not serve {}; see its log, and `socinbd list`",
                lost.join(", ")
            ),
        ));
    }
    if global.json {
        output::json(&Replacement {
            before: program.clone(),
            now,
            attachments: served.len(),
        })?;
    } else {
        output::line(&told(&now))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until another process answers than before.
async fn wait_for_other(client: &Client, before: &DaemonInfo) -> Result<ServingProgram> {
    let begun = Instant::now();
    loop {
        // no answer: it may have died, and be followed by another one
        let info = client.daemon().await.ok().flatten();
        if let Some(now) = info.filter(|it| it.pid != before.pid) {
            return now.program.ok_or_else(|| {
                let why = format!("socinbd {} serves, an older program", now.version);
                Error::new(Kind::Unsupported, why)
            });
        }
        if begun.elapsed() > START_TIME {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "no other daemon has answered within {} s; see the log of the daemon",
                    START_TIME.as_secs()
                ),
            ));
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// IDs and images of the attachments that a daemon serves.
fn served(all: &[AttachmentStatus]) -> Vec<(String, String)> {
    let is_served = |status: &&AttachmentStatus| {
        !matches!(
            status.state,
            AttachmentState::Dead | AttachmentState::Unmounted
        )
    };
    all.iter()
        .filter(is_served)
        .map(|it| {
            (
                it.attachment.id.clone(),
                it.attachment.reference.to_string(),
            )
        })
        .collect()
}

/// Images that were served and are dead now.
fn lost(before: &[(String, String)], now: &[AttachmentStatus]) -> Vec<String> {
    let is_dead = |id: &str| {
        now.iter()
            .any(|it| it.attachment.id == id && it.state == AttachmentState::Dead)
    };
    before
        .iter()
        .filter(|(id, _)| is_dead(id))
        .map(|(_, reference)| reference.clone())
        .collect()
}

/// One line on a running daemon.
pub(in crate::cli) fn told(program: &ServingProgram) -> String {
    let mut line = format!(
        "served by socinbd {}, process {}: {}",
        program.version,
        program.pid,
        program.path.display()
    );
    if program.is_replaced {
        line += " (the file is another one by now: `socinbd daemon --replace` starts it)";
    }
    line
}
