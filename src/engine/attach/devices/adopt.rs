//! Takes over the devices of a daemon that died: the kernel still has them, and the file systems on them are mounted.

use std::{
    path::Path,
    sync::{Arc, Mutex, Weak, atomic::AtomicBool},
};

use super::{
    Device, DeviceBacking, DeviceStack, Devices, ServedDevice,
    choice::{at_first, moved},
    follow,
    fuse_files::FuseDevice,
    metadata_readahead::WatchedDisk,
    nbd_connections::NbdLinks,
};
use crate::{
    engine::attach::types::{AttachedLayer, Attachment, DeviceKind},
    error::{Error, Kind, Result},
    kernel::{
        dm::{self, MappedDevice},
        loopdev::{self, LoopDevice},
        nbd as kernel_nbd,
    },
    layer::Disk,
};

/// The devices of one layer, as the kernel has them.
struct FoundDevices {
    mapped: Option<MappedDevice>,
    /// The kernel's name of the device that answers reads now.
    answering: String,
    /// The digits that its FUSE file has in the descriptor store, if it is a loop device on one.
    file: Option<String>,
    /// What answered at first.
    kind: DeviceKind,
    has_moved: bool,
}

impl Devices {
    /// Takes over the device of a layer. Its disk serves it from now on. Blocks.
    pub(in crate::engine::attach) fn adopt(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        layer: &AttachedLayer,
    ) -> Result<Arc<Device>> {
        let found = self.find(disk, layer)?;
        let may_move = found.mapped.is_some();
        let place = {
            let mut by_disk = self
                .by_disk
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            Arc::clone(
                by_disk
                    .entry((disk.key(), found.kind, may_move))
                    .or_default(),
            )
        };
        // nothing else makes devices yet
        let mut place = place.blocking_lock();
        if let Some(device) = place.upgrade() {
            // another attachment has the layer
            return match device.shown_path() == layer.device_path {
                true => Ok(device),
                false => Err(unexpected(layer, "another device serves its disk")),
            };
        }
        let progress = disk.progress();
        let device = Arc::new(self.resume(disk, layer, found)?);
        let served: Weak<ServedDevice> = Arc::downgrade(&device.0);
        self.runtime
            .spawn(follow(served, Arc::clone(self), progress));
        *place = Arc::downgrade(&device);
        Ok(device)
    }

    /// Looks the devices of a layer up. An error: they are not there, or not those of this disk.
    fn find(&self, disk: &Disk, layer: &AttachedLayer) -> Result<FoundDevices> {
        let identifier = self.identifier(disk);
        let top = name_of(&layer.device_path)
            .ok_or_else(|| unexpected(layer, "its record names no device"))?;
        let Some(first) = layer.backing.as_deref() else {
            return Ok(FoundDevices {
                mapped: None,
                file: self.check_identity(&top, &identifier, layer)?,
                answering: top,
                kind: layer.device,
                has_moved: false,
            });
        };
        let first =
            name_of(first).ok_or_else(|| unexpected(layer, "its record names no device"))?;
        let mut mapped = dm::mapped()?.into_iter();
        let mapped = mapped
            .find(|mapped| mapped.name == top)
            .filter(|mapped| mapped.mapped_name.starts_with(&identifier))
            .ok_or_else(|| unexpected(layer, "the device mapper does not have its device"))?;
        let [answering] = <[String; 1]>::try_from(dm::below(&top))
            .map_err(|_| unexpected(layer, "its device is not on one other device"))?;
        Ok(FoundDevices {
            mapped: Some(MappedDevice::adopt(&mapped)?),
            file: self.check_identity(&answering, &identifier, layer)?,
            has_moved: answering != first,
            answering,
            kind: match first.starts_with("nbd") {
                true => DeviceKind::Nbd,
                false => DeviceKind::Fuse,
            },
        })
    }

