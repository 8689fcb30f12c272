//! The devices of disks: one for a disk and a kind, however many attachments use it.

use std::{
    collections::{HashMap, HashSet},
    os::fd::AsFd,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    thread,
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch};

use super::{
    metadata::WatchedDisk,
    request::{DeviceChoice, DeviceKind},
};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{
        blockdev, fuse,
        loopdev::{self, LoopDevice, LoopOptions},
        nbd::{self as kernel_nbd, DeadLinks, LinkEvent, NbdDevice, NbdOptions},
    },
    layer::{Disk, Progress},
    nbd,
    oci::Digest,
};

/// Connections of a kernel nbd device.
const CONNECTIONS: usize = 2;
/// When the kernel drops a connection with an unanswered request: it sends requests again only then, so this bounds the stall after a
/// crash. A fetch that takes longer joins its request again on the next connection.
const NBD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests wait for a new connection when all are dead.
const NBD_DEAD: Duration = Duration::from_secs(60);
/// `read_ahead_kb` of a lazy device: its spans by this number, so that one read in so many costs a span that nobody asked for; and no less
/// than the least.
const SPANS_BY_READ_AHEAD: u64 = 32;
const LEAST_READ_AHEAD_KB: u64 = 32;
/// `read_ahead_kb` of a device whose disk is complete, or will be without being asked: the kernel's usual value.
const READ_AHEAD_KB: u64 = 128;
/// The largest request of an nbd device.
const NBD_MAX_REQUEST_KB: u64 = 1024;

/// How often the watching thread looks whether it is still needed.
const WATCH_TURN: Duration = Duration::from_secs(5);

type Key = (Digest, Digest, DeviceKind);

/// All devices of an engine.
pub(super) struct Devices {
    /// Names the engine in the identifiers of its devices, so that what is left over after a kill is known as its own.
    tag: String,
    runtime: Handle,
    known: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<Weak<Device>>>>>,
    links: Arc<Links>,
}

/// A block device with a layer's disk behind it. It goes when this is dropped; dropping blocks for a few system calls.
pub(super) struct Device {
    disk: Arc<Disk>,
    kind: DeviceKind,
    why: String,
    backing: Backing,
}

enum Backing {
    Loop(LoopDevice),
    // the loop device goes before the file that it stands on
    Fuse(
        LoopDevice,
        #[expect(dead_code, reason = "its threads answer while it lives")] fuse::Server,
        Arc<WatchedDisk>,
    ),
    Nbd(Arc<Link>),
}

impl Device {
    /// The disk behind it.
    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Its kind.
    pub(super) fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Why it is of this kind.
    pub(super) fn why(&self) -> &str {
        &self.why
    }

    /// The kernel's name of it, e.g. `nbd3`.
    pub(super) fn name(&self) -> String {
        match &self.backing {
            Backing::Loop(device) | Backing::Fuse(device, ..) => device.name(),
            Backing::Nbd(link) => link.device.name(),
        }
    }

    /// A path that opens it.
    pub(super) fn path(&self) -> &Path {
        match &self.backing {
            Backing::Loop(device) | Backing::Fuse(device, ..) => device.path(),
            Backing::Nbd(link) => link.device.path(),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        match &self.backing {
            Backing::Loop(_) => {}
            Backing::Fuse(.., watched) => watched.serves_no_more(),
            Backing::Nbd(link) => link.watched.serves_no_more(),
        }
    }
}

impl Devices {
    /// No devices yet. `tag` is part of their identifiers.
    pub(super) fn new(tag: String, runtime: Handle) -> Self {
        Self {
            tag,
            runtime,
            known: Mutex::default(),
            links: Arc::default(),
        }
    }

    /// The start of the identifiers of all devices of engines with this root.
    pub(super) fn identifier_prefix(&self) -> String {
        format!("socinbd-{}-", self.tag)
    }

