//! The lower layers of a snapshot: its parents, with their lazy layers mounted or on devices, and what corrects the overlay over them.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    errors::SnapshotError,
    labels::LayerRequest,
    mounts::{Lowers, MAX_MANAGED, owners},
    records::{LazyLayer, Snapshot},
    set::{SnapshotSet, run_blocking},
};
use crate::{
    blocking::blocking,
    engine::{
        LayerMounter,
        attach::stack::directories::{
            Corrections, LayerPlace, PlacedLayer, copy_attributes, make_corrections,
        },
        open::opened::{LAYERS_AT_ONCE, OpenedLayer},
    },
    error::{Error, Kind, Result, ResultExt as _},
    layer::{Disk, StackingFacts, seal_json, unseal_json},
    oci::Digest,
    regular_file,
};

/// Maximum time until a layer is opened from its registry again.
const OPEN_TIME: Duration = Duration::from_secs(20);
/// The version of the file about a stack.
const VERSION: u32 = 1;
/// The file about the stack of a snapshot and its parents, in the directory of the snapshot.
const STACK: &str = "stack.json";
/// Maximum size of the file.
const MAX_STACK_BYTES: u64 = 4096;

/// What the stack of a snapshot and its parents needs: it is made once, because overlays use the top tree.
#[derive(Serialize, Deserialize)]
struct StackRecord {
    version: u32,
    /// Of the tables of all disks in the stack.
    tables: Digest,
    layers: usize,
    has_top: bool,
}

impl SnapshotSet {
    /// The lower layers of a snapshot; none without a parent. Its lazy layers are mounted or have devices, and its owners are mapped. If the
    /// directory of the snapshot is new, it gets the attributes of the directory below it, which it hides.
    pub(super) async fn lowers(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        is_new: bool,
    ) -> Result<Lowers, SnapshotError> {
        self.engine.wait_taken_over().await;
        let maps = self.maps(snapshot)?;
        let parent = snapshot.parent.as_deref().unwrap_or_default();
        let places = self.places(parent).await?;
        let (directory, content) = (
            self.records.directory_of(snapshot.id),
            self.content(snapshot),
        );
        run_blocking(move || {
            if let Some(lower) = places.first().filter(|_| is_new) {
                copy_attributes(lower, &content)?;
                if let Some(maps) = &maps {
                    owners::map_owner(&content, maps)?;
                }
            }
            let lowers = Lowers { places, maps };
            match &lowers.maps {
                Some(maps) if !lowers.has_device() => Ok(Lowers {
                    places: owners::mount_mapped(&directory, &lowers.places, maps)?,
                    maps: None,
                }),
                _ => Ok(lowers),
            }
        })
        .await
    }

    /// The places of a snapshot and those below it, topmost first.
    async fn places(self: &Arc<Self>, parent: &str) -> Result<Vec<LayerPlace>, SnapshotError> {
        let chain = self.records.chain(parent)?;
        let Some(topmost) = chain
            .first()
            .filter(|_| chain.iter().any(|it| it.layer.is_some()))
        else {
            return Ok(chain
                .iter()
                .map(|snapshot| LayerPlace::Directory(self.content(snapshot)))
                .collect());
        };
        // besides, there are the directory of the snapshot and perhaps a top tree
        let mounter = match chain.len() + 2 <= MAX_MANAGED {
            true => self.options.layer_mounts,
            false => LayerMounter::Daemon,
        };
        let placing: Vec<_> = once_each(&chain)
            .into_iter()
            .map(|snapshot| self.place(snapshot, mounter))
            .collect();
        let placed: Vec<(PlacedLayer, Option<Digest>)> = futures_util::stream::iter(placing)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        let tables: Vec<String> = placed
            .iter()
            .map(|(_, table)| table.map_or_else(String::new, |table| table.to_string()))
            .collect();
        let tables = Digest::of(tables.join(" ").as_bytes());
        let placed: Vec<PlacedLayer> = placed.into_iter().map(|(layer, _)| layer).collect();
        let mut lowers: Vec<LayerPlace> = placed.iter().map(|it| it.place.clone()).collect();
        let directory = self.records.directory_of(topmost.id);
        let top = directory.join(format!("top-{}", &tables.hex()[..8]));
        let corrections = {
            let _one_at_a_time = self.stacking.lock().await;
            let top = top.clone();
            blocking(move || corrections(&directory, &placed, tables, &top)).await?
        };
        lowers.truncate(corrections.layers);
        if corrections.has_top {
            lowers.insert(0, LayerPlace::Directory(top));
        }
        Ok(lowers)
    }

    /// The content of a snapshot, and the table of its disk.
    async fn place(
        self: &Arc<Self>,
        snapshot: Arc<Snapshot>,
        mounter: LayerMounter,
    ) -> Result<(PlacedLayer, Option<Digest>)> {
        let path = self.content(&snapshot);
        let Some(layer) = &snapshot.layer else {
            let (place, facts) = (LayerPlace::Directory(path), StackingFacts::default());
            return Ok((PlacedLayer { place, facts }, None));
        };
        let served = self.engine.layer_at(&path, mounter);
        let (place, disk) = match served.filter(|(_, disk)| !disk.is_table_false()) {
            Some(served) => served,
            None => self
                .mount(&snapshot, layer, mounter)
                .await
                .map_err(|error| {
                    error.context(format!("layer {} of {}", layer.blob.digest, layer.image))
                })?,
        };
        let table = *disk.table();
        let facts = blocking(move || disk.stacking()).await?;
        Ok((PlacedLayer { place, facts }, Some(table)))
    }

