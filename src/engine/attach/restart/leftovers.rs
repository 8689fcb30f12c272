//! Cleans up after an engine that died: removes its attachment records, their directories and its kernel devices, unless they are in use.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use crate::{
    engine::{
        attach::{
            devices::Devices, engine::Engine, mount_place, names::mount_source,
            records::AttachmentRecord, release, types::AttachedLayer,
        },
        examine::recording,
    },
    error::{Error, Kind, Result},
    kernel::{blockdev, busy, dm, loopdev, mount::info, nbd as kernel_nbd},
};

impl Engine {
    /// Removes the records, directories and devices of an engine that died, unless they belong to a mount. Called before anything is
    /// attached, and after [`Engine::recover`].
    pub(in crate::engine::attach) fn remove_leftovers(&self) -> Result<()> {
        recording::remove_left_over(&self.root)?;
        let mut kept = self.devices.paths();
        let mut alone = self.devices.in_kernel()?;
        alone.retain(|device| !kept.contains(device));
        for entry in self.records.entries()? {
            if self.live(&entry.id).is_some() {
                continue;
            }
            // In any mount namespace, or in none (an open descriptor): files written to the upper layer must not be lost.
            let is_mounted = info::find_anywhere(&mount_source(&entry.id))?.is_some();
            let is_used = |record: &AttachmentRecord| is_used(record, &alone);
            if is_mounted || entry.record.as_ref().is_some_and(is_used) {
                tracing::warn!(
                    id = entry.id,
                    "an attachment whose daemon has died is in use; `socinbd detach` cleans up"
                );
                let layers = entry.record.iter().flat_map(|it| &it.attachment.layers);
                kept.extend(layers.flat_map(AttachedLayer::devices));
            } else if let Err(error) = self.records.remove(&entry.id) {
                tracing::warn!(
                    id = entry.id,
                    "cannot remove a leftover attachment: {}",
                    error.report()
                );
            }
        }
        self.free_unless(|device| kept.contains(device))?;
        self.devices
            .free_loops_unless(|device| kept.contains(device))
    }

    /// Removes an attachment of an engine that died. `Busy` while it is in use.
    pub(crate) fn remove_dead(&self, record: &AttachmentRecord) -> Result<()> {
        let attachment = &record.attachment;
        if let Some(what) = self.part_in_use(record)? {
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

    /// The part of a dead attachment that is in use: its mount, or a device that no other attachment uses.
    fn part_in_use(&self, record: &AttachmentRecord) -> Result<Option<PathBuf>> {
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
        Ok(release::wait_until_idle(|| in_use(record, &own)))
    }

    /// Releases the mapped devices and nbd devices of engines with this root, except devices that `kept` selects and devices in use.
    fn free_unless(&self, kept: impl Fn(&Path) -> bool) -> Result<()> {
        self.devices.unmap_unless(&kept)?;
        let prefix = self.devices.identifier_prefix();
        for device in kernel_nbd::connected()? {
            let name = format!("nbd{}", device.index);
            let ours = device.backend_id.is_some_and(|id| id.starts_with(&prefix));
            if !ours || kept(&Path::new("/dev").join(&name)) || blockdev::is_used(&name) {
                continue;
            }
            tracing::info!(device = device.index, "disconnecting a leftover nbd device");
            kernel_nbd::disconnect(device.index)?;
        }
        Ok(())
    }
}

impl Devices {
    /// Paths of the kernel devices that engines with this root have made, live or dead.
    pub(in crate::engine::attach) fn in_kernel(&self) -> Result<HashSet<PathBuf>> {
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

    /// Detaches the loop devices of an engine that died, except those that `kept` selects. A loop device detaches itself when its last user
    /// closes it, but not one that never had a user.
    pub(in crate::engine::attach) fn free_loops_unless(
        &self,
        kept: impl Fn(&Path) -> bool,
    ) -> Result<()> {
        for device in loopdev::attached()? {
            let path = PathBuf::from(format!("/dev/loop{}", device.index));
            if device.name.starts_with(&self.identifier_prefix()) && !kept(&path) {
                tracing::info!(device = device.index, "detaching a leftover loop device");
                loopdev::detach(device.index)?;
            }
        }
        Ok(())
    }

    /// Removes the mapped devices of an engine that died, except those that `kept` selects. A device in use is removed when its last user
    /// closes it.
    pub(in crate::engine::attach) fn unmap_unless(
        &self,
        kept: impl Fn(&Path) -> bool,
    ) -> Result<()> {
        let prefix = self.identifier_prefix();
        for device in dm::mapped()? {
            let path = Path::new("/dev").join(&device.name);
            if device.mapped_name.starts_with(&prefix) && !kept(&path) {
                tracing::info!(device = device.name, "removing a leftover mapped device");
                dm::remove(&device.mapped_name)?;
            }
        }
        // the last user of another mapped device may have closed it just now
        dm::settle()
    }
}

/// Whether something uses an attachment that is not mounted anywhere: a process has a file of it open, or one of its devices is in use.
/// Only devices in `alone` count, which no other attachment uses.
pub(super) fn is_used(record: &AttachmentRecord, alone: &HashSet<PathBuf>) -> bool {
    let users = record.mount_device.map(busy::users_of_device);
    users.is_some_and(|users| users.is_ok_and(|users| !users.is_empty()))
        || in_use(record, alone).is_some()
}

/// A device of a dead attachment that is in use. `ours` are the kernel devices of this root: another program may use a device with the same
/// path by now.
fn in_use(record: &AttachmentRecord, ours: &HashSet<PathBuf>) -> Option<PathBuf> {
    let devices = record.attachment.layers.iter();
    let mut devices = devices.flat_map(AttachedLayer::devices);
    devices.find(|device| {
        let name = device.file_name().and_then(|name| name.to_str());
        ours.contains(device) && name.is_some_and(blockdev::is_used)
    })
}