    /// The paths of the devices that are there now.
    pub(super) fn paths(&self) -> HashSet<PathBuf> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // one that is being made is locked; no record names it yet
        let devices = known
            .values()
            .filter_map(|place| place.try_lock().ok()?.upgrade());
        devices
            .map(|device| Path::new("/dev").join(device.name()))
            .collect()
    }

    /// The identifier that a device of this disk has in the kernel: `socinbd-<tag>-<layer>-<table>`.
    fn identifier(&self, disk: &Disk) -> String {
        format!(
            "{}{}-{}",
            self.identifier_prefix(),
            &disk.layer().digest.hex()[..12],
            &disk.table().hex()[..12]
        )
    }

    /// The device of a disk: the one that is there, or a new one.
    pub(super) async fn get(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        choice: DeviceChoice,
    ) -> Result<Arc<Device>> {
        let (kind, why) = choose(disk, choice)?;
        let place = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|_, place| {
                place
                    .try_lock()
                    .map_or(true, |device| device.strong_count() > 0)
                    || Arc::strong_count(place) > 1
            });
            Arc::clone(
                known
                    .entry((disk.layer().digest, *disk.table(), kind))
                    .or_default(),
            )
        };
        let mut place = place.lock_owned().await;
        if let Some(device) = place.upgrade() {
            return Ok(device);
        }
        let (this, disk) = (Arc::clone(self), Arc::clone(disk));
        let made = tokio::task::spawn_blocking(move || this.make(disk, kind, why)).await;
        let (device, progress) = made.or_kind(Kind::Io, || "making a device".into())??;
        let device = Arc::new(device);
        self.runtime
            .spawn(Device::follow(Arc::downgrade(&device), progress));
        *place = Arc::downgrade(&device);
        Ok(device)
    }

    /// The device, and the progress of its disk since the read-ahead was set.
    fn make(
        &self,
        disk: Arc<Disk>,
        kind: DeviceKind,
        why: String,
    ) -> Result<(Device, watch::Receiver<Progress>)> {
        let backing = match kind {
            DeviceKind::Loop => self.loop_on(&disk, disk.file().as_fd()).map(Backing::Loop),
            DeviceKind::Fuse => self.make_fuse(&disk),
            DeviceKind::Nbd => self.make_nbd(&disk),
        };
        let context = |error: Error| {
            error.context(format!(
                "making a {kind} device for layer {}",
                disk.layer().digest
            ))
        };
        let backing = backing.map_err(context)?;
        let device = Device {
            disk: Arc::clone(&disk),
            kind,
            why,
            backing,
        };
        let progress = device.disk.progress();
        device.set_read_ahead().map_err(context)?;
        Ok((device, progress))
    }

    fn make_fuse(&self, disk: &Arc<Disk>) -> Result<Backing> {
        let watched = Arc::new(WatchedDisk::new(Arc::clone(disk), self.runtime.clone()));
        let served = Arc::clone(&watched);
        let file = fuse::serve(served, &self.identifier(disk), &self.runtime)?;
        let device = self.loop_on(disk, file.file())?;
        watched.serves(device.node());
        Ok(Backing::Fuse(device, file.into_server(), watched))
    }

    fn loop_on(&self, disk: &Disk, file: BorrowedFd<'_>) -> Result<LoopDevice> {
        let options = LoopOptions {
            name: self.identifier(disk),
            ..LoopOptions::default()
        };
        loopdev::attach(file, &options)
    }

    fn make_nbd(&self, disk: &Arc<Disk>) -> Result<Backing> {
        Links::connect(
            &self.links,
            disk,
            self.identifier(disk),
            self.runtime.clone(),
        )
        .map(Backing::Nbd)
    }
}

impl Device {
    /// Set last: other settings reset it.
    fn set_read_ahead(&self) -> Result<()> {
        let largest = (self.kind == DeviceKind::Nbd).then_some(NBD_MAX_REQUEST_KB);
        blockdev::set_read_ahead(&self.name(), largest, read_ahead_kb(&self.disk))
    }

