//! Opens an engine: locks the root and the runtime directory, and cleans up after an engine that died.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use tokio::{runtime::Handle, sync::watch};
use tokio_util::task::TaskTracker;

use super::{
    devices::{Devices, kept::KeptDescriptors},
    engine::Engine,
    records::AttachmentRecords,
    release,
};
use crate::{
    blocking::blocking,
    engine::open::disks::Disks,
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount::end::MountEnds,
    layer,
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
        blocking(move || opened.remove_leftovers()).await?;
        Ok(engine)
    }

    /// Like [`Engine::open`], and takes over the attachments of an engine that died. For a daemon: an attachment that was taken over needs it
    /// from then on.
    pub async fn open_daemon(
        root: &Path,
        run_dir: &Path,
        kept: KeptDescriptors,
    ) -> Result<Arc<Self>> {
        let kept = Arc::new(kept);
        let options = layer::StoreOptions::default();
        let engine = Self::new(root, run_dir, options, Arc::clone(&kept))?;
        let opened = Arc::clone(&engine);
        blocking(move || {
            opened.recover()?;
            kept.remove_rest();
            opened.remove_leftovers()
        })
        .await?;
        Ok(engine)
    }

    fn new(
        root: &Path,
        run_dir: &Path,
        options: layer::StoreOptions,
        kept: Arc<KeptDescriptors>,
    ) -> Result<Arc<Self>> {
        let (root, run_dir) = (private_directory(root)?, private_directory(run_dir)?);
        let lock_path = run_dir.join("lock");
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path);
        let lock = lock.or_kind(Kind::Io, || format!("opening {}", lock_path.display()))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "another daemon uses {}; use that daemon, or give this one its own --run-dir and --root",
                    run_dir.display()
                ),
            ));
        }
        let sees_all = options.record;
        let disks = Disks::open_with(&root, options)?;
        let tag = Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..8].to_owned();
        let records = AttachmentRecords::open(&root, &run_dir)?;
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
            is_ending: watch::Sender::new(false),
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
