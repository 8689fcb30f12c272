//! Opens the disk of a layer for a table, or makes it.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};

use super::import::{self, NewTable};
use crate::{
    blocking::blocking,
    compact::manifest::LayerIndex,
    error::Result,
    layer::{
        disk::Disk,
        locked::locked,
        store::{Key, Store},
        types::LayerBlob,
    },
    oci::Digest,
    source::Source,
};

/// The bytes of a table. They are needed only if no disk was laid out from it.
pub struct TableBytes<'a> {
    /// Makes the future, which is large, when it is needed.
    fetch: Box<dyn FnOnce() -> BoxFuture<'a, Result<Bytes>> + Send + 'a>,
    is_local: bool,
}

impl<'a> TableBytes<'a> {
    /// The bytes that `fetch` returns. If they are on this host (`is_local`), they are read when the disk of their layer is made, so that
    /// few tables are in memory at a time. Otherwise they are fetched at once, concurrently with those of other layers.
    pub fn new<F>(fetch: impl FnOnce() -> F + Send + 'a, is_local: bool) -> Self
    where
        F: Future<Output = Result<Bytes>> + Send + 'a,
    {
        Self {
            fetch: Box::new(move || fetch().boxed()),
            is_local,
        }
    }

    /// Bytes in memory.
    pub fn of(bytes: Bytes) -> Self {
        Self::new(|| std::future::ready(Ok(bytes)), true)
    }
}

/// A disk to open or to make, and the sources of its layer.
struct WantedDisk {
    layer: LayerBlob,
    table: Digest,
    source: Source,
    /// The compact index's description of the layer, and the source of its windows.
    compact: Option<(LayerIndex, Source)>,
}

impl WantedDisk {
    fn key(&self) -> Key {
        (self.layer.digest, self.table)
    }
}

impl Store {
    /// The disk of a layer for the zTOC with this digest: the open disk, the stored disk, or a new one made from the bytes of the zTOC.
    /// Adds `source` to the disk's sources.
    pub async fn indexed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        table: &Digest,
        ztoc: TableBytes<'_>,
        source: &Source,
    ) -> Result<Arc<Disk>> {
        let wanted = WantedDisk {
            layer: layer.clone(),
            table: *table,
            source: source.clone(),
            compact: None,
        };
        self.laid_out(wanted, ztoc).await
    }

    /// As [`Self::indexed`], for the table of a compact index. `windows` is the source of the compact index.
    pub async fn compact(
        self: &Arc<Self>,
        layer: &LayerBlob,
        index: &LayerIndex,
        table: TableBytes<'_>,
        windows: &Source,
        source: &Source,
    ) -> Result<Arc<Disk>> {
        let wanted = WantedDisk {
            layer: layer.clone(),
            table: index.table,
            source: source.clone(),
            compact: Some((*index, windows.clone())),
        };
        self.laid_out(wanted, table).await
    }

    async fn laid_out(
        self: &Arc<Self>,
        wanted: WantedDisk,
        table: TableBytes<'_>,
    ) -> Result<Arc<Disk>> {
        self.services().enter();
        let wanted = Arc::new(wanted);
        let (store, asked) = (Arc::clone(self), Arc::clone(&wanted));
        let turn = self.services().layout_permit().await;
        let known = blocking(move || {
            let making = store.making(asked.key());
            let _making = locked(&making);
            store.known(&asked)
        });
        if let Some(disk) = known.await? {
            return Ok(disk);
        }
        let (_turn, bytes) = match table.is_local {
            true => (turn, (table.fetch)().await?),
            false => {
                drop(turn);
                let bytes = (table.fetch)().await?;
                (self.services().layout_permit().await, bytes)
            }
        };
        let store = Arc::clone(self);
        blocking(move || {
            let making = store.making(wanted.key());
            let _making = locked(&making);
            // another caller may have made it meanwhile
            if let Some(disk) = store.known(&wanted)? {
                return Ok(disk);
            }
            let WantedDisk {
                layer,
                table,
                source,
                compact,
            } = &*wanted;
            // its directory may lack only the table
            if store.repair(&layer.digest, table, &bytes)?.is_some()
                && let Some(disk) = store.known(&wanted)?
            {
                return Ok(disk);
            }
            let new = match compact {
                None => NewTable::Ztoc(bytes),
                Some((index, windows)) => NewTable::Compact(bytes, *index, windows.clone()),
            };
            let draft = import::indexed(
                &store.services().new_directory(),
                layer,
                table,
                &new,
                source,
            )
            .map_err(|error| {
                error.context(format!(
                    "layer {} cannot be laid out from the {} {table}",
                    layer.digest,
                    new.name()
                ))
            })?;
            let disk = store.name(draft, &layer.digest, table)?;
            // what is stored of a source lacks passwords and headers
            add_sources(&disk, &wanted)?;
            Ok(disk)
        })
        .await
    }

    /// The existing disk, if it does not need its table; adds the sources. The caller holds the lock of the key.
    fn known(self: &Arc<Self>, wanted: &WantedDisk) -> Result<Option<Arc<Disk>>> {
        let disk = self.find_for(&wanted.layer, &wanted.table)?;
        let disk = disk.filter(|disk| !disk.table_repair().lacks_table());
        if let Some(disk) = &disk {
            add_sources(disk, wanted)?;
            disk.check_when_due();
        }
        Ok(disk)
    }
}

/// Adds the sources of a wanted disk to those of the disk.
fn add_sources(disk: &Disk, wanted: &WantedDisk) -> Result<()> {
    disk.sources().add(&wanted.source)?;
    if let (Some(known), Some((_, windows))) = (disk.reader().compact_windows(), &wanted.compact) {
        known.sources().add(windows)?;
    }
    Ok(())
}
