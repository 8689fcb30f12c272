//! The devices of disks: one for a disk and a kind, however many attachments use it.
//!
//! A device whose disk becomes complete needs no daemon any more. So where the kernel has a device mapper, what is mounted is a device of
//! its own, whose reads go on to the one that the daemon answers; and when the disk is complete they go to a loop device on it instead,
//! under the mounted file system. From then on the image is read at the kernel's own speed, whatever becomes of the daemon.

mod choice;
pub(crate) mod kernel_readahead;
pub(crate) mod metadata_readahead;
pub(crate) mod nbd_connections;

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch};

use self::{
    choice::choose,
    metadata_readahead::WatchedDisk,
    nbd_connections::{NbdLink, NbdLinks},
};
use super::{
    names::random_digits,
    types::{AttachedLayer, Attachment, DeviceChoice, DeviceKind},
};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::{
        blockdev::{self, Node},
        dm::{self, MappedDevice},
        fuse,
        loopdev::{self, LoopDevice, LoopOptions},
    },
    layer::{Disk, DiskKey, Progress},
};

/// A disk, what answers at first, and whether that may change.
type DeviceKey = (DiskKey, DeviceKind, bool);

/// How often a device that is in use when nothing needs it any more is looked at.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// All devices of an engine.
pub(crate) struct Devices {
    /// Names the engine in the identifiers of its devices, so that what is left over after a kill is known as its own.
    tag: String,
    /// The daemon is to see every read, also of a disk that has become complete.
    sees_all: bool,
    runtime: Handle,
    by_disk: Mutex<HashMap<DeviceKey, Arc<tokio::sync::Mutex<Weak<Device>>>>>,
    links: Arc<NbdLinks>,
}

/// A block device with a layer's disk behind it. It goes when this is dropped, or, if something uses it then, when nothing does any more;
/// dropping blocks for a few system calls.
pub(crate) struct Device(Arc<ServedDevice>);

struct ServedDevice {
    disk: Arc<Disk>,
    /// The kernel's name of what is mounted.
    name: String,
    node: Arc<Node>,
    /// What answers it, at first.
    kind: DeviceKind,
    why: String,
    backing: Option<PathBuf>,
    has_moved: AtomicBool,
    watched: Option<Arc<WatchedDisk>>,
    /// What it stands on; none once it has been given back.
    stack: Mutex<Option<DeviceStack>>,
    runtime: Handle,
}

/// What stands above goes before what is below it.
struct DeviceStack {
    mapped: Option<MappedDevice>,
    backing: DeviceBacking,
}

enum DeviceBacking {
    Loop(LoopDevice),
    // the loop device goes before the file that it stands on
    Fuse(
        LoopDevice,
        #[expect(dead_code, reason = "its threads answer while it lives")] fuse::Server,
    ),
    Nbd(Arc<NbdLink>),
}

impl DeviceBacking {
    fn name(&self) -> String {
        match self {
            Self::Loop(device) | Self::Fuse(device, ..) => device.name(),
            Self::Nbd(link) => link.device().name(),
        }
    }

    fn node(&self) -> &Arc<Node> {
        match self {
            Self::Loop(device) | Self::Fuse(device, ..) => device.node(),
            Self::Nbd(link) => link.device().node(),
        }
    }
}

impl Device {
    /// The disk behind it.
    pub(crate) fn disk(&self) -> &Arc<Disk> {
        &self.0.disk
    }

    /// What answers its reads now.
    pub(crate) fn kind(&self) -> DeviceKind {
        match self.0.has_moved.load(Ordering::Acquire) {
            true => DeviceKind::Loop,
            false => self.0.kind,
        }
    }

    /// Why it is of this kind.
    pub(crate) fn why(&self) -> String {
        match self.0.has_moved.load(Ordering::Acquire) {
            true => moved(&self.0.why),
            false => self.0.why.clone(),
        }
    }

    /// The kernel's name of it, e.g. `nbd3`.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// A path that opens it.
    pub(crate) fn path(&self) -> &Path {
        self.0.node.path()
    }

    /// The path by which people know it.
    pub(super) fn shown_path(&self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }

    /// Whether something (a mount) has it for itself.
    pub(super) fn is_in_use(&self) -> bool {
        blockdev::is_in_use(self.path())
    }

    /// The device that its reads went on to at first, where it is one of the device mapper.
    pub(super) fn backing(&self) -> Option<PathBuf> {
        self.0.backing.clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.is_in_use() {
            return self.0.give_back();
        }
        // whoever reads it would get errors for what is absent
        tracing::warn!(
            device = self.0.name,
            "nothing needs it any more, and it is in use; it goes when it is idle"
        );
        let served = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            while blockdev::is_in_use(served.node.path()) {
                tokio::time::sleep(IDLE_POLL_INTERVAL).await;
            }
            tokio::task::spawn_blocking(move || served.give_back());
        });
    }
}

