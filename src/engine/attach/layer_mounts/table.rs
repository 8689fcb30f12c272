//! The layer mounts that an engine serves.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    engine::attach::{
        devices::{Device, kept::HeldName},
        stack::directories::LayerPlace,
    },
    layer::Disk,
};

/// Who mounts the file systems of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LayerMounter {
    /// This daemon, at paths of the host.
    #[default]
    Daemon,
    /// containerd, from the devices.
    Containerd,
}

/// The mounts by their paths.
#[derive(Default)]
pub(crate) struct LayerMounts(Mutex<HashMap<PathBuf, Arc<LayerMount>>>);

/// One mount, or a device that another program mounts.
pub(crate) struct LayerMount {
    // dropped before the device, which has one user less then
    made: Made,
    device: Arc<Device>,
}

/// What was made of the device.
enum Made {
    /// A mount; the device number of the file system (`st_dev`).
    Mount(u64),
    /// Nothing. The device is there as long as this.
    Device { _held: HeldName },
}

impl LayerMount {
    /// The file system of a device that is mounted at a path.
    pub(super) fn mounted(device: Arc<Device>, path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            made: Made::Mount(fs::symlink_metadata(path)?.dev()),
            device,
        })
    }

    /// A device that another program mounts.
    pub(super) fn held(device: Arc<Device>, held: HeldName) -> Self {
        Self {
            made: Made::Device { _held: held },
            device,
        }
    }

    /// Its disk.
    pub(crate) fn disk(&self) -> &Arc<Disk> {
        self.device.disk()
    }

    /// Where the layer is for somebody who wants it mounted by this one. `None`: it has to be mounted (again), for it may have been unmounted
    /// by hand, or is not what is wanted.
    pub(super) fn place(&self, path: &Path, mounter: LayerMounter) -> Option<LayerPlace> {
        let is_at = |number: u64| fs::symlink_metadata(path).is_ok_and(|it| it.dev() == number);
        match (&self.made, mounter) {
            // what is mounted already serves both
            (Made::Mount(number), _) => {
                is_at(*number).then(|| LayerPlace::Directory(path.to_owned()))
            }
            (Made::Device { .. }, LayerMounter::Containerd) => {
                Some(LayerPlace::Device(self.device.path().to_owned()))
            }
            (Made::Device { .. }, LayerMounter::Daemon) => None,
        }
    }
}

impl LayerMounts {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<LayerMount>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, path: PathBuf, mount: LayerMount) {
        self.lock().insert(path, Arc::new(mount));
    }

    pub(super) fn get(&self, path: &Path) -> Option<Arc<LayerMount>> {
        self.lock().get(path).cloned()
    }

    pub(super) fn remove(&self, path: &Path) -> Option<Arc<LayerMount>> {
        self.lock().remove(path)
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.lock().keys().cloned().collect()
    }

    /// The mounts with their devices.
    pub(super) fn devices(&self) -> Vec<(PathBuf, Arc<Device>)> {
        let mounts = self.lock();
        let mounts = mounts.iter();
        mounts
            .map(|(path, mount)| (path.clone(), Arc::clone(&mount.device)))
            .collect()
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}
