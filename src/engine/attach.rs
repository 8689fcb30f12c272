//! From an image reference to a mount, step by step.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::Notify;

use super::{
    Engine, Live, blocking,
    devices::Device,
    disks::{Events, LAYERS_AT_ONCE},
    mount_source, random_digits,
    records::Records,
    remove_tree,
    request::{AttachRequest, AttachedLayer, Attachment, Basis, UsedIndex},
    stack::{self, MountedLayer},
};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{
        memory, mount,
        overlay::{Lower, Overlay, Upper},
    },
    layer::{StackingFacts, make_private},
};

/// An image that is attached, and not yet mounted anywhere.
pub struct Attached {
    /// What is attached.
    pub attachment: Attachment,
    /// The overlay over its layers, in no mount namespace yet. The caller moves it to its place and closes this.
    pub mount: OwnedFd,
}

impl Engine {
    /// Attaches an image. On an error, or when the future is dropped, nothing is left of it.
    pub async fn attach(&self, request: AttachRequest, event: Events<'_>) -> Result<Attached> {
        let context = |error: Error| error.context(format!("attaching {}", request.reference));
        let attached = self.attach_steps(&request, event).await.map_err(context);
        // nobody waits for this
        drop(tokio::task::spawn_blocking(memory::give_back));
        attached
    }

    async fn attach_steps(&self, request: &AttachRequest, event: Events<'_>) -> Result<Attached> {
        if let Some(mountpoint) = &request.mountpoint {
            self.check_mountpoint(mountpoint)?;
        }
        let AttachRequest {
            reference,
            access,
            platform,
            index,
            ..
        } = request;
        let opened = self
            .disks
            .open_image(reference, access, platform.as_ref(), index, event)
            .await?;
        let making: Vec<_> = opened
            .layers
            .iter()
            .map(|layer| self.devices.get(&layer.disk, request.device))
            .collect();
        let devices: Vec<Arc<Device>> = futures_util::stream::iter(making)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        let id = random_digits()?;
        let attachment = Attachment {
            id: id.clone(),
            reference: request.reference.clone(),
            manifest: opened.image.digest,
            index: opened.index.as_ref().map(UsedIndex::of),
            compact_index: opened.compact.as_ref().map(|compact| compact.digest),
            mountpoint: request.mountpoint.clone(),
            writable: request.writable,
            process: opened.image.config.process,
            layers: devices
                .iter()
                .zip(opened.layers)
                .map(|(device, layer)| attached_layer(device, layer.basis))
                .collect(),
            warnings: opened.warnings,
        };
        let _changing = self.change(&id);
        let undo = Undo {
            records: self.records.clone(),
            id: id.clone(),
            folder: self.folder_of(&id),
            armed: true,
        };
        self.records.write(&attachment)?;
        let mount = self.stack(&id, &devices, request).await?;
        let stat =
            rustix::fs::fstat(&mount).or_kind(Kind::Kernel, || "looking at the mount".into())?;
        undo.disarm();
        let live = Live {
            attachment: attachment.clone(),
            devices,
            mount_device: (
                rustix::fs::major(stat.st_dev),
                rustix::fs::minor(stat.st_dev),
            ),
            mounted: Arc::new(Notify::new()),
            is_mounted: false,
        };
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, live);
        Ok(Attached { attachment, mount })
    }

    /// A mount in a folder of this engine's own, or over one, would hide what the engine works with.
    fn check_mountpoint(&self, mountpoint: &Path) -> Result<()> {
        for (folder, flag) in [(&self.root, "--root"), (&self.run_dir, "--run-dir")] {
            let place = if mountpoint.starts_with(folder) {
                "in"
            } else if folder.starts_with(mountpoint) {
                "over"
            } else {
                continue;
            };
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "the mount point {} is {place} the daemon's own folder {} ({flag}); mount it elsewhere",
                    mountpoint.display(),
                    folder.display()
                ),
            ));
        }
        Ok(())
    }

    /// Mounts each device's ext4, and an overlay over all of them.
    async fn stack(
        &self,
        id: &str,
        devices: &[Arc<Device>],
        request: &AttachRequest,
    ) -> Result<OwnedFd> {
        let folder = self.folder_of(id);
        let (source, writable) = (mount_source(id), request.writable);
        let allow_devices = request.allow_devices;
        // a mount is a dozen reads of the device, one after the other: side by side their waits overlap
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
            let plan = stack::plan(&layers)
                .or_kind(Kind::Kernel, || "reading the layers' directories".into())?;
            let root = plan.root_attributes(&layers);
            let root = root.or_kind(Kind::Kernel, || "reading the root's attributes".into())?;
            drop(layers);
            mounts.truncate(plan.layers);
            make_private(&folder)?;
            let mut lowers: Vec<Lower> = mounts.into_iter().map(Lower::Mount).collect();
            if !plan.top.is_empty() {
                stack::make_top(&folder.join("top"), &plan)?;
                lowers.insert(0, Lower::Directory(folder.join("top")));
            }
            if lowers.len() < 2 {
                make_private(&folder.join("empty"))?;
                lowers.push(Lower::Directory(folder.join("empty")));
            }
            let upper = if writable {
                let upper = Upper {
                    upper: folder.join("upper"),
                    work: folder.join("work"),
                };
                make_private(&upper.upper)?;
                make_private(&upper.work)?;
                let applied = root.apply(&upper.upper);
                applied.or_kind(Kind::Io, || format!("setting up {}", upper.upper.display()))?;
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

/// Mounts a device's ext4, in no mount namespace, and reads what stacking has to know of it.
async fn mount_layer(device: Arc<Device>) -> Result<(OwnedFd, StackingFacts)> {
    blocking(move || {
        let disk = device.disk();
        let context = |error: Error| error.context(format!("layer {}", disk.layer().digest));
        let mount = mount::ext4(device.path()).map_err(context)?;
        Ok((mount, disk.stacking().map_err(context)?))
    })
    .await
}

/// Takes back a record and its folder unless it is disarmed.
struct Undo {
    records: Records,
    id: String,
    folder: PathBuf,
    armed: bool,
}

impl Undo {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed {
            for done in [remove_tree(&self.folder), self.records.remove(&self.id)] {
                if let Err(error) = done {
                    tracing::error!(
                        id = self.id,
                        error = error.report(),
                        "cleaning up after a failed attach"
                    );
                }
            }
        }
    }
}

fn attached_layer(device: &Device, basis: Basis) -> AttachedLayer {
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