impl Devices {
    /// No devices yet. `tag` is part of their identifiers. With `sees_all` none moves away from the daemon.
    pub(crate) fn new(tag: String, sees_all: bool, runtime: Handle) -> Self {
        Self {
            tag,
            sees_all,
            runtime,
            by_disk: Mutex::default(),
            links: Arc::default(),
        }
    }

    /// The start of the identifiers of all devices of engines with this root.
    pub(super) fn identifier_prefix(&self) -> String {
        format!("socinbd-{}-", self.tag)
    }

    /// The paths of the devices that are there now.
    pub(super) fn paths(&self) -> HashSet<PathBuf> {
        let by_disk = self.by_disk.lock().unwrap_or_else(PoisonError::into_inner);
        // one that is being made is locked; no record names it yet
        let devices = by_disk
            .values()
            .filter_map(|place| place.try_lock().ok()?.upgrade());
        devices
            .flat_map(|device| {
                let backing = device.0.stack().as_ref().map(|stack| stack.backing.name());
                [Some(device.name().to_owned()), backing]
            })
            .flatten()
            .map(|name| Path::new("/dev").join(name))
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
    pub(crate) async fn get(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        choice: DeviceChoice,
    ) -> Result<Arc<Device>> {
        let (kind, why) = choose(disk, choice)?;
        if choice == DeviceChoice::Auto
            && kind == DeviceKind::Loop
            && let Some(device) = self.moved(disk)
        {
            return Ok(device);
        }
        let may_move = choice == DeviceChoice::Auto && kind != DeviceKind::Loop && !self.sees_all;
        let place = {
            let mut by_disk = self.by_disk.lock().unwrap_or_else(PoisonError::into_inner);
            by_disk.retain(|_, place| {
                place
                    .try_lock()
                    .map_or(true, |device| device.strong_count() > 0)
                    || Arc::strong_count(place) > 1
            });
            Arc::clone(by_disk.entry((disk.key(), kind, may_move)).or_default())
        };
        let mut place = place.lock_owned().await;
        if let Some(device) = place.upgrade() {
            return Ok(device);
        }
        // what comes to pass from here on is followed
        let progress = disk.progress();
        let (this, disk) = (Arc::clone(self), Arc::clone(disk));
        let made = tokio::task::spawn_blocking(move || {
            let context = format!("making a {kind} device for layer {}", disk.layer().digest);
            this.make(disk, kind, why, may_move)
                .map_err(|error| error.context(context))
        });
        let device = Arc::new(
            made.await
                .or_kind(Kind::Io, || "making a device".into())??,
        );
        let served = Arc::downgrade(&device.0);
        self.runtime
            .spawn(follow(served, Arc::clone(self), progress));
        *place = Arc::downgrade(&device);
        Ok(device)
    }

    /// The device of a complete disk that was made before it was complete, if there is one: its pages are in memory, and what is mounted
    /// of it is mounted once.
    fn moved(&self, disk: &Disk) -> Option<Arc<Device>> {
        let by_disk = self.by_disk.lock().unwrap_or_else(PoisonError::into_inner);
        [DeviceKind::Nbd, DeviceKind::Fuse]
            .into_iter()
            .filter_map(|kind| by_disk.get(&(disk.key(), kind, true)))
            .filter_map(|place| place.try_lock().ok()?.upgrade())
            .find(|device| device.kind() == DeviceKind::Loop)
    }

    fn make(
        &self,
        disk: Arc<Disk>,
        kind: DeviceKind,
        why: String,
        may_move: bool,
    ) -> Result<Device> {
        let watched = || Arc::new(WatchedDisk::new(Arc::clone(&disk), self.runtime.clone()));
        let (backing, watched) = match kind {
            DeviceKind::Loop => (
                DeviceBacking::Loop(self.loop_on(&disk, disk.file().as_fd())?),
                None,
            ),
            DeviceKind::Fuse => {
                let watched = watched();
                (self.make_fuse(&disk, &watched)?, Some(watched))
            }
            DeviceKind::Nbd => {
                let watched = watched();
                (self.make_nbd(&disk, &watched)?, Some(watched))
            }
        };
        set_read_ahead(&backing, &disk);
        let mapped = match may_move && dm::is_available() {
            true => self.map(&disk, &backing),
            false => None,
        };
        let (name, node) = mapped.as_ref().map_or_else(
            || (backing.name(), backing.node()),
            |mapped| (mapped.name(), mapped.node()),
        );
        if mapped.is_some() {
            kernel_readahead::set(&name, None, kernel_readahead::of(&disk));
        }
        if let Some(watched) = &watched {
            watched.serves(node);
        }
        Ok(Device(Arc::new(ServedDevice {
            name,
            node: Arc::clone(node),
            kind,
            why,
            backing: mapped
                .is_some()
                .then(|| Path::new("/dev").join(backing.name())),
            has_moved: AtomicBool::new(false),
            watched,
            stack: Mutex::new(Some(DeviceStack { mapped, backing })),
            runtime: self.runtime.clone(),
            disk,
        })))
    }

    fn make_fuse(&self, disk: &Arc<Disk>, watched: &Arc<WatchedDisk>) -> Result<DeviceBacking> {
        let served = Arc::clone(watched);
        let file = fuse::serve(served, &self.identifier(disk), &self.runtime)?;
        let device = self.loop_on(disk, file.file())?;
        Ok(DeviceBacking::Fuse(device, file.into_server()))
    }

    fn loop_on(&self, disk: &Disk, file: BorrowedFd<'_>) -> Result<LoopDevice> {
        let options = LoopOptions {
            name: self.identifier(disk),
            ..LoopOptions::default()
        };
        loopdev::attach(file, &options)
    }

    fn make_nbd(&self, disk: &Arc<Disk>, watched: &Arc<WatchedDisk>) -> Result<DeviceBacking> {
        let identifier = self.identifier(disk);
        let runtime = self.runtime.clone();
        NbdLinks::connect(&self.links, disk, watched, identifier, runtime).map(DeviceBacking::Nbd)
    }

    /// A device of the device mapper, where one can be had; the disk is as well served without.
    fn map(&self, disk: &Disk, backing: &DeviceBacking) -> Option<MappedDevice> {
        let mapped = random_digits().and_then(|digits| {
            // of a daemon that died there may be another one for the same disk
            let name = format!("{}-{digits}", self.identifier(disk));
            MappedDevice::new(&name, &backing.name(), disk.size())
        });
        mapped
            .inspect_err(|error| {
                tracing::warn!(
                    layer = %disk.layer().digest,
                    "the device stays with the daemon also when its disk is complete: {}",
                    error.report()
                );
            })
            .ok()
    }
}

impl ServedDevice {
    fn give_back(&self) {
        if let Some(watched) = &self.watched {
            watched.serves_no_more();
        }
        drop(self.stack().take());
    }

