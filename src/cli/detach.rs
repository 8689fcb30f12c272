//! `socinbd detach`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{Global, absolute, require_root};
use crate::{
    api::client::Client,
    engine::{Engine, Records, unmount},
    error::{Error, Kind, Result, ResultExt},
};

/// Unmount an attached image and give its devices back
#[derive(Args)]
pub struct Detach {
    /// Where it is mounted; or the attachment's id, as `list --json` shows it
    mountpoint: PathBuf,
}

impl Detach {
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
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
        let path = mountpoint.clone();
        let ids: Vec<String> = here.iter().map(|record| record.id.clone()).collect();
        tokio::task::spawn_blocking(move || unmount(&path, &ids))
            .await
            .map_err(|error| Error::with_source(Kind::Io, "unmounting", error))??;
        let client = Client::new(&run_dir);
        if client.daemon().await?.is_some() {
            for record in &here {
                client.release(&record.id).await?;
            }
        } else {
            // opening the engine clears away what has no daemon and no mount
            drop(Engine::open(&absolute(&global.root)?, &run_dir).await?);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The mount point as `attach` has noted it: without symlinks. Its own folder is not looked at: a dead mount does not answer.
fn place(path: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(path.to_owned());
    };
    let parent = parent.canonicalize();
    let parent = parent.or_kind(Kind::NotFound, || {
        format!("the mount point {}", path.display())
    })?;
    Ok(parent.join(name))
}
