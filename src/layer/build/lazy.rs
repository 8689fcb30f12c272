//! The disk of a layer for a table: the one that is there, or a new one that is laid out from it.

use std::sync::Arc;

use bytes::Bytes;

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

/// The bytes of a table. They are asked for only where no disk has been laid out from it.
pub struct TableBytes<F> {
    fetch: F,
    is_here: bool,
}

impl<F: Future<Output = Result<Bytes>>> TableBytes<F> {
    /// Those that `fetch` gives. If they are on this host (`is_here`), they are read when it is their layer's turn, so that few are in
    /// memory at a time; else they are fetched at once, beside those of other layers.
    pub fn new(fetch: F, is_here: bool) -> Self {
        Self { fetch, is_here }
    }
}

impl TableBytes<std::future::Ready<Result<Bytes>>> {
    /// These.
    pub fn of(bytes: Bytes) -> Self {
        Self::new(std::future::ready(Ok(bytes)), true)
    }
}

/// A disk that is asked for, and where its bytes are.
struct WantedDisk {
    layer: LayerBlob,
    table: Digest,
    source: Source,
    /// What a compact index says of the layer, and where its windows are.
    compact: Option<(LayerIndex, Source)>,
}

impl WantedDisk {
    fn key(&self) -> Key {
        (self.layer.digest, self.table)
    }
}

impl Store {
    /// The disk of a layer for this zTOC (by its digest): the one in memory, the one on disk, or a new one made from the zTOC's bytes.
    /// Adds `source` to the disk's sources.
    pub async fn indexed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        table: &Digest,
        ztoc: TableBytes<impl Future<Output = Result<Bytes>>>,
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

    /// As [`Self::indexed`], for the table of a compact index; `windows` is where the index's own blob is.
    pub async fn compact(
        self: &Arc<Self>,
        layer: &LayerBlob,
        index: &LayerIndex,
        table: TableBytes<impl Future<Output = Result<Bytes>>>,
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
        table: TableBytes<impl Future<Output = Result<Bytes>>>,
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
        let (_turn, bytes) = match table.is_here {
            true => (turn, table.fetch.await?),
            false => {
                drop(turn);
                let bytes = table.fetch.await?;
                (self.services().layout_permit().await, bytes)
            }
        };
        let store = Arc::clone(self);
        blocking(move || {
            let making = store.making(wanted.key());
            let _making = locked(&making);
            // another one may have made it meanwhile
            if let Some(disk) = store.known(&wanted)? {
                return Ok(disk);
            }
            let WantedDisk {
                layer,
                table,
                source,
                compact,
            } = &*wanted;
            // its directory lacks nothing but the table
            if store.mended(&layer.digest, table, &bytes)?.is_some()
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
            store.name(draft, &layer.digest, table)
        })
        .await
    }

    /// The disk that is wanted, if there is one that needs no table, with its sources noted. The caller holds the lock of the key.
    fn known(self: &Arc<Self>, wanted: &WantedDisk) -> Result<Option<Arc<Disk>>> {
        let disk = self.find_for(&wanted.layer, &wanted.table)?;
        let disk = disk.filter(|disk| !disk.table_repair().lacks_table());
        if let Some(disk) = &disk {
            disk.sources().add(&wanted.source)?;
            if let (Some(known), Some((_, windows))) =
                (disk.reader().compact_windows(), &wanted.compact)
            {
                known.sources().add(windows)?;
            }
            disk.check_when_due();
        }
        Ok(disk)
    }
}
