//! `socinbd attach`.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Args;

use super::{
    Global, INTERRUPTED, ImageArgs, IndexArgs, absolute, output, progress::Progress, require_root,
    signals::Signals, start,
};
use crate::{
    api::{
        client::{Client, Offer},
        server::Server,
    },
    engine::{AttachRequest, Attachment, DeviceChoice, Engine},
    error::{Error, Kind, Result, ResultExt},
    kernel, open_files,
};

/// How often a foreground attachment whose mount is gone looks whether it is still in use.
const RELEASE_TURN: Duration = Duration::from_millis(100);

/// Mount an image's root file system; its data is fetched as it is read
///
/// A daemon holds the devices: the one of --run-dir, or a new one that outlives this login. `socinbd detach` ends it.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd attach nginx:1.27 /mnt\n\
\x20 socinbd attach oci:./app:latest /mnt --rw\n\
\x20 socinbd attach registry.example/app /mnt --foreground")]
pub(super) struct Attach {
    #[command(flatten)]
    image: ImageArgs,
    /// Where to mount it; an existing folder
    mountpoint: PathBuf,
    #[command(flatten)]
    index: IndexArgs,
    #[command(flatten)]
    options: MountArgs,
    /// Add a writable upper layer; what is written there ends with the attachment
    #[arg(long)]
    rw: bool,
    /// Hold the devices in this process, until it is interrupted or hung up, or the mount is gone
    #[arg(long)]
    foreground: bool,
}

/// How an image is mounted.
#[derive(Args, Clone, Debug)]
pub(super) struct MountArgs {
    /// How the kernel gets the layers
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Let device files in the image work as devices
    #[arg(long)]
    pub dev: bool,
}

impl Attach {
    /// Whether it holds the devices itself.
    pub(super) fn is_lasting(&self) -> bool {
        self.foreground
    }

    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        require_root("attach")?;
        let mountpoint = self
            .mountpoint
            .canonicalize()
            .or_kind(Kind::InvalidArgument, || {
                format!(
                    "the mount point {}; make the folder first",
                    self.mountpoint.display()
                )
            })?;
        if !mountpoint.is_dir() {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("the mount point {} is no folder", mountpoint.display()),
            ));
        }
        let request = request(
            &self.image,
            &self.index,
            &self.options,
            self.rw,
            Some(mountpoint.clone()),
        )?;
        if self.foreground {
            return foreground(global, request, mountpoint).await;
        }
        let (client, offer) = by_daemon(global, &request).await?;
        let attachment = &offer.attachment;
        let mounted = mount(&client, attachment, mountpoint).await;
        if let Err(error) = mounted {
            // the caller's own error is the one that counts
            let _ = client.release(&attachment.id).await;
            return Err(error);
        }
        output::attached(global.json, attachment)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The request that these arguments make.
pub(super) fn request(
    image: &ImageArgs,
    index: &IndexArgs,
    options: &MountArgs,
    writable: bool,
    mountpoint: Option<PathBuf>,
) -> Result<AttachRequest> {
    Ok(AttachRequest {
        reference: image.image.clone(),
        access: image.access.access()?,
        platform: image.platform.clone(),
        index: index.choice(),
        device: options.device,
        writable,
        allow_devices: options.dev,
        mountpoint,
    })
}

/// Has a daemon attach an image, and shows how that goes on. It is taken back unless the caller mounts it.
pub(super) async fn by_daemon(global: &Global, request: &AttachRequest) -> Result<(Client, Offer)> {
    let client = start::daemon(global).await?;
    let progress = Progress::new(global.json);
    let offer = client
        .attach(request, &|event| progress.event(event))
        .await?;
    progress.finish();
    Ok((client, offer))
}

async fn mount(client: &Client, attachment: &Attachment, mountpoint: PathBuf) -> Result<()> {
    let fd = client.mount(&attachment.id).await?;
    kernel::mount::attach(fd.as_fd(), &mountpoint)?;
    drop(fd);
    client.mounted(&attachment.id).await
}

/// Gives the devices back once the mount is gone, and nobody uses what an `umount -l` has left.
async fn unmounted(engine: &Engine, mountpoint: &Path, id: &str) -> Result<()> {
    engine.wait_unmounted(mountpoint, id).await?;
    loop {
        match engine.release(id).await {
            Err(error) if error.kind() == Kind::Busy => {
                tokio::time::sleep(RELEASE_TURN).await;
            }
            // `detach` was faster
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            released => return released,
        }
    }
}

/// Attaches in this process, and waits for a signal or for the mount to go.
async fn foreground(
    global: &Global,
    request: AttachRequest,
    mountpoint: PathBuf,
) -> Result<ExitCode> {
    open_files::raise();
    let mut ends = Signals::that_end()?;
    let engine = Engine::open(&absolute(&global.root)?, &absolute(&global.run_dir)?).await?;
    let engine = Arc::new(engine);
    // `list` and `detach` find it
    let answering = tokio::spawn(Server::bind_for_one(Arc::clone(&engine))?.run());
    let progress = Progress::new(global.json);
    let event = |event| progress.event(event);
    let attached = tokio::select! {
        attached = engine.attach(request, &event) => attached?,
        _ = ends.next() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    progress.finish();
    let id = attached.attachment.id.clone();
    let moved = kernel::mount::attach(attached.mount.as_fd(), &mountpoint);
    drop(attached.mount);
    if let Err(error) = moved {
        engine.release(&id).await?;
        return Err(error);
    }
    engine.mounted(&id)?;
    output::attached(global.json, &attached.attachment)?;
    tokio::select! {
        _ = ends.next() => engine.detach_at(&mountpoint).await?,
        ended = answering => match ended.or_kind(Kind::Io, || "the sockets".into())? {},
        gone = unmounted(&engine, &mountpoint, &id) => gone?,
    }
    Ok(ExitCode::SUCCESS)
}
