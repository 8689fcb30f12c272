//! Block devices of disks: one per disk and kind, shared by all attachments that use it.
//!
//! A complete disk does not need the daemon. So where the kernel has a device mapper, the mounted device is a mapped device whose reads go
//! to the device that the daemon serves. When the disk is complete, the reads of the mapped device are redirected to a loop device on the
//! disk, under the mounted file system. From then on the kernel reads the image alone, whether or not the daemon runs.

mod adopt;
mod backing;
mod choice;
mod fuse_files;
pub(crate) mod kept;
pub(crate) mod kernel_readahead;
pub(crate) mod metadata_readahead;
pub(crate) mod nbd_connections;
pub(crate) mod servers;

use std::{
    collections::{HashMap, HashSet},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch};

use self::{
    backing::DeviceBacking,
    choice::{Choice, choose, moved},
    fuse_files::FuseDevice,
    kept::KeptDescriptors,
    metadata_readahead::WatchedDisk,
    nbd_connections::NbdLinks,
    servers::{Servers, Serving},
};
use super::{
    names::random_digits,
    types::{DeviceChoice, DeviceKind},
};
use crate::{
    blocking::blocking,
    error::Result,
    kernel::{
        blockdev::{self, Node},
        dm::{self, MappedDevice},
        loopdev::{self, LoopDevice, LoopOptions},
    },
    layer::{Disk, DiskKey, DiskProgress, SpanHold},
};

/// Identifies a device: the disk, the kind of the device when it was made, and whether it may move to a loop device later.
type DeviceKey = (DiskKey, DeviceKind, bool);

/// Interval for polling a dropped device that is still in use.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// All devices of an engine.
pub(crate) struct Devices {
    /// Part of the identifiers of all devices of this engine. After a kill it shows which kernel devices belong to this root.
    tag: String,
    /// Whether all reads must go through the daemon, even those of complete disks (for `record`).
    sees_all: bool,
    runtime: Handle,
    by_disk: Mutex<HashMap<DeviceKey, Arc<tokio::sync::Mutex<Weak<Device>>>>>,
    serving: Serving,
    links: Arc<NbdLinks>,
}

/// A block device that serves a layer's disk. Dropping it releases the kernel device, or, if the device is in use, releases it when it
/// becomes idle. Dropping blocks for a few system calls.
pub(crate) struct Device(Arc<ServedDevice>);

struct ServedDevice {
    disk: Arc<Disk>,
    /// Kernel name of the device that is mounted.
    name: String,
    node: Arc<Node>,
    /// The kind of the device when it was made.
    kind: DeviceKind,
    why: String,
    backing: Option<PathBuf>,
    has_moved: AtomicBool,
    watched: Option<Arc<WatchedDisk>>,
    /// The kernel devices; `None` after they were released.
    stack: Mutex<Option<DeviceStack>>,
    runtime: Handle,
}

/// The kernel devices of one device. Drop order: the mapped device before the device that it reads from.
struct DeviceStack {
    mapped: Option<MappedDevice>,
    backing: DeviceBacking,
}

impl Device {
    /// The disk that the device serves.
    pub(crate) fn disk(&self) -> &Arc<Disk> {
        &self.0.disk
    }

    /// The kind of device that answers reads now.
    pub(crate) fn kind(&self) -> DeviceKind {
        match self.0.has_moved.load(Ordering::Acquire) {
            true => DeviceKind::Loop,
            false => self.0.kind,
        }
    }

    /// Why the device is of this kind.
    pub(crate) fn why(&self) -> String {
        match self.0.has_moved.load(Ordering::Acquire) {
            true => moved(&self.0.why),
            false => self.0.why.clone(),
        }
    }

    /// Kernel name, e.g. `nbd3`.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// Path for opening the device.
    pub(crate) fn path(&self) -> &Path {
        self.0.node.path()
    }

    /// Whether other processes can open it, at the same path.
    pub(super) fn has_public_node(&self) -> bool {
        self.path() == self.shown_path()
    }

    /// Path for messages: `/dev/<name>`.
    pub(super) fn shown_path(&self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }

