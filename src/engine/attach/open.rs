//! Opens an engine: locks the root and the runtime directory, and cleans up after an engine that died.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use tokio::{runtime::Handle, sync::watch};
use tokio_util::task::TaskTracker;

use super::{
    devices::{Devices, kept::KeptDescriptors},
    engine::{Engine, EnginePhase},
    layer_mounts::{record::LayerMountRecords, table::LayerMounts},
    records::AttachmentRecords,
    release,
};
use crate::{
    blocking::blocking,
    engine::open::disks::Disks,
    engine::space::unused,
    error::{Kind, Result, ResultExt as _},
    kernel::mount::end::MountEnds,
    layer::{self, DirectoryLock, lock_root},
    oci::Digest,
};

impl Engine {
    /// Opens the root and the runtime directory (created with mode 0700 if missing), and removes unused leftovers of an engine that died.
    pub async fn open(root: &Path, run_dir: &Path) -> Result<Arc<Self>> {
        Self::open_with(root, run_dir, layer::StoreOptions::default()).await
    }

    /// Like [`Engine::open`], with options for the store.
    pub async fn open_with(
        root: &Path,
        run_dir: &Path,
        options: layer::StoreOptions,
    ) -> Result<Arc<Self>> {
        let engine = Self::new(root, run_dir, options, Arc::default())?;
        let opened = Arc::clone(&engine);
        blocking(move || opened.remove_leftovers(HashSet::new())).await?;
        engine.taken_over.send_replace(true);
        Ok(engine)
    }

    /// Like [`Engine::open`], for a daemon: it is to call [`Engine::take_over`] before anything is attached. `kept` is what the daemon before
    /// has left in the descriptor store.
    pub fn open_daemon(
        root: &Path,
        run_dir: &Path,
        kept: KeptDescriptors,
        options: layer::StoreOptions,
    ) -> Result<Arc<Self>> {
        Self::new(root, run_dir, options, Arc::new(kept))
    }

    /// Takes over the attachments and layer mounts of an engine that died, and removes unused leftovers. What was taken over needs this process
    /// from then on.
    pub async fn take_over(self: &Arc<Self>) -> Result<()> {
        let engine = Arc::clone(self);
        blocking(move || {
            engine.recover()?;
            let unmounted = engine.recover_layers()?;
            engine.remove_leftovers(engine.devices.end_unadopted())?;
            drop(unmounted);
            Ok(())
        })
        .await?;
        self.taken_over.send_replace(true);
        Ok(())
    }

    fn new(
        root: &Path,
        run_dir: &Path,
        options: layer::StoreOptions,
        kept: Arc<KeptDescriptors>,
    ) -> Result<Arc<Self>> {
        let (root, run_dir) = (private_directory(root)?, private_directory(run_dir)?);
        let lock = kept.lock("lock-run-dir", |inherited| {
            DirectoryLock::take(&run_dir, inherited)
        })?;
        let root_lock = kept.lock("lock-root", |inherited| lock_root(&root, inherited))?;
        let sees_all = options.record;
        let disks = Disks::open_locked(&root, root_lock, options)?;
        let tag = Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..8].to_owned();
        let records = AttachmentRecords::open(&root, &run_dir)?;
        let layer_mount_records = LayerMountRecords::open(&root)?;
        let (store, known) = (Arc::downgrade(disks.store()), records.clone());
        let of_root = root.clone();
        disks.store().set_remove_unused(move |bytes| {
            let removed = store.upgrade();
            removed.map_or(0, |store| unused::remove(&of_root, &store, &known, bytes))
        });
        let mount_ends = MountEnds::new()
            .inspect_err(|error| {
                tracing::warn!(
                    "cannot watch for unmounts, so only `socinbd detach` releases devices: {}",
                    error.report()
                );
            })
            .ok()
            .map(Arc::new);
        let engine = Arc::new_cyclic(|engine| Self {
            devices: Arc::new(Devices::new(tag, sees_all, kept, Handle::current())),
            root,
            run_dir,
            disks,
            records,
            table: Mutex::default(),
            layer_mounts: LayerMounts::default(),
            layer_mount_records,
            exposes_soci_names: AtomicBool::default(),
            restoring: tokio::sync::Mutex::default(),
            phase: watch::Sender::new(EnginePhase::Serving),
            taken_over: watch::Sender::new(false),
            tasks: TaskTracker::new(),
            following: mount_ends.as_ref().map(|ends| {
                let follow = release::follow(Arc::clone(ends), engine.clone());
                tokio::spawn(follow).abort_handle()
            }),
            mount_ends,
            _lock: lock,
        });
        Ok(engine)
    }
}

/// Creates a directory with mode 0700 if missing. Returns its absolute path without symlinks.
fn private_directory(path: &Path) -> Result<PathBuf> {
    layer::make_private(path)?;
    path.canonicalize()
        .or_kind(Kind::Io, || format!("directory {}", path.display()))
}
