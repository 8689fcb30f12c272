//! All disks below a root, open or not.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
};

use bytes::Bytes;

use super::{
    ahead::{
        fill,
        recording::{Touch, Touches},
    },
    build::streams::Streams,
    disk::{Disk, open::OpenCheck},
    lock::{DirectoryLock, lock_root},
    locked::locked,
    repair::from_table::{self, DirectoryRepair},
    services::{Services, StoreOptions},
    space::measure::allocated,
    stored::{
        directory::{self, DiskDirectory, DiskDraft},
        seal::Damage,
        span_record,
    },
    types::{LayerBlob, StoreLoad, StoredDisk},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::Digest,
    source::Limits,
};

/// A layer, and the table that its disk was laid out from.
pub(crate) type Key = (Digest, Digest);

/// The directory of all disks below a root. A lock allows one store per root.
pub struct Store {
    services: Arc<Services>,
    open: Mutex<HashMap<Key, Weak<Disk>>>,
    /// Held while a disk of the key is made or opened.
    making: Mutex<HashMap<Key, Weak<Mutex<()>>>>,
    pub(super) streams: Streams,
}

impl Store {
    /// Sets what is called for a layer that was found not to have its diff ID, with the digest of its table. Only the first call counts.
    pub fn set_on_false_layer(&self, tell: impl Fn(&LayerBlob, &Digest) + Send + Sync + 'static) {
        self.services.set_on_false_layer(Box::new(tell));
    }

    /// Opens (and makes, 0700) the store; an error of kind `Busy` when another process has it.
    pub fn open(root: &Path) -> Result<Arc<Self>> {
        Self::open_with(root, StoreOptions::default())
    }

    /// As [`Self::open`], with options.
    pub fn open_with(root: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        Self::open_locked(root, lock_root(root, None)?, options)
    }

    /// As [`Self::open_with`], for a process that has the lock of the root.
    pub fn open_locked(
        root: &Path,
        lock: DirectoryLock,
        options: StoreOptions,
    ) -> Result<Arc<Self>> {
        let limits = options.disk_limits;
        let store = Self {
            services: Services::start(root, lock, options)?,
            open: Mutex::default(),
            making: Mutex::default(),
            streams: Streams::default(),
        };
        if limits.is_on() {
            store.set_disk_limits(limits)?;
        }
        Ok(Arc::new(store))
    }

    /// The time limits of requests to the sources of its disks.
    pub fn limits(&self) -> Limits {
        self.services.options().limits
    }

    /// The services that its disks share.
    pub(super) fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// The disk of a layer and table that is open or stored; `None`: there is none. Needs no source. Blocks on local files.
    pub fn stored(self: &Arc<Self>, layer: &Digest, table: &Digest) -> Result<Option<Arc<Disk>>> {
        let making = self.making((*layer, *table));
        let _making = locked(&making);
        self.find(layer, table, OpenCheck::All)
    }

    /// As [`Self::stored`], for an image that was attached before a restart and whose readers wait: the windows of the disk are not read
    /// first.
    pub fn stored_after_restart(
        self: &Arc<Self>,
        layer: &Digest,
        table: &Digest,
    ) -> Result<Option<Arc<Disk>>> {
        let making = self.making((*layer, *table));
        let _making = locked(&making);
        self.find(layer, table, OpenCheck::Metadata)
    }

    /// As [`Self::stored`], for an image that has the layer. An error of kind `Corrupt`: the table was shown to be false, or an open disk
    /// was made for an image that states another diff ID of the same blob. One of these images is false, so they do not share the disk.
    pub fn stored_for(
        self: &Arc<Self>,
        layer: &LayerBlob,
        table: &Digest,
    ) -> Result<Option<Arc<Disk>>> {
        let making = self.making((layer.digest, *table));
        let _making = locked(&making);
        self.find_for(layer, table)
    }

