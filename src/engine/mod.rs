//! Attach, detach, restore: the way of control.
//!
//! image reference -> manifest for the platform -> SOCI index -> zTOC of each layer -> disk -> device -> ext4 mount -> overlay

mod attach;
pub mod cat;
pub mod chosen;
pub mod compact;
pub mod companions;
pub mod convert;
pub mod create;
pub mod describe;
mod devices;
pub mod discovery;
pub mod disks;
pub mod gc;
mod graph;
pub mod image;
mod known;
mod links;
pub mod local;
mod metadata;
mod naming;
mod new_compact;
mod prefetch;
pub mod promote;
pub mod push;
mod read_ahead;
mod records;
mod request;
mod stack;
pub mod tables;
mod why;
mod ztocs;

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::Notify};

pub use attach::Attached;
pub use disks::Disks;
pub use image::Image;
pub use records::Records;
pub use request::{
    AttachRequest, AttachedLayer, Attachment, AttachmentStatus, Basis, DeviceChoice, DeviceKind,
    Event, State, UsedIndex,
};
pub use why::{Explanation, LayerExplanation};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{self, busy, loopdev, mountinfo, nbd as kernel_nbd},
    layer::{self, Progress, SourceDown},
    oci::Digest,
};
use devices::{Device, Devices};

/// How often a caller looks whether another one is done with an attachment.
const CHANGE_TURN: Duration = Duration::from_millis(2);
/// How often a foreground attachment looks whether it is still mounted.
const UNMOUNT_TURN: Duration = Duration::from_millis(200);

/// How long devices may take to become idle after the unmount.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// One root and one run directory, with all that is attached from them. One process has them, by locks.
pub struct Engine {
    root: PathBuf,
    run_dir: PathBuf,
    disks: Disks,
    devices: Arc<Devices>,
    records: Records,
    live: Mutex<HashMap<String, Live>>,
    /// Attachments that are being made or given back: they have a record, and need not be live.
    changing: Mutex<HashSet<String>>,
    _lock: fs::File,
}

/// An attachment that this process serves.
struct Live {
    attachment: Attachment,
    devices: Vec<Arc<Device>>,
    /// The number of the overlay's file system (`st_dev`), major and minor.
    mount_device: (u32, u32),
    /// Told when the caller has mounted it.
    mounted: Arc<Notify>,
    is_mounted: bool,
}

impl Engine {
    /// Opens root and run directory (made 0700 where missing), and clears away what an engine that died has left and nobody uses.
    pub async fn open(root: &Path, run_dir: &Path) -> Result<Self> {
        Self::open_with(root, run_dir, layer::Options::default()).await
    }