    /// Sets the read-ahead anew whenever the disk's progress changes, as long as the device is there.
    async fn follow(device: Weak<Self>, mut progress: watch::Receiver<Progress>) {
        // an error: the disk is gone, and so is the device
        while progress.changed().await.is_ok() {
            let Some(device) = device.upgrade() else {
                return;
            };
            // the largest request stays: setting it would wait for all requests in flight, and hold up the others meanwhile
            let set =
                move || blockdev::set_read_ahead(&device.name(), None, read_ahead_kb(&device.disk));
            let set = tokio::task::spawn_blocking(set).await;
            if let Ok(Err(error)) = set {
                tracing::warn!("a device keeps its read-ahead: {}", error.report());
            }
        }
    }
}

/// The `read_ahead_kb` that a device of this disk should have.
fn read_ahead_kb(disk: &Disk) -> u64 {
    match *disk.progress().borrow() {
        Progress::Lazy => (disk.mean_span_bytes() / SPANS_BY_READ_AHEAD / 1024)
            .clamp(LEAST_READ_AHEAD_KB, READ_AHEAD_KB),
        Progress::Filling | Progress::Complete => READ_AHEAD_KB,
    }
}

fn choose(disk: &Disk, choice: DeviceChoice) -> Result<(DeviceKind, String)> {
    let (kind, why) = match choice {
        DeviceChoice::Auto if disk.is_complete() => (DeviceKind::Loop, "the disk is complete"),
        DeviceChoice::Auto => match (disk.is_full(), kernel_nbd::is_available()) {
            (false, true) => (DeviceKind::Nbd, "spans are absent, and this kernel has nbd"),
            (false, false) => (
                DeviceKind::Fuse,
                "spans are absent, and this kernel has no nbd",
            ),
            (true, true) => (
                DeviceKind::Nbd,
                "the layer has not been checked as a whole, and this kernel has nbd",
            ),
            (true, false) => (
                DeviceKind::Fuse,
                "the layer has not been checked as a whole, and this kernel has no nbd",
            ),
        },
        DeviceChoice::Loop if !disk.is_complete() => {
            let (present, all) = disk.span_counts();
            let checked = match disk.is_full() {
                true => ", and the layer has not been checked as a whole",
                false => "",
            };
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "layer {}: {present} of {all} spans are present{checked}; a loop device needs a complete disk; use --device auto",
                    disk.layer().digest
                ),
            ));
        }
        DeviceChoice::Loop => (DeviceKind::Loop, "asked for"),
        DeviceChoice::Nbd => (DeviceKind::Nbd, "asked for"),
        DeviceChoice::Fuse => (DeviceKind::Fuse, "asked for"),
    };
    Ok((kind, why.to_owned()))
}

/// The nbd devices of an engine, and the thread that gives a device new connections when the kernel has dropped its old ones.
#[derive(Default)]
struct Links {
    by_index: Mutex<HashMap<u32, Weak<Link>>>,
    watching: OnceLock<()>,
}

/// A connected nbd device.
struct Link {
    device: NbdDevice,
    options: NbdOptions,
    disk: Arc<Disk>,
    watched: Arc<WatchedDisk>,
    runtime: Handle,
}

impl Links {
    fn connect(
        links: &Arc<Self>,
        disk: &Arc<Disk>,
        identifier: String,
        runtime: Handle,
    ) -> Result<Arc<Link>> {
        links.watch()?;
        let watched = Arc::new(WatchedDisk::new(Arc::clone(disk), runtime.clone()));
        let sockets = connections(&watched, &runtime)?;
        let options = NbdOptions {
            timeout: NBD_TIMEOUT,
            dead: NBD_DEAD,
            backend_id: identifier,
        };
        let device = kernel_nbd::connect(disk.size(), &sockets, &options)?;
        watched.serves(device.node());
        let index = device.index();
        let link = Arc::new(Link {
            device,
            options,
            disk: Arc::clone(disk),
            watched,
            runtime,
        });
        let mut by_index = links.known();
        by_index.retain(|_, link| link.strong_count() > 0);
        by_index.insert(index, Arc::downgrade(&link));
        Ok(link)
    }