    /// The kernel's devices at the moment: the one that is mounted, and the one that its reads go to if it is a mapped device.
    pub(in crate::engine) fn kernel_paths(&self) -> Vec<PathBuf> {
        let backing = self.0.stack().as_ref().map(|stack| stack.backing.name());
        let backing = backing.filter(|name| name != self.name());
        let backing = backing.map(|name| Path::new("/dev").join(name));
        [self.shown_path()].into_iter().chain(backing).collect()
    }

    /// Whether a mount or another exclusive user holds the device.
    pub(super) fn is_in_use(&self) -> bool {
        blockdev::is_in_use(self.path())
    }

    /// For a mapped device: the device that its reads went to when it was made.
    pub(super) fn backing(&self) -> Option<PathBuf> {
        self.0.backing.clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.is_in_use() {
            return self.0.give_back();
        }
        // reads of absent data would fail without the daemon
        tracing::warn!(
            device = self.0.name,
            "the device is still in use after its last attachment; it is released when it is idle"
        );
        let served = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            while blockdev::is_in_use(served.node.path()) {
                tokio::time::sleep(IDLE_POLL_INTERVAL).await;
            }
            let released = blocking(move || {
                served.give_back();
                Ok(())
            });
            let _ = released.await; // fails only when the process ends
        });
    }
}

impl Devices {
    /// An empty set of devices. `tag` is part of their identifiers. With `sees_all` no device moves away from the daemon.
    pub(crate) fn new(
        tag: String,
        sees_all: bool,
        kept: Arc<KeptDescriptors>,
        runtime: Handle,
    ) -> Self {
        let serving = Serving::new(kept, runtime.clone());
        Self {
            tag,
            sees_all,
            runtime,
            by_disk: Mutex::default(),
            links: Arc::new(NbdLinks::new(serving.clone())),
            serving,
        }
    }

    /// The threads that serve them.
    pub(super) fn servers(&self) -> &Arc<Servers> {
        &self.serving.servers
    }

    /// What survives this daemon.
    pub(super) fn kept(&self) -> &KeptDescriptors {
        &self.serving.kept
    }

    /// Ends the connections of the daemon before that no device has taken; see [`KeptDescriptors::end_rest`].
    pub(super) fn end_unadopted(&self) -> HashSet<PathBuf> {
        self.serving.kept.end_rest()
    }

    /// Common prefix of the identifiers of all devices of engines with this root.
    pub(super) fn identifier_prefix(&self) -> String {
        format!("socinbd-{}-", self.tag)
    }