    /// As [`Self::stored_for`]; the caller holds the lock of the key.
    pub(super) fn find_for(
        self: &Arc<Self>,
        layer: &LayerBlob,
        table: &Digest,
    ) -> Result<Option<Arc<Disk>>> {
        let Some(disk) = self.find(&layer.digest, table, OpenCheck::All)? else {
            return Ok(None);
        };
        if disk.layer() != layer {
            if Arc::strong_count(&disk) > 1 {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!(
                        "an attached image states the diff ID {} of the layer, but this one {}",
                        disk.layer().diff_id,
                        layer.diff_id
                    ),
                ));
            }
            drop(disk);
            directory::discard(
                &self.services.new_directory(),
                &self.place(&layer.digest, table),
            )?;
            return Ok(None);
        }
        if let Some(why) = disk.record().refuted() {
            return Err(Error::new(
                Kind::Corrupt,
                format!("its table {table} was shown to be false: {why}"),
            ));
        }
        Ok(Some(disk))
    }

    /// The open disk of a key. A disk whose directory was removed stays open for its users only.
    pub(super) fn open_now(&self, key: &Key) -> Option<Arc<Disk>> {
        let open = locked(&self.open).get(key).and_then(Weak::upgrade);
        open.filter(|disk| disk.has_its_directory())
    }

    /// As [`Self::stored`]; the caller holds the lock of the key.
    fn find(
        self: &Arc<Self>,
        layer: &Digest,
        table: &Digest,
        check: OpenCheck,
    ) -> Result<Option<Arc<Disk>>> {
        let key = (*layer, *table);
        if let Some(disk) = self.open_now(&key) {
            return Ok(Some(disk));
        }
        let place = self.place(layer, table);
        // a link without a target is there, too
        if fs::symlink_metadata(&place).is_err() {
            return Ok(None);
        }
        match self.open_disk(layer, table, check) {
            Ok(disk) => Ok(Some(disk)),
            Err(error) if Damage::is_in(&error) => {
                tracing::warn!("{}", error.report());
                let directory = DiskDirectory::new(place);
                let repair =
                    from_table::from_stored_table(&self.services.new_directory(), &directory)?;
                self.reopen(layer, table, repair)
            }
            Err(error) if error.kind() == Kind::Corrupt => self.discard(layer, table, &error),
            Err(error) => Err(error),
        }
    }

    /// Repairs the directory of a disk with the bytes of its table, and returns the disk; `None`: there is no directory, or it was removed.
    /// The caller holds the lock of the key.
    pub(super) fn repair(
        self: &Arc<Self>,
        layer: &Digest,
        table: &Digest,
        bytes: &Bytes,
    ) -> Result<Option<Arc<Disk>>> {
        let directory = DiskDirectory::new(self.place(layer, table));
        let state = match directory.state() {
            Ok(state) => state,
            Err(error) if error.kind() == Kind::Corrupt => return Ok(None),
            Err(error) => return Err(error),
        };
        if Digest::of(bytes) != *table {
            return Ok(None); // making a disk from these bytes reports the error
        }
        let repair =
            from_table::from_table(&self.services.new_directory(), &directory, &state, bytes)?;
        let disk = self.reopen(layer, table, repair)?;
        if let Some(disk) = &disk {
            disk.table_repair().table_is_restored();
        }
        Ok(disk)
    }

    /// The disk of a repaired directory; `None`: its table is missing, and the caller has to fetch it, or the directory was removed.
    fn reopen(
        self: &Arc<Self>,
        layer: &Digest,
        table: &Digest,
        repair: DirectoryRepair,
    ) -> Result<Option<Arc<Disk>>> {
        let error = match repair {
            DirectoryRepair::LacksTable(error) => {
                tracing::warn!("{}", error.report());
                return Ok(None);
            }
            DirectoryRepair::Impossible(error) => error,
            DirectoryRepair::Done(what) => {
                let open = self.open_now(&(*layer, *table));
                match open.map_or_else(|| self.open_disk(layer, table, OpenCheck::All), Ok) {
                    Ok(disk) => {
                        disk.table_repair().add_repairs(what);
                        return Ok(Some(disk));
                    }
                    Err(error) if error.kind() == Kind::Corrupt => error,
                    Err(error) => return Err(error),
                }
            }
        };
        self.discard(layer, table, &error)
    }

    /// Removes a directory that cannot be served: the disk is made again.
    fn discard(&self, layer: &Digest, table: &Digest, why: &Error) -> Result<Option<Arc<Disk>>> {
        tracing::warn!(
            "a layer's disk is removed, and made again when it is needed: {}",
            why.report()
        );
        directory::discard(&self.services.new_directory(), &self.place(layer, table))?;
        Ok(None)
    }

    /// A disk of this layer that was checked in full against the layer's digest or diff ID, if there is one: it may serve any image. Blocks
    /// on local files.
    pub fn verified(self: &Arc<Self>, layer: &LayerBlob) -> Result<Option<Arc<Disk>>> {
        for stored in self.disks_of(&layer.digest) {
            // another diff ID for the same blob: one of the two images is false
            if stored.verified
                && stored.layer.diff_id == layer.diff_id
                && let Some(disk) = self.stored(&layer.digest, &stored.table)?
            {
                return Ok(Some(disk));
            }
        }
        Ok(None)
    }

    /// Whether the disk of a layer and table was checked in full against this layer, open or not. Blocks on local files.
    pub fn is_verified(self: &Arc<Self>, layer: &LayerBlob, table: &Digest) -> bool {
        let stored = self.disks_of(&layer.digest).into_iter();
        let mut stored = stored.filter(|stored| stored.table == *table);
        stored.any(|stored| stored.verified && stored.layer.diff_id == layer.diff_id)
    }

    /// What the directory of a layer and table has on the local disk: bytes and inodes. None: 0.
    pub fn stored_usage(&self, layer: &Digest, table: &Digest) -> (u64, u64) {
        let directory = self.place(layer, table);
        let files = std::fs::read_dir(&directory).map_or(0, |files| files.count() as u64 + 1);
        (allocated(&directory), files)
    }

    /// The spans that were read, in the order of their first read; none without [`StoreOptions::record`].
    pub fn touches(&self) -> Vec<Touch> {
        let recording = self.services.recording();
        recording.map_or_else(Vec::new, Touches::in_order)
    }

    /// The disks that are open.
    pub fn open_disks(&self) -> Vec<Arc<Disk>> {
        locked(&self.open)
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// What waits and what is in use at the moment, over all disks.
    pub fn load(&self) -> StoreLoad {
        let (reads_waiting, background_fetches) = self.services.traffic().counts();
        StoreLoad {
            reads_waiting: reads_waiting as u64,
            background_fetches: background_fetches as u64,
            decodes_waiting: self.services.decoders().waiting() as u64,
            fetch_memory_bytes: self.services.memory_in_use(),
            held_bytes: self.services.held_spans().lock().bytes(),
        }
    }

    /// Sets that these are the disks of one image: their lost and saved time is counted together.
    pub fn belong_together<'a>(&self, disks: impl Iterator<Item = &'a Arc<Disk>>) {
        fill::share_ledger(disks);
    }

    /// All disks, open or not, ordered by layer and table. Blocks on local files.
    pub fn list(self: &Arc<Self>) -> Result<Vec<StoredDisk>> {
        let mut disks = Vec::new();
        for layer in digests_in(&self.services.layers().join("sha256"))? {
            disks.extend(self.disks_of(&layer));
        }
        Ok(disks)
    }

    /// The directories of all disks, also of those that cannot be served: their layers and tables. Blocks on local files.
    pub fn directories(&self) -> Result<Vec<(Digest, Digest)>> {
        let layers = self.services.layers().join("sha256");
        let mut directories = Vec::new();
        for layer in digests_in(&layers)? {
            let tables = self.tables_of(&layer);
            directories.extend(tables.into_iter().map(|table| (layer, table)));
        }
        Ok(directories)
    }

    /// The tables that a layer has disks of. A layer whose directory cannot be listed has none: this must not affect other layers.
    fn tables_of(&self, layer: &Digest) -> Vec<Digest> {
        let directory = self.services.layers().join("sha256").join(layer.hex());
        digests_in(&directory).unwrap_or_else(|error| {
            tracing::warn!(
                "the disks of a layer are not used; the next attach of an image with the layer makes a new one: {}",
                error.report()
            );
            Vec::new()
        })
    }

    /// The disks of a layer.
    fn disks_of(self: &Arc<Self>, layer: &Digest) -> Vec<StoredDisk> {
        let mut disks = Vec::new();
        for table in self.tables_of(layer) {
            let directory = DiskDirectory::new(self.place(layer, &table));
            let Ok(state) = directory.state() else {
                continue; // removed when the disk is opened
            };
            let open = self.open_now(&(*layer, table));
            let present = match &open {
                Some(disk) => disk.span_counts().0,
                None if state.complete => state.spans,
                None => directory
                    .read(directory::SPANS)
                    .map_or(0, |bytes| span_record::count_present(&bytes, state.spans)),
            };
            disks.push(StoredDisk {
                table,
                size: state.disk_size,
                complete: open
                    .as_ref()
                    .map_or(state.complete, |disk| disk.is_complete()),
                verified: open.map_or(state.verified, |disk| disk.is_verified()),
                spans_present: present,
                spans: state.spans,
                layer: state.layer,
            });
        }
        disks
    }

    /// Opens a disk that is not open. The caller holds the lock of the key: one directory must not have two open disks.
    fn open_disk(
        self: &Arc<Self>,
        layer: &Digest,
        table: &Digest,
        check: OpenCheck,
    ) -> Result<Arc<Disk>> {
        let disk = Disk::open(
            &self.services,
            DiskDirectory::new(self.place(layer, table)),
            check,
        )?;
        if (disk.layer().digest, *disk.table()) != (*layer, *table) {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{} is another layer's disk", disk.path().display()),
            ));
        }
        let mut open = locked(&self.open);
        open.retain(|_, disk| disk.strong_count() > 0);
        open.insert((*layer, *table), Arc::downgrade(&disk));
        Ok(disk)
    }

    /// Publishes a draft and opens it, or opens the existing disk of its key.
    pub(super) fn publish(
        self: &Arc<Self>,
        draft: DiskDraft,
        layer: &Digest,
        table: &Digest,
    ) -> Result<Arc<Disk>> {
        let making = self.making((*layer, *table));
        let _making = locked(&making);
        match self.find(layer, table, OpenCheck::All)? {
            Some(disk) => Ok(disk),
            None => self.name(draft, layer, table),
        }
    }

    /// Publishes a draft whose key has no disk, and opens it. The caller holds the lock of the key.
    pub(super) fn name(
        self: &Arc<Self>,
        draft: DiskDraft,
        layer: &Digest,
        table: &Digest,
    ) -> Result<Arc<Disk>> {
        draft.publish(&self.place(layer, table))?;
        let disk = self.open_disk(layer, table, OpenCheck::New)?;
        self.services.sync_later(disk.as_synced());
        Ok(disk)
    }

    /// The lock of a key, for making or opening its disk.
    pub(super) fn making(&self, key: Key) -> Arc<Mutex<()>> {
        let mut making = locked(&self.making);
        making.retain(|_, lock| lock.strong_count() > 0);
        let entry = making.entry(key).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let lock = Arc::new(Mutex::new(()));
            *entry = Arc::downgrade(&lock);
            lock
        })
    }
}

impl Store {
    /// A disk's directory.
    pub(super) fn place(&self, layer: &Digest, table: &Digest) -> PathBuf {
        self.services
            .layers()
            .join("sha256")
            .join(layer.hex())
            .join(table.hex())
    }
}

/// The names of a directory that are digests, sorted; none if the directory is missing.
fn digests_in(directory: &Path) -> Result<Vec<Digest>> {
    let io = || format!("cannot list {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.or_kind(Kind::Io, io)?,
    };
    let mut digests = Vec::new();
    for entry in entries {
        let name = entry.or_kind(Kind::Io, io)?.file_name();
        let digest = name
            .to_str()
            .and_then(|name| format!("sha256:{name}").parse::<Digest>().ok());
        digests.extend(digest);
    }
    digests.sort();
    Ok(digests)
}