    fn stack(&self) -> MutexGuard<'_, Option<DeviceStack>> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what the disk's progress asks for.
    fn progressed(&self, devices: &Devices) -> Result<()> {
        let mut stack = self.stack();
        let Some(stack) = &mut *stack else {
            return Ok(());
        };
        if self.disk.is_complete() {
            self.move_to_loop(stack, devices)?;
        }
        // the largest request stays: setting it would wait for all requests in flight, and hold up the others meanwhile
        let kb = kernel_readahead::of(&self.disk);
        kernel_readahead::set(&stack.backing.name(), None, kb);
        if stack.mapped.is_some() {
            kernel_readahead::set(&self.name, None, kb);
        }
        Ok(())
    }

    fn move_to_loop(&self, stack: &mut DeviceStack, devices: &Devices) -> Result<()> {
        let Some(mapped) = &stack.mapped else {
            return Ok(());
        };
        if self.has_moved.load(Ordering::Acquire) {
            return Ok(());
        }
        let device = devices.loop_on(&self.disk, self.disk.file().as_fd())?;
        mapped.move_to(&device.name(), self.disk.size())?;
        self.has_moved.store(true, Ordering::Release);
        if let Some(watched) = &self.watched {
            watched.serves_no_more();
        }
        stack.backing = DeviceBacking::Loop(device);
        tracing::info!(
            layer = %self.disk.layer().digest,
            device = self.name,
            "the disk is complete, and is read without the daemon"
        );
        Ok(())
    }
}

impl Attachment {
    /// As [`as_found`], for all its layers.
    pub(super) fn with_devices_found(mut self) -> Self {
        self.layers = self.layers.into_iter().map(as_found).collect();
        self
    }
}

/// The layer as its record has it, with the device as it is found: after its daemon has died, one that had become complete is a loop device.
fn as_found(mut layer: AttachedLayer) -> AttachedLayer {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let was = layer.backing.as_deref().and_then(name);
    let below = name(&layer.device_path).map_or_else(Vec::new, |name| dm::below(&name));
    if was.is_some_and(|was| {
        below
            .iter()
            .any(|now| now.starts_with("loop") && *now != was)
    }) {
        layer.device = DeviceKind::Loop;
        layer.why = moved(&layer.why);
    }
    layer
}

fn moved(why: &str) -> String {
    format!("the disk has become complete; before that: {why}")
}

/// Does what the disk's progress asks for whenever that changes, as long as the device is there.
async fn follow(
    served: Weak<ServedDevice>,
    devices: Arc<Devices>,
    mut progress: watch::Receiver<Progress>,
) {
    // an error: the disk is gone, and so is the device
    while progress.changed().await.is_ok() {
        let Some(served) = served.upgrade() else {
            return;
        };
        let devices = Arc::clone(&devices);
        let done = tokio::task::spawn_blocking(move || served.progressed(&devices)).await;
        if let Ok(Err(error)) = done {
            tracing::warn!("a device stays as it is: {}", error.report());
        }
    }
}

/// Sets what the kernel asks for, the read-ahead last: other settings reset it.
fn set_read_ahead(backing: &DeviceBacking, disk: &Disk) {
    let largest =
        matches!(backing, DeviceBacking::Nbd(_)).then_some(nbd_connections::MAX_REQUEST_KB);
    kernel_readahead::set(&backing.name(), largest, kernel_readahead::of(disk));
}

#[cfg(test)]
mod tests;