    /// As [`Engine::open`], with a store that works otherwise.
    pub async fn open_with(root: &Path, run_dir: &Path, options: layer::Options) -> Result<Self> {
        let (root, run_dir) = (folder(root)?, folder(run_dir)?);
        let lock_path = run_dir.join("lock");
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path);
        let lock = lock.or_kind(Kind::Io, || format!("opening {}", lock_path.display()))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "another daemon works in {}; talk to it, or give this one a --run-dir and a --root of its own",
                    run_dir.display()
                ),
            ));
        }
        let sees_all = options.record;
        let disks = Disks::open_with(&root, options)?;
        let tag = Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..8].to_owned();
        let records = Records::open(&run_dir)?;
        let engine = Self {
            devices: Arc::new(Devices::new(tag, sees_all, Handle::current())),
            root,
            run_dir,
            disks,
            records,
            live: Mutex::default(),
            changing: Mutex::default(),
            _lock: lock,
        };
        engine.sweep()?;
        Ok(engine)
    }

    /// The root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What was read of which layers, in order, where the store records it.
    pub fn touches(&self) -> Vec<layer::Touch> {
        self.disks.store().touches()
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The folder of an attachment's own trees: the small ones of the stack, and the writable layer.
    fn folder_of(&self, id: &str) -> PathBuf {
        self.root.join("attachments").join(id)
    }

    /// Removes what belongs to no mount: records, folders and devices of an engine that died. Nothing is live yet.
    fn sweep(&self) -> Result<()> {
        let mut kept = HashSet::new();
        for record in self.records.all()? {
            // in any namespace: what was written there must not be lost
            if mountinfo::find_anywhere(&mount_source(&record.id))?.is_some() {
                tracing::warn!(id = record.id, image = %record.reference, "its daemon has died; `socinbd detach` cleans up");
                kept.extend(record.layers.iter().flat_map(AttachedLayer::devices));
                continue;
            }
            self.forget(&record.id)?;
        }
        self.free_unless(|device| kept.contains(device))?;
        // loop devices of ours free themselves when their last user goes; one that never had a user is left over
        for device in loopdev::attached()? {
            let path = PathBuf::from(format!("/dev/loop{}", device.index));
            if device.name.starts_with(&self.devices.identifier_prefix()) && !kept.contains(&path) {
                tracing::info!(
                    device = device.index,
                    "a loop device is left over; it is freed"
                );
                loopdev::detach(device.index)?;
            }
        }
        Ok(())
    }

    /// Clears away an attachment of an engine that died. It is not mounted any more, so its loop devices have freed themselves.
    fn clear(&self, record: &Attachment) -> Result<()> {
        if let Some(mount) = mountinfo::find_anywhere(&mount_source(&record.id))? {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{} is still mounted at {} in another mount namespace, and in use {}",
                    record.reference,
                    mount.mount_point.display(),
                    who_uses(mount.device)
                ),
            ));
        }
        let layers = record.layers.iter();
        let theirs: HashSet<PathBuf> = layers.flat_map(AttachedLayer::devices).collect();
        let live = self.devices.paths();
        self.free_unless(|device| live.contains(device) || !theirs.contains(device))?;
        self.forget(&record.id)
    }

    fn forget(&self, id: &str) -> Result<()> {
        remove_tree(&self.folder_of(id))?;
        self.records.remove(id)
    }

    /// Frees the mapped and the nbd devices of engines with this root but those that are to be kept.
    fn free_unless(&self, kept: impl Fn(&Path) -> bool) -> Result<()> {
        self.devices.unmap_unless(&kept)?;
        let prefix = self.devices.identifier_prefix();
        for device in kernel_nbd::connected()? {
            let ours = device.backend_id.is_some_and(|id| id.starts_with(&prefix));
            if ours && !kept(Path::new(&format!("/dev/nbd{}", device.index))) {
                tracing::info!(
                    device = device.index,
                    "an nbd device is left over; it is disconnected"
                );
                kernel_nbd::disconnect(device.index)?;
            }
        }
        Ok(())
    }

    /// All attachments, those of an engine that died among them. What is just being made or given back is left out.
    pub async fn list(&self) -> Result<Vec<AttachmentStatus>> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // read under the locks: what is neither live nor changing belongs to an engine that died
        let records = self.records.all()?;
        Ok(records
            .into_iter()
            .filter(|record| !changing.contains(&record.id))
            .map(|record| {
                live.get(&record.id)
                    .map_or_else(|| AttachmentStatus::dead(record.clone()), Live::status)
            })
            .collect())
    }

    /// The caller has mounted it.
    pub fn mounted(&self, id: &str) -> Result<()> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let live = live.get_mut(id).ok_or_else(|| unknown(id))?;
        live.is_mounted = true;
        live.mounted.notify_waiters();
        Ok(())
    }

    /// Returns when [`Engine::mounted`] has been called, or the attachment is gone.
    pub async fn wait_mounted(&self, id: &str) {
        loop {
            let notify = {
                let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
                match live.get(id) {
                    Some(live) if !live.is_mounted => Arc::clone(&live.mounted).notified_owned(),
                    _ => return,
                }
            };
            notify.await;
        }
    }

    /// Returns when this attachment is not mounted there any more.
    pub async fn wait_unmounted(&self, mountpoint: &Path, id: &str) -> Result<()> {
        while is_mounted(mountpoint, id) {
            tokio::time::sleep(UNMOUNT_TURN).await;
        }
        Ok(())
    }

    /// Whether it is mounted where its caller wanted it, as this mount namespace sees it.
    pub fn is_mounted(&self, id: &str) -> bool {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let mountpoint = live
            .get(id)
            .and_then(|live| live.attachment.mountpoint.clone());
        drop(live);
        mountpoint.is_some_and(|path| is_mounted(&path, id))
    }

    /// Gives an attachment's devices back. It must not be mounted any more: `Busy` while a device is in use. What an engine that died
    /// has left of it is cleared away.
    pub async fn release(&self, id: &str) -> Result<()> {
        let _changing = loop {
            match self.change(id) {
                Some(changing) => break changing,
                // another caller's turn: what it leaves is what there is to say
                None => tokio::time::sleep(CHANGE_TURN).await,
            }
        };
        let live = self
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        let Some(live) = live else {
            let dead = self
                .records
                .all()?
                .into_iter()
                .find(|record| record.id == id);
            return self.clear(&dead.ok_or_else(|| unknown(id))?);
        };
        let Live {
            attachment,
            devices,
            mount_device,
            mounted,
            is_mounted,
        } = live;
        let (devices, busy) = blocking(move || {
            // what a program leaves when it ends, its mount namespace above all, the kernel takes down a moment later
            let deadline = Instant::now() + IDLE_TIME;
            let mut busy = in_use(&devices);
            while busy.is_some() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
                busy = in_use(&devices);
            }
            Ok((devices, busy))
        })
        .await?;
        if let Some(busy) = busy {
            let who = blocking(move || Ok(who_uses(mount_device))).await?;
            let error = Error::new(
                Kind::Busy,
                format!(
                    "{}: {} is still in use {who}",
                    attachment.reference,
                    busy.display()
                ),
            );
            let live = Live {
                attachment,
                devices,
                mount_device,
                mounted,
                is_mounted,
            };
            self.live
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id.to_owned(), live);
            return Err(error);
        }
        mounted.notify_waiters();
        let folder = self.folder_of(id);
        blocking(move || {
            drop(devices);
            remove_tree(&folder)
        })
        .await?;
        self.records.remove(id)
    }

    /// Marks an attachment as changing until the guard is dropped; `None` if it is already.
    fn change(&self, id: &str) -> Option<Changing<'_>> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        changing.insert(id.to_owned()).then(|| Changing {
            engine: self,
            id: id.to_owned(),
        })
    }

    /// Unmounts what is attached at a mount point, and releases it.
    pub async fn detach_at(&self, mountpoint: &Path) -> Result<()> {
        let ids: Vec<String> = {
            let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
            let here = live
                .values()
                .filter(|live| live.attachment.mountpoint.as_deref() == Some(mountpoint));
            here.map(|live| live.attachment.id.clone()).collect()
        };
        let (path, mounts) = (mountpoint.to_owned(), ids.clone());
        blocking(move || unmount(&path, &mounts)).await?;
        for id in ids {
            self.release(&id).await?;
        }
        Ok(())
    }

    /// Whether nothing is attached here, or about to be.
    pub fn is_idle(&self) -> bool {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        live.is_empty() && changing.is_empty()
    }

    /// Releases what was mounted and is not any more, in any mount namespace, and not in use.
    pub async fn release_unmounted(&self) {
        let ids: Vec<String> = {
            let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
            let mounted = live.values().filter(|live| live.is_mounted);
            mounted.map(|live| live.attachment.id.clone()).collect()
        };
        for id in ids {
            let released = match mountinfo::find_anywhere(&mount_source(&id)) {
                Ok(None) => self.release(&id).await,
                Ok(Some(_)) => continue,
                Err(error) => Err(error),
            };
            if let Err(error) = released {
                tracing::debug!(id, error = error.report(), "not released");
            }
        }
    }

    /// Unmounts and releases all that is not in use. What is in use loses its daemon; it is logged.
    pub async fn detach_all(&self) {
        let mountpoints: Vec<PathBuf> = {
            let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.values()
                .filter_map(|live| live.attachment.mountpoint.clone())
                .collect()
        };
        for mountpoint in mountpoints {
            if let Err(error) = self.detach_at(&mountpoint).await {
                tracing::error!(mountpoint = %mountpoint.display(), error = error.report(), "not detached");
            }
        }
    }
}

