//! `socinbd attach`.

use std::{
    convert::Infallible,
    os::fd::AsFd,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use tokio::task::JoinHandle;

use super::start;
use crate::{
    api::{
        client::{AttachAnswer, Client, Offer},
        server::Server,
    },
    cli::{
        GlobalArgs, ImageArgs, IndexArgs, absolute, exit::INTERRUPTED, output,
        progress::ProgressBars, require_root, signals::SignalReceiver,
    },
    engine::{AttachRequest, AttachedImage, Attachment, DeviceChoice, Engine, unmount},
    error::{Error, Kind, Result, ResultExt},
    kernel,
    layer::FillPolicy,
    open_files,
};

/// Maximum time until a successor of a daemon that is shutting down is started, and the interval in which that daemon is polled.
const SUCCESSION_TIME: Duration = Duration::from_secs(30);
const ENDING_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Mount the root file system of an image, with lazily fetched data
///
/// A daemon holds the block devices: the one of --run-dir, which is started if none runs, and which outlives this login session.
/// `socinbd detach` unmounts the image.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd attach nginx:1.27 /mnt\n\
\x20 socinbd attach oci:./app:latest /mnt --rw\n\
\x20 socinbd attach registry.example/app /mnt --keep\n\
\x20 socinbd attach registry.example/app /mnt --foreground")]
pub(crate) struct AttachCommand {
    #[command(flatten)]
    image: ImageArgs,
    /// Mount point: an existing directory
    mountpoint: PathBuf,
    #[command(flatten)]
    index: IndexArgs,
    #[command(flatten)]
    options: MountArgs,
    /// Add a writable upper layer, which is removed on detach
    #[arg(long)]
    rw: bool,
    /// Attach the image again after a reboot, until it is detached
    ///
    /// The next start of the daemon attaches it, or `socinbd restore`, without the registry. Files of --rw are kept as well.
    #[arg(long, conflicts_with = "foreground")]
    keep: bool,
    /// Hold the devices in this process instead of a daemon
    ///
    /// The process runs until it gets SIGTERM, SIGINT, SIGQUIT or SIGHUP, or until the image is unmounted.
    #[arg(long)]
    foreground: bool,
}

/// How an image is mounted.
#[derive(Args, Clone, Debug)]
pub(crate) struct MountArgs {
    /// Block device: auto, nbd, loop or fuse
    #[arg(long, value_enum, default_value_t, hide_possible_values = true)]
    pub device: DeviceChoice,
    /// When to fetch the rest: never, auto, delayed or always
    ///
    /// never: only what is read. auto: when most of a layer was read. delayed: also when no program has waited for data for half a minute.
    /// always: at once. It is fetched in the background, and programs that wait for data have precedence. A complete image needs neither the
    /// registry nor the daemon.
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value_t,
        hide_possible_values = true
    )]
    pub fill: FillPolicy,
    /// Allow device nodes in the image (mount without nodev)
    #[arg(long)]
    pub dev: bool,
}

impl AttachCommand {
    /// Whether the command holds the devices itself.
    pub(crate) fn is_lasting(&self) -> bool {
        self.foreground
    }

    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("attach")?;
        let mountpoint = self
            .mountpoint
            .canonicalize()
            .or_kind(Kind::InvalidArgument, || {
                format!(
                    "mount point {} (create the directory first)",
                    self.mountpoint.display()
                )
            })?;
        if !mountpoint.is_dir() {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("mount point {} is not a directory", mountpoint.display()),
            ));
        }
        if self.keep && kernel::mount::is_mount(&mountpoint)? {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "another file system is mounted at {}: with --keep the mount point must be free",
                    mountpoint.display()
                ),
            ));
        }
        let mut request = request(
            &self.image,
            &self.index,
            &self.options,
            self.rw,
            Some(mountpoint.clone()),
        )?;
        request.keep = self.keep;
        if self.foreground {
            return foreground(global, request, mountpoint).await;
        }
        let (client, offer) = by_daemon(global, &request).await?;
        let attachment = &offer.attachment;
        mount(&client, attachment, mountpoint).await?;
        output::attached(global.json, attachment)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds the request from the arguments.
