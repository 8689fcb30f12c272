//! The steps of an attach, from an image reference to a mount descriptor.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Instant,
};

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::watch;

use super::{
    devices::Device,
    engine::Engine,
    live::{self, KeepOptions, LiveAttachment},
    names::{mount_source, random_digits},
    records::{self, AttachmentRecords},
    stack::{self, MountedLayer},
    types::{AttachRequest, AttachedLayer, Attachment, UsedIndex},
};
use crate::{
    blocking::blocking,
    engine::open::opened::{DiskBasis, LAYERS_AT_ONCE, OnOpenEvent, OpenedLayer},
    error::{Error, Kind, Result, ResultExt},
    kernel::{
        memory,
        mount::{
            self,
            end::Watch,
            overlay::{Lower, Overlay, Upper},
        },
    },
    layer::{FirstRead, StackingFacts, make_private},
    metrics::{METRICS, Outcome},
};

/// An attached image that is not mounted anywhere yet.
pub struct AttachedImage {
    /// The attachment.
    pub attachment: Attachment,
    /// The overlay over its layers, not in any mount namespace yet. The caller moves it to the mount point and closes the descriptor. If
    /// the descriptor is closed before, the attachment is released.
    pub mount: OwnedFd,
}

impl Engine {
    /// Attaches an image. If it fails or the future is dropped, nothing remains: once devices are made, the attach completes in its own
    /// task, and an attachment that no client takes is released when its mount is dropped. `Unavailable` if the engine is shutting down.
    pub async fn attach(
        self: &Arc<Self>,
        request: AttachRequest,
        event: OnOpenEvent<'_>,
    ) -> Result<AttachedImage> {
        let reference = request.reference.clone();
        let began = Instant::now();
        let attached = self.attach_steps(request, event, began).await;
        METRICS.attaches.count(Outcome::of(&attached) as usize);
        if attached.is_ok() {
            METRICS.attach.observe(began.elapsed());
        }
        // not awaited: the client does not need it
        drop(tokio::task::spawn_blocking(memory::give_back));
        attached.map_err(|error| error.context(format!("attaching {reference}")))
    }

    async fn attach_steps(
        self: &Arc<Self>,
        request: AttachRequest,
        event: OnOpenEvent<'_>,
        began: Instant,
    ) -> Result<AttachedImage> {
        if let Some(mountpoint) = &request.mountpoint {
            self.check_mountpoint(mountpoint)?;
        } else if request.keep {
            return Err(Error::new(
                Kind::InvalidArgument,
                "an attachment without a mount point cannot be kept",
            ));
        }
        let AttachRequest {
            reference,
            access,
            platform,
            index,
            ..
        } = &request;
        // can be aborted: disks belong to the root, not to the attachment
        let opening = self
            .disks
            .open_image(reference, access, platform.as_ref(), index, event);
        let opened = tokio::select! {
            biased;
            () = self.wait_refusing() => return Err(live::ending()),
            opened = opening => opened?,
        };
        let engine = Arc::clone(self);
        let attachment = Attachment {
            id: random_digits()?,
            reference: request.reference,
            manifest: opened.image.digest,
            index: opened.index.as_ref().map(UsedIndex::of),
            compact_index: opened.compact.as_ref().map(|compact| compact.digest),
            mountpoint: request.mountpoint,
            writable: request.writable,
            kept: request.keep,
            fill: request.fill,
            process: opened.image.config.process,
            layers: Vec::new(),
            warnings: opened.warnings,
        };
        let options = KeepOptions {
            device: request.device,
            allow_devices: request.allow_devices,
        };
        self.finish(async move {
            let Some(_changing) = engine.change(&attachment.id) else {
                return Err(live::ending());
            };
            engine
                .mount(attachment, opened.layers, options, began)
                .await
        })
        .await
    }

