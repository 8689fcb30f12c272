//! Cleans up after an engine that died: its records with their directories, and its kernel devices, unless they are in use.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use super::{
    devices::Devices, engine::Engine, mount_place, names::mount_source, records::AttachmentRecord,
    release, types::AttachedLayer,
};
use crate::{
    engine::examine::recording,
    error::{Error, Kind, Result},
    kernel::{blockdev, dm, loopdev, mount::info, nbd as kernel_nbd},
};

impl Engine {
    /// Removes what belongs to no mount: records, folders and devices of an engine that died. Nothing is live yet.
    pub(super) fn sweep(&self) -> Result<()> {
        recording::remove_left_over(&self.root)?;
        let ours = self.devices.in_kernel()?;
        let mut kept = HashSet::new();
        for entry in self.records.entries()? {
            // in any namespace, and in none: what was written there must not be lost
            let is_mounted = info::find_anywhere(&mount_source(&entry.id))?.is_some();
            let is_used = |record: &AttachmentRecord| in_use(record, &ours).is_some();
            if is_mounted || entry.record.as_ref().is_some_and(is_used) {
                tracing::warn!(
                    id = entry.id,
                    "its daemon has died, and it is in use; `socinbd detach` cleans up"
                );
                let layers = entry.record.iter().flat_map(|it| &it.attachment.layers);
                kept.extend(layers.flat_map(AttachedLayer::devices));
            } else if let Err(error) = self.records.remove(&entry.id) {
                tracing::warn!(id = entry.id, "it is left over: {}", error.report());
            }
        }
        self.free_unless(|device| kept.contains(device))?;
        self.devices
            .free_loops_unless(|device| kept.contains(device))
    }

    /// Clears away an attachment of an engine that died; `Busy` while it is in use.
    pub(crate) fn clear(&self, record: &AttachmentRecord) -> Result<()> {
        let attachment = &record.attachment;
        if let Some(what) = self.used_of(record)? {
            let who = mount_place::who_uses(&attachment.id, record.mount_device);
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{}: {} is still in use {who}",
                    attachment.reference,
                    what.display()
                ),
            ));
        }
        let theirs = attachment.layers.iter();
        let theirs: HashSet<PathBuf> = theirs.flat_map(AttachedLayer::devices).collect();
        let live = self.devices.paths();
        self.free_unless(|device| live.contains(device) || !theirs.contains(device))?;
        self.records.remove(&attachment.id)
    }

    /// What of an attachment of an engine that died is in use: a mount of it, or a device that only it has.
    fn used_of(&self, record: &AttachmentRecord) -> Result<Option<PathBuf>> {
        let attachment = &record.attachment;
        if let Some(mount) = info::find_anywhere(&mount_source(&attachment.id))? {
            return Ok(Some(mount.mount_point));
        }
        let others = self.records.entries()?.into_iter();
        let others: HashSet<PathBuf> = others
            .filter(|entry| entry.id != attachment.id)
            .filter_map(|entry| entry.record)
            .flat_map(|record| record.attachment.layers)
            .flat_map(|layer| layer.devices().collect::<Vec<_>>())
            .collect();
        let mut own = self.devices.in_kernel()?;
        own.retain(|device| !others.contains(device));
        Ok(release::wait_while(|| in_use(record, &own)))
    }

    /// Frees the mapped and the nbd devices of engines with this root but those that are to be kept, or in use.
    fn free_unless(&self, kept: impl Fn(&Path) -> bool) -> Result<()> {
        self.devices.unmap_unless(&kept)?;
        let prefix = self.devices.identifier_prefix();
        for device in kernel_nbd::connected()? {
            let name = format!("nbd{}", device.index);
            let ours = device.backend_id.is_some_and(|id| id.starts_with(&prefix));
            if !ours || kept(&Path::new("/dev").join(&name)) || blockdev::is_used(&name) {
                continue;
            }
            tracing::info!(
                device = device.index,
                "an nbd device is left over; it is disconnected"
            );
            kernel_nbd::disconnect(device.index)?;
        }
        Ok(())
    }
}

impl Devices {
    /// The paths of the kernel's devices that engines with this root have made, this one or one that died.
    pub(super) fn in_kernel(&self) -> Result<HashSet<PathBuf>> {
        let prefix = self.identifier_prefix();
        let mapped = dm::mapped()?.into_iter();
        let mapped = mapped.filter(|device| device.mapped_name.starts_with(&prefix));
        let loops = loopdev::attached()?.into_iter();
        let loops = loops.filter(|device| device.name.starts_with(&prefix));
        let nbds = kernel_nbd::connected()?.into_iter();
        let is_ours = |id: &String| id.starts_with(&prefix);
        let nbds = nbds.filter(|device| device.backend_id.as_ref().is_some_and(is_ours));
        let names = mapped
            .map(|device| device.name)
            .chain(loops.map(|device| format!("loop{}", device.index)))
            .chain(nbds.map(|device| format!("nbd{}", device.index)));
        Ok(names.map(|name| Path::new("/dev").join(name)).collect())
    }

    /// Frees the loop devices that an engine that died has left, unless they are to be kept. They free themselves when their last user goes;
    /// one that never had a user is left over.
    pub(super) fn free_loops_unless(&self, kept: impl Fn(&Path) -> bool) -> Result<()> {
        for device in loopdev::attached()? {
            let path = PathBuf::from(format!("/dev/loop{}", device.index));
            if device.name.starts_with(&self.identifier_prefix()) && !kept(&path) {
                tracing::info!(
                    device = device.index,
                    "a loop device is left over; it is freed"
                );
                loopdev::detach(device.index)?;
            }
        }
        Ok(())
    }

    /// Frees what an engine that died has left in the device mapper, unless it is to be kept. What is in use goes with its last user.
    pub(super) fn unmap_unless(&self, kept: impl Fn(&Path) -> bool) -> Result<()> {
        let prefix = self.identifier_prefix();
        for device in dm::mapped()? {
            let path = Path::new("/dev").join(&device.name);
            if device.mapped_name.starts_with(&prefix) && !kept(&path) {
                tracing::info!(
                    device = device.name,
                    "a mapped device is left over; it is removed"
                );
                dm::remove(&device.mapped_name)?;
            }
        }
        // the last user of another one may just have gone
        dm::settle()
    }
}

/// A device of a dead attachment that something uses. `ours` are the kernel's devices that are of this root: another program may have a
/// device by the same path now.
fn in_use(record: &AttachmentRecord, ours: &HashSet<PathBuf>) -> Option<PathBuf> {
    let devices = record.attachment.layers.iter();
    let mut devices = devices.flat_map(AttachedLayer::devices);
    devices.find(|device| {
        let name = device.file_name().and_then(|name| name.to_str());
        ours.contains(device) && name.is_some_and(blockdev::is_used)
    })
}