pub(crate) fn request(
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
        fill: options.fill,
        writable,
        allow_devices: options.dev,
        mountpoint,
        keep: false,
    })
}

/// Asks the daemon to attach an image, and shows the progress. The daemon takes the attachment back unless the caller mounts it.
pub(super) async fn by_daemon(
    global: &GlobalArgs,
    request: &AttachRequest,
) -> Result<(Client, Offer)> {
    let deadline = Instant::now() + SUCCESSION_TIME;
    let mut was_lost = false;
    loop {
        let client = start::daemon(global).await?;
        let progress = ProgressBars::new(global.json);
        let answer = client
            .attach(request, &|event| progress.event(event))
            .await?;
        progress.finish();
        match answer {
            AttachAnswer::Offer(offer) => return Ok((client, *offer)),
            AttachAnswer::Ending => {}
            // not again and again: it may have been this image that ended it
            AttachAnswer::Lost(error) if was_lost => return Err(error),
            AttachAnswer::Lost(_) => was_lost = true,
        }
        while client.daemon().await?.is_some_and(|it| it.is_ending) {
            if Instant::now() > deadline {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!(
                        "the daemon at {} is shutting down and has not exited within {} s; try again later",
                        global.run_dir.display(),
                        SUCCESSION_TIME.as_secs()
                    ),
                ));
            }
            tokio::time::sleep(ENDING_POLL_INTERVAL).await;
        }
    }
}

/// Mounts the attachment that the daemon holds. After an error nothing is mounted, and so the daemon releases it.
async fn mount(client: &Client, attachment: &Attachment, mountpoint: PathBuf) -> Result<()> {
    let fd = client.mount(&attachment.id).await?;
    kernel::mount::attach(fd.as_fd(), &mountpoint)?;
    drop(fd);
    let mounted = client.mounted(&attachment.id).await;
    if mounted.is_err() {
        // the error of the request is the one to report
        let _ = unmount(std::slice::from_ref(attachment));
    }
    mounted
}

/// Holds an attachment in this process, which answers as a daemon does.
async fn foreground(
    global: &GlobalArgs,
    request: AttachRequest,
    mountpoint: PathBuf,
) -> Result<ExitCode> {
    open_files::raise();
    let mut ends = SignalReceiver::that_end()?;
    let engine = Engine::open(&absolute(&global.root)?, &absolute(&global.run_dir)?).await?;
    // so that `list` and `detach` find the attachment
    let answering = tokio::spawn(Server::bind_for_one(Arc::clone(&engine))?.run());
    let held = hold(global, &engine, request, mountpoint, &mut ends, answering).await;
    engine.end().await;
    held
}

/// Attaches the image in this process, and waits for a signal or an unmount.
async fn hold(
    global: &GlobalArgs,
    engine: &Arc<Engine>,
    request: AttachRequest,
    mountpoint: PathBuf,
    ends: &mut SignalReceiver,
    answering: JoinHandle<Infallible>,
) -> Result<ExitCode> {
    let progress = ProgressBars::new(global.json);
    let event = |event| progress.event(event);
    let attached = tokio::select! {
        attached = engine.attach(request, &event) => attached?,
        _ = ends.next() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    progress.finish();
    let AttachedImage { attachment, mount } = attached;
    let id = &attachment.id;
    kernel::mount::attach(mount.as_fd(), &mountpoint)?;
    drop(mount);
    engine.mounted(id)?;
    output::attached(global.json, &attachment)?;
    tokio::select! {
        _ = ends.next() => engine.detach(id).await?,
        ended = answering => match ended.or_kind(Kind::Io, || "answering on the sockets".into())? {},
        // unmounted, and no process uses what is left after an `umount -l`
        () = engine.wait_ended(id) => engine.release(id).await?,
    }
    Ok(ExitCode::SUCCESS)
}