    /// Makes the devices and the mount of an attachment from its disks. Runs in a task of its own, which has marked the attachment as
    /// changing. After an error nothing is left of it, except that a kept attachment stays kept.
    pub(super) async fn mount(
        self: &Arc<Self>,
        mut attachment: Attachment,
        layers: Vec<OpenedLayer>,
        options: KeepOptions,
        began: Instant,
    ) -> Result<AttachedImage> {
        let id = attachment.id.clone();
        // declared before the devices, so that it is dropped after them
        let undo = RecordUndo {
            records: self.records.clone(),
            id: id.clone(),
            armed: true,
        };
        let making: Vec<_> = layers
            .iter()
            .map(|layer| self.devices.get(&layer.disk, options.device))
            .collect();
        let devices: Vec<Arc<Device>> = futures_util::stream::iter(making)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        let layers = devices.iter().zip(layers);
        attachment.layers = layers
            .map(|(device, layer)| attached_layer(device, layer.basis))
            .collect();
        self.records.write(&attachment, None)?;
        let (writable, allow_devices) = (attachment.writable, options.allow_devices);
        let mount = self.stack(&id, &devices, writable, allow_devices).await?;
        let stat = rustix::fs::fstat(&mount)
            .or_kind(Kind::Kernel, || "reading the status of the mount".into())?;
        let mount_device = (
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev),
        );
        self.records.write(&attachment, Some(mount_device))?;
        let first_read = FirstRead::since(began);
        for device in &devices {
            device.disk().await_first_read(&first_read);
        }
        let live = Arc::new(LiveAttachment {
            attachment: attachment.clone(),
            devices,
            mount_device,
            keep: attachment.kept.then_some(options),
            watch: self.watch(&mount),
            phase: watch::Sender::default(),
            began,
            mounted_after: began.elapsed(),
            _first_read: Some(first_read),
        });
        let is_refused = {
            let mut table = self.table();
            let is_ending = self.is_ending();
            if !is_ending {
                table.live.insert(id, Arc::clone(&live));
            }
            is_ending
        };
        if is_refused {
            drop(mount); // before its devices
            return Err(live::ending());
        }
        undo.disarm();
        let disks = live.devices.iter().map(|device| Arc::clone(device.disk()));
        self.disks.store().fill(disks, attachment.fill);
        Ok(AttachedImage { attachment, mount })
    }

    /// Watches for the end of the mount.
    pub(super) fn watch(&self, mount: &OwnedFd) -> Option<Watch> {
        let ends = self.mount_ends.as_ref()?;
        ends.watch(mount.as_fd())
            .inspect_err(|error| {
                tracing::warn!(
                    "cannot watch for the unmount of an image, so only `socinbd detach` releases its devices: {}",
                    error.report()
                );
            })
            .ok()
    }

    /// Refuses mount points that would break the daemon or other programs. A mount in or over the daemon's own directories would hide the
    /// daemon's files. A mount over `/proc` or `/dev` would hide the mount table and the devices from all programs, including `detach`.
    pub(super) fn check_mountpoint(&self, mountpoint: &Path) -> Result<()> {
        if ["/proc", "/sys", "/dev"]
            .iter()
            .any(|it| mountpoint == Path::new(it))
        {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "a mount at {} would hide a kernel file system from all programs; use another mount point",
                    mountpoint.display()
                ),
            ));
        }
        for (directory, flag) in [(&self.root, "--root"), (&self.run_dir, "--run-dir")] {
            let place = if mountpoint.starts_with(directory) {
                "in"
            } else if directory.starts_with(mountpoint) {
                "over"
            } else {
                continue;
            };
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "mount point {} is {place} the daemon's own directory {} ({flag}); use another mount point",
                    mountpoint.display(),
                    directory.display()
                ),
            ));
        }
        Ok(())
    }

    /// Mounts the ext4 file system of each device, and an overlay over all of them.
    async fn stack(
        &self,
        id: &str,
        devices: &[Arc<Device>],
        writable: bool,
        allow_devices: bool,
    ) -> Result<OwnedFd> {
        let directory = self.records.directory_of(id);
        let source = mount_source(id);
        // A mount causes about twelve sequential reads of the device. Mounting in parallel overlaps their latencies.
        let mounting: Vec<_> = devices.iter().cloned().map(mount_layer).collect();
        let mounted: Vec<(OwnedFd, StackingFacts)> = futures_util::stream::iter(mounting)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        blocking(move || {
            let (mut mounts, facts): (Vec<_>, Vec<_>) = mounted.into_iter().unzip();
            let layers = mounts.iter().zip(facts);
            let layers: Vec<MountedLayer<'_>> = layers
                .map(|(mount, facts)| MountedLayer {
                    root: mount.as_fd(),
                    facts,
                })
                .collect();
            let plan = stack::plan(&layers).or_kind(Kind::Kernel, || {
                "reading the directories of the layers".into()
            })?;
            let root = plan.root_attributes(&layers);
            let root = root.or_kind(Kind::Kernel, || {
                "reading the attributes of the root directory".into()
            })?;
            drop(layers);
            mounts.truncate(plan.layers);
            make_private(&directory)?;
            let mut lowers: Vec<Lower> = mounts.into_iter().map(Lower::Mount).collect();
            if !plan.top.is_empty() {
                stack::make_top(&directory.join("top"), &plan)?;
                lowers.insert(0, Lower::Directory(directory.join("top")));
            }
            if lowers.len() < 2 {
                make_private(&directory.join("empty"))?;
                lowers.push(Lower::Directory(directory.join("empty")));
            }
            let upper = if writable {
                let upper = Upper {
                    upper: directory.join(records::UPPER),
                    work: directory.join("work"),
                };
                make_private(&upper.work)?;
                // that of a kept attachment is as its user has left it
                if !upper.upper.exists() {
                    make_private(&upper.upper)?;
                    let applied = root.apply(&upper.upper);
                    applied
                        .or_kind(Kind::Io, || format!("setting up {}", upper.upper.display()))?;
                }
                Some(upper)
            } else {
                None
            };
            Overlay {
                lowers,
                upper,
                devices: allow_devices,
                source,
                by_mount_call: false,
            }
            .mount()
        })
        .await
    }
}

/// Mounts the ext4 file system of a device, outside any mount namespace, and reads the facts for stacking.
async fn mount_layer(device: Arc<Device>) -> Result<(OwnedFd, StackingFacts)> {
    blocking(move || {
        let disk = device.disk();
        let context = |error: Error| error.context(format!("layer {}", disk.layer().digest));
        let mount = mount::ext4(device.path()).map_err(context)?;
        Ok((mount, disk.stacking().map_err(context)?))
    })
    .await
}

/// Removes the record and the directory of an attachment when it is dropped, unless it is disarmed. A kept attachment stays kept.
struct RecordUndo {
    records: AttachmentRecords,
    id: String,
    armed: bool,
}

impl RecordUndo {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for RecordUndo {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.records.put_away(&self.id)
        {
            tracing::error!(
                id = self.id,
                error = error.report(),
                "cleaning up after a failed attach"
            );
        }
    }
}

/// The description of a device.
pub(super) fn attached_layer(device: &Device, basis: DiskBasis) -> AttachedLayer {
    let layer = device.disk().layer();
    AttachedLayer {
        digest: layer.digest,
        table: *device.disk().table(),
        size: layer.size,
        device: device.kind(),
        device_path: Path::new("/dev").join(device.name()),
        backing: device.backing(),
        why: device.why(),
        basis,
    }
}