    /// Mounts the disk of a layer, or makes its device. If its table was shown to be false, the layer is opened again from its registry, without that table.
    async fn mount(
        self: &Arc<Self>,
        snapshot: &Arc<Snapshot>,
        layer: &LazyLayer,
        mounter: LayerMounter,
    ) -> Result<(LayerPlace, Arc<Disk>)> {
        let (store, blob, table) = (
            Arc::clone(self.engine.disks().store()),
            layer.blob.clone(),
            layer.table,
        );
        let stored = blocking(move || store.stored_for(&blob, &table)).await;
        let opened = match stored {
            Ok(Some(disk)) => OpenedLayer {
                disk,
                basis: layer.basis.clone(),
            },
            Ok(None) => self.open_again(layer).await?,
            Err(error) if error.kind() == Kind::Corrupt => {
                self.open_again(layer).await.map_err(|again| {
                    error.context(format!(
                        "and it cannot be opened again ({})",
                        again.report()
                    ))
                })?
            }
            Err(error) => return Err(error),
        };
        let (disk, path) = (Arc::clone(&opened.disk), self.content(snapshot));
        if *disk.table() != layer.table {
            // containers that run keep the file system of the disk before
            self.engine.unmount_layer(path.clone()).await?;
            let (records, name) = (Arc::clone(&self.records), snapshot.name.clone());
            let layer = LazyLayer {
                table: *disk.table(),
                basis: opened.basis.clone(),
                ..layer.clone()
            };
            run_blocking(move || records.set_layer(&name, layer))
                .await
                .map_err(|error| Error::with_source(Kind::Io, "changing a record", error))?;
        }
        let choice = self.options.device;
        let mounted = self.engine.mount_layer(opened, choice, path, mounter);
        Ok((mounted.await?, disk))
    }

    /// Opens a layer from its registry, as when it was pulled.
    async fn open_again(self: &Arc<Self>, layer: &LazyLayer) -> Result<OpenedLayer> {
        let request = LayerRequest {
            image: layer.image.clone(),
            manifest: layer.manifest,
            layer: layer.blob.digest,
            index: None,
            pull: None,
            named: None,
            headers: BTreeMap::new(),
        };
        let opened = self.open_layer(&request, layer).await?;
        if !opened.disk.is_table_false() {
            return Ok(opened);
        }
        // it was open before its table was shown to be false
        drop(opened);
        self.images.forget(&request);
        self.open_layer(&request, layer).await
    }

    async fn open_layer(
        self: &Arc<Self>,
        request: &LayerRequest,
        layer: &LazyLayer,
    ) -> Result<OpenedLayer> {
        let shared = |error: Arc<Error>| {
            let context = "it cannot be opened from its registry";
            Error::with_source(error.kind(), context, error)
        };
        let open = self.images.open_again(request).map_err(shared)?;
        let image = within(open.image()).await.map_err(shared)?;
        let position = image
            .position(&layer.blob.digest, &layer.chain_id)
            .ok_or_else(|| Error::new(Kind::Corrupt, "its image has no such layer any more"))?;
        let opened = within(open.layer(&image, position)).await;
        let opened = opened.map_err(shared)?;
        self.compare_soon(&opened.disk);
        Ok(OpenedLayer {
            disk: opened.disk,
            basis: opened.basis,
        })
    }
}

/// Waits for a layer that is opened from its registry again.
async fn within<T>(opening: impl Future<Output = Result<T, Arc<Error>>>) -> Result<T, Arc<Error>> {
    timeout(OPEN_TIME, opening).await.unwrap_or_else(|_| {
        let why = format!("no source has answered within {} s", OPEN_TIME.as_secs());
        Err(Arc::new(Error::new(Kind::Unavailable, why)))
    })
}

/// The snapshots to stack, topmost first. Of a repeated lazy layer only the topmost one is stacked: overlayfs refuses one file system twice,
/// and the lower one would show the same content.
fn once_each(chain: &[Arc<Snapshot>]) -> Vec<Arc<Snapshot>> {
    let mut seen = HashSet::new();
    let is_first = |snapshot: &&Arc<Snapshot>| {
        let layer = snapshot.layer.as_ref();
        layer.is_none_or(|layer| seen.insert((layer.blob.digest, layer.table)))
    };
    chain.iter().filter(is_first).cloned().collect()
}

/// The corrections of a stack of disks with these tables, made at most once. Blocks.
fn corrections(
    directory: &Path,
    layers: &[PlacedLayer],
    tables: Digest,
    top: &Path,
) -> Result<Corrections> {
    let file = directory.join(STACK);
    let record = regular_file::read(&file, MAX_STACK_BYTES).ok();
    let record = record.and_then(|bytes| unseal_json::<StackRecord>(&bytes));
    if let Some(record) = record
        && (record.version, record.tables) == (VERSION, tables)
        && (1..=layers.len()).contains(&record.layers)
    {
        return Ok(Corrections {
            layers: record.layers,
            has_top: record.has_top,
        });
    }
    let context = || {
        format!(
            "making the corrections of a stack in {}",
            directory.display()
        )
    };
    // without the file no overlay uses what is there
    match fs::remove_dir_all(top) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).or_kind(Kind::Io, context);
        }
        _ => {}
    }
    let made = make_corrections(layers, top)?;
    let write = || -> std::io::Result<()> {
        let record = seal_json(&StackRecord {
            version: VERSION,
            tables,
            layers: made.layers,
            has_top: made.has_top,
        })?;
        regular_file::replace_synced(&file, &record)
    };
    write().or_kind(Kind::Io, context)?;
    Ok(made)
}