    /// Paths of all existing devices.
    pub(super) fn paths(&self) -> HashSet<PathBuf> {
        let by_disk = self.by_disk.lock().unwrap_or_else(PoisonError::into_inner);
        // a device that is being made is locked, and no record names it yet
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

    /// Identifier of a disk's device in the kernel: `socinbd-<tag>-<layer>-<table>`.
    fn identifier(&self, disk: &Disk) -> String {
        format!(
            "{}{}-{}",
            self.identifier_prefix(),
            &disk.layer().digest.hex()[..12],
            &disk.table().hex()[..12]
        )
    }

    /// Returns the existing device of a disk, or makes one.
    pub(crate) async fn get(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        choice: DeviceChoice,
    ) -> Result<Arc<Device>> {
        let Choice { kind, why, hold } = choose(disk, choice)?;
        if choice == DeviceChoice::Auto
            && kind == DeviceKind::Loop
            && let Some(device) = self.moved(disk)
        {
            return Ok(device);
        }
        // as `adopt` finds it after a restart
        let may_move = choice == DeviceChoice::Auto
            && kind != DeviceKind::Loop
            && !self.sees_all
            && dm::is_available();
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
        // subscribed before the device is made, so that no change is missed
        let progress = disk.progress();
        let (this, disk) = (Arc::clone(self), Arc::clone(disk));
        let device = blocking(move || {
            let context = format!("making a {kind} device for layer {}", disk.layer().digest);
            this.make(disk, kind, why, hold, may_move)
                .map_err(|error| error.context(context))
        });
        let device = Arc::new(device.await?);
        let served = Arc::downgrade(&device.0);
        self.runtime
            .spawn(follow(served, Arc::clone(self), progress));
        *place = Arc::downgrade(&device);
        Ok(device)
    }

    /// A device that was made before its disk was complete and has moved to a loop device since. Sharing it shares its mounts and its page
    /// cache.
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
        hold: Option<SpanHold>,
        may_move: bool,
    ) -> Result<Device> {
        let watched = || Arc::new(WatchedDisk::new(Arc::clone(&disk), self.runtime.clone()));
        let (backing, watched) = match kind {
            DeviceKind::Loop => {
                let hold = hold.unwrap_or_else(|| disk.hold_spans()); // `choose` has it
                let device = self.loop_on(&disk)?;
                (
                    DeviceBacking::Loop {
                        device,
                        _hold: hold,
                    },
                    None,
                )
            }
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
        let mapped = match may_move {
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
            watched.set_device(node);
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
        FuseDevice::make(&self.serving, watched, &self.identifier(disk)).map(DeviceBacking::Fuse)
    }

    fn loop_on(&self, disk: &Disk) -> Result<LoopDevice> {
        let options = LoopOptions {
            name: self.identifier(disk),
            ..LoopOptions::default()
        };
        loopdev::attach(disk.file().as_fd(), &options)
    }

    fn make_nbd(&self, disk: &Arc<Disk>, watched: &Arc<WatchedDisk>) -> Result<DeviceBacking> {
        let identifier = self.identifier(disk);
        NbdLinks::connect(&self.links, disk, watched, identifier).map(DeviceBacking::Nbd)
    }

    /// Makes a mapped device. `None` if that fails: the backing device is then mounted directly.
    fn map(&self, disk: &Disk, backing: &DeviceBacking) -> Option<MappedDevice> {
        let mapped = random_digits().and_then(|digits| {
            // a daemon that died may have left a mapped device of the same disk
            let name = format!("{}-{digits}", self.identifier(disk));
            MappedDevice::new(&name, &backing.name(), disk.size())
        });
        mapped
            .inspect_err(|error| {
                tracing::warn!(
                    layer = %disk.layer().digest,
                    "the device will need the daemon even when its disk is complete: {}",
                    error.report()
                );
            })
            .ok()
    }
}

impl ServedDevice {
    fn give_back(&self) {
        if let Some(watched) = &self.watched {
            watched.close_device();
        }
        drop(self.stack().take());
    }

    fn stack(&self) -> MutexGuard<'_, Option<DeviceStack>> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adapts the device to the progress of its disk: moves it to a loop device, sets its read-ahead.
    fn progressed(&self, devices: &Devices) -> Result<()> {
        let mut stack = self.stack();
        let Some(stack) = &mut *stack else {
            return Ok(());
        };
        if self.disk.is_complete() {
            self.move_to_loop(stack, devices)?;
        }
        // The maximum request size is not set again: the kernel would first wait for all requests in flight and block new ones.
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
        let Some(hold) = self.disk.hold_for_loop() else {
            return Ok(());
        };
        let device = devices.loop_on(&self.disk)?;
        mapped.move_to(&device.name(), self.disk.size())?;
        self.has_moved.store(true, Ordering::Release);
        if let Some(watched) = &self.watched {
            watched.close_device();
        }
        stack.backing = DeviceBacking::Loop {
            device,
            _hold: hold,
        };
        tracing::info!(
            layer = %self.disk.layer().digest,
            device = self.name,
            "the disk is complete; its device does not need the daemon any more"
        );
        Ok(())
    }
}

/// Adapts the device whenever the progress of its disk changes, until the device is dropped.
async fn follow(
    served: Weak<ServedDevice>,
    devices: Arc<Devices>,
    mut progress: watch::Receiver<DiskProgress>,
) {
    loop {
        // first as it is: the daemon before this one may have died before it has adapted the device
        let Some(served) = served.upgrade() else {
            return;
        };
        let devices = Arc::clone(&devices);
        if let Err(error) = blocking(move || served.progressed(&devices)).await {
            tracing::warn!(
                "cannot adapt a device to the state of its disk: {}",
                error.report()
            );
        }
        // an error means that the disk was dropped, and so was the device
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// Sets the maximum request size, then the read-ahead: setting the former resets the latter.
fn set_read_ahead(backing: &DeviceBacking, disk: &Disk) {
    let largest = match backing {
        DeviceBacking::Nbd(link) => Some(link.largest_request_kb()),
        DeviceBacking::Loop { .. } | DeviceBacking::Fuse(..) => None,
    };
    kernel_readahead::set(&backing.name(), largest, kernel_readahead::of(disk));
}

#[cfg(test)]
mod tests;