    /// Starts the watching thread, once. It ends with the process.
    fn watch(self: &Arc<Self>) -> Result<()> {
        if self.watching.get().is_some() {
            return Ok(());
        }
        let mut dead = DeadLinks::watch()?;
        if self.watching.set(()).is_err() {
            return Ok(());
        }
        let links = Arc::downgrade(self);
        let watch = move || {
            while let Some(links) = links.upgrade() {
                match dead.next(Some(WATCH_TURN)) {
                    Ok(events) => links.mend(&events),
                    Err(error) => {
                        tracing::error!(
                            "nbd's connections are not watched any more: {}",
                            error.report()
                        );
                        return;
                    }
                }
            }
        };
        let started = thread::Builder::new().name("nbd-links".into()).spawn(watch);
        started
            .map(drop)
            .or_kind(Kind::Io, || "starting the thread that watches nbd".into())
    }

    fn mend(&self, events: &[LinkEvent]) {
        let mut dead: Vec<u32> = Vec::new();
        for event in events {
            match event {
                LinkEvent::Dead(index) => dead.push(*index),
                LinkEvent::Lost => dead.extend(self.known().keys()),
            }
        }
        dead.sort_unstable();
        dead.dedup();
        for index in dead {
            let link = self.known().get(&index).and_then(Weak::upgrade);
            if let Some(link) = link {
                let mended = link.reconnect().and_then(|()| link.check_read_ahead());
                match mended {
                    Ok(()) => tracing::info!(
                        device = index,
                        "an nbd connection was dropped and is replaced"
                    ),
                    Err(error) => {
                        tracing::error!(
                            device = index,
                            "replacing an nbd connection: {}",
                            error.report()
                        );
                    }
                }
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Weak<Link>>> {
        self.by_index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Offers the kernel as many connections as a device has; it takes what replaces dead ones, and the rest end at once.
    fn reconnect(&self) -> Result<()> {
        let sockets = connections(&self.watched, &self.runtime)?;
        kernel_nbd::reconfigure(self.device.index(), &sockets, &self.options)
    }

    /// Sets the read-ahead again where something has changed it.
    fn check_read_ahead(self: &Arc<Self>) -> Result<()> {
        let wanted = read_ahead_kb(&self.disk);
        if blockdev::read_ahead(&self.device.name())? == wanted {
            return Ok(());
        }
        let link = Arc::clone(self);
        let set = move || {
            let name = link.device.name();
            match blockdev::set_read_ahead(&name, Some(NBD_MAX_REQUEST_KB), wanted) {
                Ok(()) => {
                    tracing::info!(name, wanted, "the read-ahead had changed; it is set again")
                }
                Err(error) => tracing::warn!("{}", error.report()),
            }
        };
        // The kernel first waits for the requests in flight, and these may need another new connection from the thread that calls this.
        let started = thread::Builder::new()
            .name("nbd-read-ahead".into())
            .spawn(set);
        started.map(drop).or_kind(Kind::Io, || {
            "starting a thread that sets the read-ahead".into()
        })
    }
}

/// Socket pairs with a serving thread on our end each; the kernel's ends.
fn connections(disk: &Arc<WatchedDisk>, runtime: &Handle) -> Result<Vec<OwnedFd>> {
    (0..CONNECTIONS)
        .map(|_| {
            let (kernel, ours) = kernel_nbd::socket_pair()?;
            let (disk, runtime) = (Arc::clone(disk), runtime.clone());
            let serve = move || {
                if let Err(error) = nbd::transmission(ours, disk, &runtime) {
                    tracing::debug!(%error, "a connection to the kernel ended");
                }
            };
            let started = thread::Builder::new().name("nbd-serve".into()).spawn(serve);
            started.or_kind(Kind::Io, || "starting a thread that serves a device".into())?;
            Ok(kernel)
        })
        .collect()
}