/// An attachment that is changing, until this is dropped.
struct Changing<'a> {
    engine: &'a Engine,
    id: String,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let changing = self.engine.changing.lock();
        changing
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.id);
    }
}

impl Live {
    /// The attachment with its devices as they are now.
    fn attachment(&self) -> Attachment {
        let mut attachment = self.attachment.clone();
        for (layer, device) in attachment.layers.iter_mut().zip(&self.devices) {
            (layer.device, layer.why) = (device.kind(), device.why());
        }
        attachment
    }

    fn status(&self) -> AttachmentStatus {
        let disks = || self.devices.iter().map(|device| device.disk());
        let attachment = self.attachment();
        let why = disks().find_map(|disk| {
            disk.degraded()
                .map(|why| format!("layer {}: {why}", disk.layer().digest))
        });
        let (present, all) = disks()
            .map(|disk| disk.span_counts())
            .fold((0, 0), |(present, all), counts| {
                (present + u64::from(counts.0), all + u64::from(counts.1))
            });
        let mut sources_down: Vec<SourceDown> = Vec::new();
        for down in disks().flat_map(|disk| disk.sources_down()) {
            if !sources_down.iter().any(|it| it.source == down.source) {
                sources_down.push(down);
            }
        }
        AttachmentStatus {
            attachment,
            sources_down,
            state: match &why {
                Some(_) => State::Degraded,
                None if disks().all(|disk| disk.is_complete()) => State::Complete,
                None if disks().any(|disk| *disk.progress().borrow() == Progress::Filling) => {
                    State::Filling
                }
                None => State::Lazy,
            },
            why,
            spans: Some((present, all)),
            fetched_bytes: Some(disks().map(|disk| disk.counters().fetched_bytes).sum()),
        }
    }
}

