//! Cleans up after an engine that died: removes its attachment records, their directories and its kernel devices, unless they are in use.
//! Kept attachments stay kept.

use std::{
    collections::HashSet,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use crate::{
    engine::{
        attach::{
            devices::Devices,
            engine::Engine,
            mount_place,
            names::mount_source,
            records::AttachmentRecord,
            release::{self, Ending},
            types::AttachedLayer,
        },
        examine::recording,
    },
    error::{Error, Kind, Result},
    kernel::{blockdev, dm, loopdev, mount::info, nbd as kernel_nbd},
};

impl Engine {
    /// Removes the records, directories and devices of an engine that died, unless they belong to a mount. Called before anything is
    /// attached, and after [`Engine::recover`]. `unserved` are nbd devices whose kept connections were ended: no daemon can serve them any
    /// more.
    pub(in crate::engine::attach) fn remove_leftovers(
        &self,
        unserved: HashSet<PathBuf>,
    ) -> Result<()> {
        recording::remove_left_over(&self.root)?;
        let mut kept = self.devices.paths();
        let mut alone = self.devices.in_kernel()?;
        alone.retain(|device| !kept.contains(device));
        // In any mount namespace, or in none (an open descriptor): files written to the upper layer must not be lost.
        let mounts = info::everywhere()?;
        let mounted: HashSet<&OsStr> = mounts.iter().map(|it| it.source.as_os_str()).collect();
        let mut has_unread_records = false;
        for entry in self.records.entries()? {
            if self.live(&entry.id).is_some() {
                continue;
            }
            if let Some(version) = entry.unknown_version {
                tracing::warn!(
                    id = entry.id,
                    "the record of an attachment has version {version}, which this program does not read; use the program that made it, or remove its directory"
                );
                has_unread_records = true;
                continue;
            }
            let devices = |record: &AttachmentRecord| -> Vec<PathBuf> {
                let layers = record.attachment.layers.iter();
                layers.flat_map(AttachedLayer::devices).collect()
            };
            let is_mounted = mounted.contains(OsStr::new(&mount_source(&entry.id)));
            let is_used =
                |record: &AttachmentRecord| record.was_mounted() && is_used(record, &alone);
            if is_mounted || entry.record.as_ref().is_some_and(is_used) {
                tracing::warn!(
                    id = entry.id,
                    "an attachment whose daemon has died is in use; `socinbd detach` cleans up"
                );
                kept.extend(entry.record.iter().flat_map(devices));
                continue;
            }
            if let Err(error) = self.records.put_away(&entry.id) {
                tracing::warn!(
                    id = entry.id,
                    "cannot remove a leftover attachment: {}",
                    error.report()
                );
            }
        }
        self.devices.unmap_unless(|device| kept.contains(device))?;
        // Nothing is opened to find out whether it is used: a device without connections answers after the dead-connection time only, and
        // without a record it never gets new ones.
        self.devices.disconnect_unless(|device, _| {
            kept.contains(device) || (has_unread_records && !unserved.contains(device))
        })?;
        self.devices
            .free_loops_unless(|device| kept.contains(device))
    }

    /// Removes an attachment of an engine that died. `Busy` while it is in use.
    pub(crate) fn remove_dead(&self, record: &AttachmentRecord, ending: Ending) -> Result<()> {
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
        let kept = |device: &Path| live.contains(device) || !theirs.contains(device);
        self.devices.unmap_unless(kept)?;
        self.devices
            .disconnect_unless(|device, name| kept(device) || blockdev::is_used(name))?;
        self.end_record(&attachment.id, ending)
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
                loopdev::detach(device.index, &device.name)?;
            }
        }
        Ok(())
    }

    /// Disconnects the nbd devices of engines with this root, except those whose path and name `kept` selects.
    fn disconnect_unless(&self, kept: impl Fn(&Path, &str) -> bool) -> Result<()> {
        let prefix = self.identifier_prefix();
        for device in kernel_nbd::connected()? {
            let name = format!("nbd{}", device.index);
            let is_ours = device.backend_id.is_some_and(|id| id.starts_with(&prefix));
            if is_ours && !kept(&Path::new("/dev").join(&name), &name) {
                tracing::info!(device = device.index, "disconnecting a leftover nbd device");
                kernel_nbd::disconnect(device.index)?;
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
    let has_users = |device| !mount_place::users(&record.attachment.id, device).is_empty();
    record.mount_device.is_some_and(has_users) || in_use(record, alone).is_some()
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
