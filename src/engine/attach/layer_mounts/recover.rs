//! Takes over the layer mounts of a daemon that died.

use std::{os::fd::AsFd as _, sync::Arc};

use super::{
    record::{LayerMountRecord, LayerMountRecords},
    table::LayerMount,
};
use crate::{
    engine::attach::{devices::Device, engine::Engine},
    error::{Error, Kind, Result, ResultExt as _},
    kernel::{blockdev, mount},
};

impl Engine {
    /// Serves the layer mounts of a daemon that died. A mount that cannot be served is unmounted, and a device is forgotten: they are made again
    /// when they are needed. Returns the devices of such mounts: containers may use them, so they are to be dropped after
    /// [`Engine::remove_leftovers`]. Blocks.
    pub(in crate::engine::attach) fn recover_layers(&self) -> Result<Vec<Arc<Device>>> {
        let mut unmounted = Vec::new();
        for record in self.layer_mount_records.take()? {
            let path = record.path.clone();
            if let Err(error) = self.take_layer_over(record, &mut unmounted) {
                tracing::warn!(
                    path = %path.display(),
                    "the layer that a daemon that died has served is not served any more: {}",
                    error.report()
                );
                if mount::is_mount(&path)? {
                    mount::detach_lazily(&path)?;
                }
                self.layer_mount_records.remove(&path)?;
            }
        }
        Ok(unmounted)
    }

    fn take_layer_over(
        &self,
        record: LayerMountRecord,
        unmounted: &mut Vec<Arc<Device>>,
    ) -> Result<()> {
        let LayerMountRecord {
            path,
            layer,
            is_mounted,
            ..
        } = record;
        let held = self.devices.kept().held(&LayerMountRecords::digits(&path));
        let store = self.disks.store();
        let disk = store.stored_after_restart(&layer.digest, &layer.table)?;
        let disk = disk.ok_or_else(|| {
            let context = format!("the disk of layer {} is gone", layer.digest);
            Error::new(Kind::NotFound, context)
        })?;
        let device = self.devices.adopt(&disk, &layer)?;
        let mount = match (is_mounted, held) {
            (true, _) => LayerMount::mounted(Arc::clone(&device), &path)
                .or_kind(Kind::Kernel, || format!("the mount at {}", path.display()))
                .inspect_err(|_| unmounted.push(device))?,
            (false, Some(held)) => LayerMount::held(device, held),
            (false, None) => {
                let open = blockdev::open(device.name())?;
                let digits = LayerMountRecords::digits(&path);
                let held = self.devices.kept().hold(&digits, open.as_fd());
                LayerMount::held(device, held)
            }
        };
        self.layer_mounts.insert(path, mount);
        Ok(())
    }
}
