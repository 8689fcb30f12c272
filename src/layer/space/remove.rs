//! Measures and removes the directories of disks, open or not.

use std::{
    fs,
    sync::{Arc, TryLockError},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    error::Result,
    layer::{
        locked::locked,
        space::{budget::DiskLimits, evict::SpaceStatus, measure::allocated},
        store::Store,
        stored::directory::{self, STATE},
    },
    oci::Digest,
};

impl Store {
    /// Bytes that the directory of a disk has on the file system; 0 if there is none. Blocks on local files.
    pub fn bytes_of(&self, layer: &Digest, table: &Digest) -> u64 {
        allocated(&self.place(layer, table))
    }

    /// When the state of a disk last changed. Blocks on local files.
    pub fn changed(&self, layer: &Digest, table: &Digest) -> SystemTime {
        let metadata = fs::symlink_metadata(self.place(layer, table).join(STATE));
        metadata
            .and_then(|metadata| metadata.modified())
            .unwrap_or(UNIX_EPOCH)
    }

    /// Sets how the least recently used layers are removed that nobody uses, when the disk limit is reached: the function gets the number of
    /// bytes that are needed, and returns how many it has removed. Only the first call counts.
    pub fn set_remove_unused(&self, remove: impl Fn(u64) -> u64 + Send + Sync + 'static) {
        self.services().space().set_remove_unused(Box::new(remove));
    }

    /// The limits of the local disk, and what was evicted.
    pub fn space_status(&self) -> SpaceStatus {
        self.services().space().status()
    }

    /// Sets the limits of the local disk. Blocks on local files.
    pub fn set_disk_limits(&self, limits: DiskLimits) -> Result<()> {
        let budget = self.services().space().budget();
        budget.set_limits(limits);
        if limits.is_on() {
            for (layer, table) in self.directories()? {
                budget.set((layer, table), self.bytes_of(&layer, &table));
            }
        }
        Ok(())
    }

    /// The bytes that [`Self::remove`] would free; `None`: the disk is open, or there is none.
    pub fn removable(self: &Arc<Self>, layer: &Digest, table: &Digest) -> Option<u64> {
        let making = self.making((*layer, *table));
        let _making = locked(&making);
        self.unused_bytes(layer, table)
    }

    /// Removes the disk of a layer and table. Returns the bytes that it had; `None`: the disk is open, or there is none. Blocks on local
    /// files.
    pub fn remove(self: &Arc<Self>, layer: &Digest, table: &Digest) -> Result<Option<u64>> {
        let making = self.making((*layer, *table));
        // not waited for: a disk that is being made or opened is used
        let _making = match making.try_lock() {
            Ok(making) => making,
            Err(TryLockError::Poisoned(making)) => making.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        let Some(bytes) = self.unused_bytes(layer, table) else {
            return Ok(None);
        };
        let place = self.place(layer, table);
        directory::discard(&self.services().new_directory(), &place)?;
        self.services().space().budget().set((*layer, *table), 0);
        // the directory of the layer, if this was its last disk; another disk may be made there at this moment
        if let Some(of_layer) = place.parent() {
            let _ = fs::remove_dir(of_layer);
        }
        Ok(Some(bytes))
    }

    /// The caller holds the lock of the key.
    fn unused_bytes(self: &Arc<Self>, layer: &Digest, table: &Digest) -> Option<u64> {
        let place = self.place(layer, table);
        let is_used = self.open_now(&(*layer, *table)).is_some();
        (!is_used && fs::symlink_metadata(&place).is_ok()).then(|| allocated(&place))
    }
}
