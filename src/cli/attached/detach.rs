//! `socinbd detach`.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;

use super::start;
use crate::{
    api::client::Client,
    blocking::blocking,
    cli::{GlobalArgs, absolute, require_root},
    engine::{
        Attachment, AttachmentRecords, AttachmentState, AttachmentStatus, Engine, place_of, unmount,
    },
    error::{Error, Kind, Result, ResultExt},
    kernel::mount::info,
};

/// Maximum time that a process which is shutting down may take to release everything.
const ENDING_TIME: Duration = Duration::from_secs(10);

/// Unmount an attached image and release its devices
///
/// An image that was attached with --keep is not attached again after a reboot, and the files of its writable layer are removed.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd detach /mnt\n\
\x20 socinbd detach /mnt --keep-record\n\
\x20 socinbd detach 5f0c2a...")]
pub(crate) struct DetachCommand {
    /// Mount point, or ID of the attachment as `list --json` shows it
    mountpoint: PathBuf,
    /// Attach an image of `attach --keep` again with the next daemon
    ///
    /// It is also attached by `socinbd restore`. The files of its writable layer stay.
    #[arg(long)]
    keep_record: bool,
}

impl DetachCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("detach")?;
        let mountpoint = place(&absolute(&self.mountpoint)?)?;
        let run_dir = absolute(&global.run_dir)?;
        let client = Client::new(&run_dir);
        let here = self.selected(attached(global, &client).await?, &mountpoint)?;
        let mut ids: Vec<String> = here.iter().map(|it| it.id.clone()).collect();
        let records = AttachmentRecords::open(&absolute(&global.root)?, &run_dir)?;
        if let Some(id) = self.mountpoint.to_str()
            && ids.is_empty()
            && records.is_kept(id)
        {
            ids.push(id.to_owned()); // its record is damaged
        }
        if ids.is_empty() {
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "no attachment of {} is mounted at {}; see `socinbd list`",
                    run_dir.display(),
                    mountpoint.display()
                ),
            ));
        }
        blocking(move || unmount(&here)).await?;
        let deadline = Instant::now() + ENDING_TIME;
        loop {
            let done = match client.daemon().await? {
                Some(_) => self.release(&client, &ids).await,
                None => self.give_back(global, &client, &run_dir, &ids).await,
            };
            let error = match done {
                Err(error) if error.kind() == Kind::Unavailable => error,
                done => return done.map(|()| ExitCode::SUCCESS),
            };
            // an `attach --foreground` whose mount is gone exits soon and removes its records
            if Instant::now() > deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The attachments to detach: those that are mounted at this path or left over there; otherwise those that were attached there and
    /// whose mount was moved by a rename, or that have this ID.
    fn selected(&self, all: Vec<AttachmentStatus>, place: &Path) -> Result<Vec<Attachment>> {
        let mounts = info::own()?;
        let mount_of = |status: &AttachmentStatus| place_of(&mounts, &status.attachment);
        let was_here = |status: &AttachmentStatus| {
            let places = [&status.attachment.mountpoint, &status.attached_at];
            places.contains(&&Some(place.to_owned()))
        };
        let is_here = |status: &AttachmentStatus| match mount_of(status) {
            Some(mount) => mount == place,
            None => {
                let is_left = matches!(
                    status.state,
                    AttachmentState::Unmounted | AttachmentState::Dead | AttachmentState::Kept
                );
                is_left && was_here(status)
            }
        };
        let is_named = |status: &AttachmentStatus| {
            was_here(status) || self.mountpoint.as_os_str() == status.attachment.id.as_str()
        };
        let found = |is_it: &dyn Fn(&AttachmentStatus) -> bool| -> Vec<Attachment> {
            let found = all.iter().filter(|status| is_it(status));
            found.map(|status| status.attachment.clone()).collect()
        };
        let here = found(&is_here);
        Ok(match here.is_empty() {
            true => found(&is_named),
            false => here,
        })
    }

    /// Asks the daemon to release the devices of attachments that are not mounted any more.
    async fn release(&self, client: &Client, ids: &[String]) -> Result<()> {
        for id in ids {
            match self.keep_record {
                true => client.release_for_now(id).await?,
                false => client.release(id).await?,
            }
        }
        Ok(())
    }

    /// Like [`Self::release`], if no daemon answers. `Unavailable` while a process holds the devices.
    async fn give_back(
        &self,
        global: &GlobalArgs,
        client: &Client,
        run_dir: &Path,
        ids: &[String],
    ) -> Result<()> {
        let _starting = start::lock(run_dir).await?;
        if client.daemon().await?.is_some() {
            return self.release(client, ids).await;
        }
        // opening the engine cleans up attachments without a daemon and a mount
        let engine = match Engine::open(&absolute(&global.root)?, run_dir).await {
            Err(error) if error.kind() == Kind::Busy => {
                return Err(Error::with_source(
                    Kind::Unavailable,
                    "the process that holds the devices does not answer",
                    error,
                ));
            }
            opened => opened?,
        };
        for id in ids {
            match self.keep_record {
                true => engine.release_for_now(id).await?,
                false => engine.release(id).await?,
            }
        }
        Ok(())
    }
}

/// The attachments: those of the daemon, or, if no daemon answers, the dead and kept ones from the records.
pub(crate) async fn attached(
    global: &GlobalArgs,
    client: &Client,
) -> Result<Vec<AttachmentStatus>> {
    if client.daemon().await?.is_some() {
        return client.attachments().await;
    }
    AttachmentRecords::open(&absolute(&global.root)?, &absolute(&global.run_dir)?)?.without_daemon()
}

/// The mount point as `attach` has recorded it: without symlinks. The directory itself is not opened, because a dead mount does not
/// answer. A path that does not exist any more (after a rename) is kept as it is.
pub(crate) fn place(path: &Path) -> Result<PathBuf> {
    let real = |path: &Path| match path.canonicalize() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_owned()),
        real => real.or_kind(Kind::NotFound, || format!("mount point {}", path.display())),
    };
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !path.is_symlink() => Ok(real(parent)?.join(name)),
        _ => real(path),
    }
}
