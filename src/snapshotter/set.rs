//! The snapshots of one socket, and what all sets share.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    errors::SnapshotError,
    images::{self, Images},
    mounts::{CONTENT, RESERVED, TEMPLATE, WORK},
    options::SnapshotterOptions,
    records::{LazyLayer, Records, Snapshot, Usage},
};
use crate::{
    blocking::blocking,
    engine::{Engine, space::snapshots},
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount,
    layer::allocated_by,
};

/// The snapshots of one socket.
pub(super) struct SnapshotSet {
    pub(super) engine: Arc<Engine>,
    pub(super) options: Arc<SnapshotterOptions>,
    pub(super) images: Arc<Images>,
    pub(super) records: Arc<Records>,
    /// Held while the corrections of a stack are made.
    pub(super) stacking: tokio::sync::Mutex<()>,
}

impl SnapshotSet {
    /// Reads the records of a set. Blocks.
    pub(super) fn open(
        engine: &Arc<Engine>,
        name: &str,
        options: &Arc<SnapshotterOptions>,
        images: &Arc<Images>,
    ) -> Result<Arc<Self>> {
        let directory = engine.root().join(snapshots::DIRECTORY).join(name);
        let path = directory.to_string_lossy();
        if path.contains(RESERVED) || path.contains(TEMPLATE) {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{}: the options of overlayfs cannot hold a path with a comma, colon, backslash or {TEMPLATE}; use another --root",
                    directory.display()
                ),
            ));
        }
        Ok(Arc::new(Self {
            engine: Arc::clone(engine),
            options: Arc::clone(options),
            images: Arc::clone(images),
            records: Arc::new(Records::open(&directory)?),
            stacking: tokio::sync::Mutex::default(),
        }))
    }

    /// The directory with the content of a snapshot.
    pub(super) fn content(&self, snapshot: &Snapshot) -> PathBuf {
        self.records.directory_of(snapshot.id).join(CONTENT)
    }

    /// Removes a snapshot, its mount and its directory.
    pub(super) async fn remove(self: &Arc<Self>, name: String) -> Result<(), SnapshotError> {
        self.engine.wait_taken_over().await;
        let records = Arc::clone(&self.records);
        let removed = run_blocking(move || records.remove(&name)).await?;
        let directory = self.records.directory_of(removed.id);
        if let Err(error) = self.remove_directory(directory).await {
            // the next cleanup tries again
            tracing::warn!(name = removed.name, "{}", error.report());
        }
        Ok(())
    }

    /// Removes the directories that no snapshot has.
    pub(super) async fn cleanup(self: &Arc<Self>) -> Result<()> {
        self.engine.wait_taken_over().await;
        let records = Arc::clone(&self.records);
        let leftovers = blocking(move || records.leftovers()).await?;
        for directory in leftovers {
            self.remove_directory(directory).await?;
        }
        Ok(())
    }

    async fn remove_directory(self: &Arc<Self>, directory: PathBuf) -> Result<()> {
        self.engine.unmount_layer(directory.join(CONTENT)).await?;
        blocking(move || {
            // with mapped owners
            mount::detach_below(&directory)?;
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).or_kind(Kind::Io, || format!("removing {}", directory.display()))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    /// Fetches all of a lazy layer that is not proven, so that it is compared with its diff ID, and waits for the comparison for some time. For
    /// `patience` the fetch gives way to readers.
    pub(super) async fn check_soon(&self, layer: LazyLayer, patience: Duration) -> Result<()> {
        let store = Arc::clone(self.engine.disks().store());
        let disk = blocking(move || match store.is_verified(&layer.blob, &layer.table) {
            true => Ok(None),
            false => store.stored_for(&layer.blob, &layer.table),
        });
        if let Some(disk) = disk.await? {
            images::check_soon(&self.engine, disk, patience).await;
        }
        Ok(())
    }

    /// What a snapshot uses on the local disk. That of a lazy layer is what its disk has, which other snapshots may share.
    pub(super) async fn usage(self: &Arc<Self>, name: String) -> Result<Usage, SnapshotError> {
        let snapshot = self.records.get(&name)?;
        if let Some(usage) = snapshot.usage {
            return Ok(usage);
        }
        let content = self.content(&snapshot);
        let set = Arc::clone(self);
        run_blocking(move || match &snapshot.layer {
            Some(layer) => {
                let store = set.engine.disks().store();
                let (size, inodes) = store.stored_usage(&layer.blob.digest, &layer.table);
                Ok(Usage { size, inodes })
            }
            None => Ok(usage_of(&content)?),
        })
        .await
    }
}

/// As [`blocking`], for work with the errors of requests.
pub(super) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, SnapshotError> {
    blocking(move || Ok(work())).await?
}

/// Makes the directories of a snapshot. Blocks.
pub(super) fn make_directories(directory: &Path) -> Result<()> {
    let make = |name: &str, mode: u32| {
        let path = directory.join(name);
        // not subject to the umask
        fs::DirBuilder::new().mode(mode).create(&path)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))
    };
    make(CONTENT, 0o755)
        .and_then(|()| make(WORK, 0o711))
        .or_kind(Kind::Io, || {
            format!(
                "making the directories of a snapshot in {}",
                directory.display()
            )
        })
}

/// What a directory uses. Blocks.
pub(super) fn usage_of(directory: &Path) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut rest = vec![directory.to_owned()];
    let mut count = |path: &Path| -> io::Result<bool> {
        let metadata = fs::symlink_metadata(path)?;
        if metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
            usage.inodes += 1;
            usage.size = usage.size.saturating_add(allocated_by(&metadata));
        }
        Ok(metadata.is_dir())
    };
    while let Some(path) = rest.pop() {
        let listed = count(&path).and_then(|is_directory| {
            if is_directory {
                for entry in fs::read_dir(&path)? {
                    rest.push(entry?.path());
                }
            }
            Ok(())
        });
        match listed {
            // a container changes its files meanwhile
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).or_kind(Kind::Io, || format!("reading {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(usage)
}
