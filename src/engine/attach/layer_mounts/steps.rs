//! Mounts the file system of a layer at a path, or makes its device for another program that mounts it, and takes both back.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    record::LayerMountRecords,
    table::{LayerMount, LayerMounter},
};
use crate::{
    blocking::blocking,
    engine::attach::{
        devices::Device, engine::Engine, stack::directories::LayerPlace, steps::attached_layer,
        types::DeviceChoice,
    },
    engine::{
        open::opened::{DiskBasis, OpenedLayer},
        space::snapshots,
    },
    error::{Kind, Result, ResultExt as _},
    kernel::{blockdev, mount},
    layer::Disk,
};

impl Engine {
    /// The layer of a path, if it is served as it is wanted: where it is, and its disk.
    pub(crate) fn layer_at(
        &self,
        path: &Path,
        mounter: LayerMounter,
    ) -> Option<(LayerPlace, Arc<Disk>)> {
        let mount = self.layer_mounts.get(path)?;
        Some((mount.place(path, mounter)?, Arc::clone(mount.disk())))
    }

    /// The layers that are mounted alone: paths and devices.
    pub(in crate::engine) fn layer_mounts(&self) -> Vec<(PathBuf, Arc<Device>)> {
        self.layer_mounts.devices()
    }

    /// Mounts the file system of a layer at the path of a directory, unless it is mounted there, or makes its device for containerd. Another
    /// mount at the path is unmounted: a daemon that died has left it. It completes although its future is dropped.
    pub(crate) async fn mount_layer(
        self: &Arc<Self>,
        layer: OpenedLayer,
        choice: DeviceChoice,
        path: PathBuf,
        mounter: LayerMounter,
    ) -> Result<LayerPlace> {
        let engine = Arc::clone(self);
        self.finish(async move {
            let _changing = engine.wait_to_change(&LayerMountRecords::id(&path)).await;
            if let Some((place, _)) = engine.layer_at(&path, mounter) {
                return Ok(place);
            }
            let device = engine.devices.get(&layer.disk, choice).await?;
            blocking(move || {
                engine.unmount_now(&path)?;
                // without a node in /dev, another program cannot open the device
                match mounter == LayerMounter::Containerd && device.has_public_node() {
                    true => engine.hold_now(device, layer.basis, path),
                    false => engine.mount_now(device, layer.basis, path),
                }
            })
            .await
        })
        .await
    }

    /// Blocks.
    fn mount_now(
        &self,
        device: Arc<Device>,
        basis: DiskBasis,
        path: PathBuf,
    ) -> Result<LayerPlace> {
        let mounted = mount::ext4(device.path())?;
        mount::attach(mounted.as_fd(), &path)?;
        let attached = attached_layer(&device, basis);
        let mount = LayerMount::mounted(device, &path)
            .or_kind(Kind::Kernel, || format!("the mount at {}", path.display()))?;
        self.layer_mount_records.write(&path, &attached, true)?;
        self.layer_mounts.insert(path.clone(), mount);
        Ok(LayerPlace::Directory(path))
    }

    /// Keeps a device for another program. Blocks.
    fn hold_now(&self, device: Arc<Device>, basis: DiskBasis, path: PathBuf) -> Result<LayerPlace> {
        let open = blockdev::open(device.name())?;
        let held = self
            .devices
            .kept()
            .hold(&LayerMountRecords::digits(&path), open.as_fd());
        let place = LayerPlace::Device(device.path().to_owned());
        let attached = attached_layer(&device, basis);
        self.layer_mount_records.write(&path, &attached, false)?;
        self.layer_mounts
            .insert(path, LayerMount::held(device, held));
        Ok(place)
    }

    /// Unmounts the layer at a path, if one is mounted there, and releases its device when nothing uses it any more: overlays of containers
    /// keep the file system. It completes although its future is dropped.
    pub(crate) async fn unmount_layer(self: &Arc<Self>, path: PathBuf) -> Result<()> {
        let engine = Arc::clone(self);
        self.finish(async move {
            let _changing = engine.wait_to_change(&LayerMountRecords::id(&path)).await;
            blocking(move || engine.unmount_now(&path)).await
        })
        .await
    }

    /// Unmounts what is mounted at a path. Blocks.
    fn unmount_now(&self, path: &Path) -> Result<()> {
        while mount::is_mount(path)? {
            mount::detach_lazily(path)?;
        }
        self.layer_mount_records.remove(path)?;
        drop(self.layer_mounts.remove(path));
        Ok(())
    }

    /// Unmounts all layers. Devices in use are released when they are idle.
    pub(in crate::engine::attach) async fn unmount_layers(self: &Arc<Self>) {
        for path in self.layer_mounts.paths() {
            let engine = Arc::clone(self);
            if let Err(error) = blocking(move || engine.unmount_now(&path)).await {
                tracing::warn!("a layer stays mounted: {}", error.report());
            }
        }
        // and their mounts with mapped owners
        let snapshots = self.root.join(snapshots::DIRECTORY);
        if let Err(error) = blocking(move || mount::detach_below(&snapshots)).await {
            tracing::warn!("a layer stays mounted: {}", error.report());
        }
    }
}