impl AttachmentStatus {
    /// The status of an attachment that no daemon serves.
    pub fn dead(attachment: Attachment) -> Self {
        let why = Some(
            "its daemon has died: complete layers can be read on, absent data cannot; `socinbd detach` cleans up"
                .to_owned(),
        );
        Self {
            attachment: attachment.with_devices_found(),
            state: State::Dead,
            why,
            spans: None,
            fetched_bytes: None,
            sources_down: Vec::new(),
        }
    }
}

/// Unmounts these attachments at a mount point. `Busy` names the processes that use it; not mounted is fine.
pub fn unmount(mountpoint: &Path, ids: &[String]) -> Result<()> {
    while ids.iter().any(|id| is_mounted(mountpoint, id)) {
        kernel::mount::detach(mountpoint)?;
    }
    Ok(())
}

/// Whether this attachment is what is mounted there, in this mount namespace.
fn is_mounted(mountpoint: &Path, id: &str) -> bool {
    mountinfo::at(mountpoint)
        .ok()
        .flatten()
        .is_some_and(|mount| mount.source == mount_source(id).as_str())
}

/// The path of a device that no other attachment has, and that something still uses.
fn in_use(devices: &[Arc<Device>]) -> Option<PathBuf> {
    let own = devices
        .iter()
        .filter(|device| Arc::strong_count(device) == 1);
    own.into_iter()
        .find(|device| kernel::blockdev::is_in_use(device.path()))
        .map(|device| Path::new("/dev").join(device.name()))
}

/// The processes that use a file system, in words.
fn who_uses(device: (u32, u32)) -> String {
    match busy::users_of_device(device) {
        Ok(users) if !users.is_empty() => format!("by {}", busy::names(&users)),
        // one that ended just now, or that is in another pid namespace than this process
        _ => "by a process that cannot be seen from here".to_owned(),
    }
}

/// What /proc/self/mountinfo shows as the source of an attachment's mount.
pub fn mount_source(id: &str) -> String {
    format!("socinbd-{id}")
}

fn unknown(id: &str) -> Error {
    Error::new(
        Kind::NotFound,
        format!("this daemon has no attachment {id:?}"),
    )
}

/// 16 random hexadecimal digits.
fn random_digits() -> Result<String> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .or_kind(Kind::Io, || "getting random bytes".into())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// A folder, made 0700 where missing, as an absolute path without symlinks.
fn folder(path: &Path) -> Result<PathBuf> {
    layer::make_private(path)?;
    path.canonicalize()
        .or_kind(Kind::Io, || format!("the folder {}", path.display()))
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).or_kind(Kind::Io, || format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Runs system calls that may block away from the async workers.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .or_kind(Kind::Io, || "a worker thread".into())?
}