    /// Whether the kernel's device was made by a daemon with this root for this disk: another program may have a device by the same name.
    /// Returns the digits after the identifier in the name of a loop device on a FUSE file.
    fn check_identity(
        &self,
        name: &str,
        identifier: &str,
        layer: &AttachedLayer,
    ) -> Result<Option<String>> {
        let found = match index_of(name, "nbd") {
            Some(index) => {
                let mut connected = kernel_nbd::connected()?.into_iter();
                connected
                    .find(|device| device.index == index)
                    .and_then(|device| device.backend_id)
            }
            None => match index_of(name, "loop") {
                Some(index) if loopdev::backing(index).is_some() => Some(loopdev::name(index)?),
                _ => None,
            },
        };
        let rest = found.as_deref().and_then(|it| it.strip_prefix(identifier));
        match rest.map(|rest| (rest, rest.strip_prefix('-'))) {
            Some(("", _)) => Ok(None),
            Some((_, Some(digits))) => Ok(Some(digits.to_owned())),
            _ => Err(unexpected(layer, &format!("/dev/{name} is not its device"))),
        }
    }

    fn resume(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        layer: &AttachedLayer,
        found: FoundDevices,
    ) -> Result<Device> {
        let name = &found.answering;
        let (backing, watched) = match (index_of(name, "nbd"), index_of(name, "loop")) {
            (Some(index), _) => {
                let watched = Arc::new(WatchedDisk::new(Arc::clone(disk), self.runtime.clone()));
                let link =
                    NbdLinks::adopt(&self.links, index, disk, &watched, self.identifier(disk))?;
                (DeviceBacking::Nbd(link), Some(watched))
            }
            (_, Some(index)) if found.has_moved || found.kind == DeviceKind::Loop => {
                if loopdev::backing(index).as_deref() != Some(disk.path()) {
                    return Err(unexpected(layer, "its loop device is on another file"));
                }
                let device = LoopDevice::adopt(index)?;
                let _hold = disk.hold_in_use();
                (DeviceBacking::Loop { device, _hold }, None)
            }
            (_, Some(index)) => {
                let watched = Arc::new(WatchedDisk::new(Arc::clone(disk), self.runtime.clone()));
                let kept = found
                    .file
                    .and_then(|digits| self.serving.kept.file(&digits));
                let kept =
                    kept.ok_or_else(|| unexpected(layer, "its FUSE file ended with the daemon"))?;
                let fuse = FuseDevice::adopt(&self.serving, index, kept, &watched)?;
                (DeviceBacking::Fuse(fuse), Some(watched))
            }
            _ => return Err(unexpected(layer, "it is of no known kind")),
        };
        let (name, node) = found.mapped.as_ref().map_or_else(
            || (backing.name(), Arc::clone(backing.node())),
            |mapped| (mapped.name(), Arc::clone(mapped.node())),
        );
        if let Some(watched) = &watched {
            watched.set_device(&node);
        }
        Ok(Device(Arc::new(ServedDevice {
            name,
            node,
            kind: found.kind,
            why: at_first(&layer.why).to_owned(),
            backing: layer.backing.clone(),
            has_moved: AtomicBool::new(found.has_moved),
            watched,
            stack: Mutex::new(Some(DeviceStack {
                mapped: found.mapped,
                backing,
            })),
            runtime: self.runtime.clone(),
            disk: Arc::clone(disk),
        })))
    }
}

impl Attachment {
    /// Applies [`as_found`] to all layers.
    pub(in crate::engine::attach) fn with_devices_found(mut self) -> Self {
        self.layers = self.layers.into_iter().map(as_found).collect();
        self
    }
}

/// Updates the recorded kind of a layer's device to the current one: the device may have moved to a loop device before its daemon died.
fn as_found(mut layer: AttachedLayer) -> AttachedLayer {
    let was = layer.backing.as_deref().and_then(name_of);
    let below = name_of(&layer.device_path).map_or_else(Vec::new, |name| dm::below(&name));
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

fn name_of(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

/// The number in a device's name with this prefix.
fn index_of(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.parse().ok()
}

fn unexpected(layer: &AttachedLayer, why: &str) -> Error {
    Error::new(
        Kind::NotFound,
        format!(
            "the device {} of layer {}: {why}",
            layer.device_path.display(),
            layer.digest
        ),
    )
}
