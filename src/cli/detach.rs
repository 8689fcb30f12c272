//! `socinbd detach`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;

use super::{Global, absolute, require_root, start};
use crate::{
    api::client::Client,
    engine::{Attachment, Engine, Records, unmount},
    error::{Error, Kind, Result, ResultExt},
};

/// How long a process that is ending may take until it has given everything back.
const ENDING_TIME: Duration = Duration::from_secs(10);

/// Unmount an attached image and give its devices back
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd detach /mnt")]
pub(super) struct Detach {
    /// Where it is mounted; or the attachment's id, as `list --json` shows it
    mountpoint: PathBuf,
}

impl Detach {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        require_root("detach")?;
        let mountpoint = place(&absolute(&self.mountpoint)?)?;
        let run_dir = absolute(&global.run_dir)?;
        let records = if run_dir.exists() {
            Records::open(&run_dir)?.all()?
        } else {
            Vec::new()
        };
        let here: Vec<_> = records
            .into_iter()
            .filter(|record| {
                record.mountpoint.as_ref() == Some(&mountpoint)
                    || self.mountpoint.as_os_str() == record.id.as_str()
            })
            .collect();
        if here.is_empty() {
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "nothing of {} is attached at {}; `socinbd list` shows what is",
                    run_dir.display(),
                    mountpoint.display()
                ),
            ));
        }
        let client = Client::new(&run_dir);
        // one that does not answer is told of before anything is done
        client.daemon().await?;
        let (path, attached) = (mountpoint.clone(), here.clone());
        let unmount_all = move || {
            let ids: Vec<String> = attached.iter().map(|record| record.id.clone()).collect();
            // one that is named by its id is where it says
            let path = attached[0].mountpoint.as_ref().unwrap_or(&path);
            unmount(path, &ids)
        };
        tokio::task::spawn_blocking(unmount_all)
            .await
            .map_err(|error| Error::with_source(Kind::Io, "unmounting", error))??;
        let deadline = Instant::now() + ENDING_TIME;
        loop {
            let done = match client.daemon().await? {
                Some(_) => release(&client, &here).await,
                None => give_back(global, &client, &run_dir, &here).await,
            };
            let error = match done {
                Err(error) if error.kind() == Kind::Unavailable => error,
                done => return done.map(|()| ExitCode::SUCCESS),
            };
            // an `attach --foreground` that has seen its mount go is about to end, and takes the records along
            if Instant::now() > deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Has the daemon give back what attachments that are not mounted any more have.
async fn release(client: &Client, attachments: &[Attachment]) -> Result<()> {
    for attachment in attachments {
        gone_is_fine(client.release(&attachment.id).await)?;
    }
    Ok(())
}

/// As [`release`], where no daemon answers. `Unavailable` while a process has them.
async fn give_back(
    global: &Global,
    client: &Client,
    run_dir: &Path,
    attachments: &[Attachment],
) -> Result<()> {
    let _starting = start::lock(run_dir).await?;
    if client.daemon().await?.is_some() {
        return release(client, attachments).await;
    }
    // opening the engine clears away what has no daemon and no mount
    let engine = match Engine::open(&absolute(&global.root)?, run_dir).await {
        Err(error) if error.kind() == Kind::Busy => {
            return Err(Error::with_source(
                Kind::Unavailable,
                "the process that has the devices does not answer",
                error,
            ));
        }
        opened => opened?,
    };
    for attachment in attachments {
        gone_is_fine(engine.release(&attachment.id).await)?;
    }
    Ok(())
}

/// Whoever had it may have seen that it is unmounted, and have been faster.
fn gone_is_fine(released: Result<()>) -> Result<()> {
    match released {
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        other => other,
    }
}

/// The mount point as `attach` has noted it: without symlinks. Its own folder is not looked at: a dead mount does not answer.
pub(super) fn place(path: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        let path = path.canonicalize();
        return path.or_kind(Kind::NotFound, || "the mount point".into());
    };
    if path.is_symlink() {
        let path = path.canonicalize();
        return path.or_kind(Kind::NotFound, || "the mount point".into());
    }
    let parent = parent.canonicalize();
    let parent = parent.or_kind(Kind::NotFound, || {
        format!("the mount point {}", path.display())
    })?;
    Ok(parent.join(name))
}
