//! Opens the disks of an image. Needs no privilege.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::Semaphore;

use super::{
    compact_index::CompactIndex,
    image::Image,
    local_indexes::LocalIndexes,
    opened::{DiskBasis, LAYERS_AT_ONCE, OnOpenEvent, OpenEvent, OpenedImage, OpenedLayer},
    policy::{IndexChoice, IndexPolicy},
    prefetch,
    search::{self, FoundIndexes},
    soci_index::SociIndex,
};
use crate::{
    compact::manifest::LayerIndex,
    error::{Error, Kind, Result, ResultExt},
    layer::{Disk, LayerBlob, Store, StoreOptions, TableBytes},
    oci::{Digest, Platform, Reference},
    source::{Access, Source},
};

/// Number of layers that are streamed in parallel; each has several connections and a decoder.
const STREAMS_AT_ONCE: usize = 3;

/// The disks and the local indexes of a root.
pub struct Disks {
    root: PathBuf,
    store: Arc<Store>,
}

impl Disks {
    /// Opens a root. `Busy` if another process uses it.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with(root, StoreOptions::default())
    }

    /// Like [`Disks::open`], with options for the store.
    pub fn open_with(root: &Path, options: StoreOptions) -> Result<Self> {
        Ok(Self {
            root: root.to_owned(),
            store: Store::open_with(root, options)?,
        })
    }

    /// The store of the disks.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Resolves an image, and opens or makes a disk for each of its layers: from the layer's table in the compact index, otherwise from its
    /// zTOC in the SOCI index, otherwise by streaming the layer.
    pub async fn open_image(
        &self,
        reference: &Reference,
        access: &Access,
        platform: Option<&Platform>,
        choice: &IndexChoice,
        event: OnOpenEvent<'_>,
    ) -> Result<OpenedImage> {
        let source = Source::open(reference, access).await?;
        let image = Image::resolve(&source, platform).await?;
        let mut found = search::find(&image, choice, &LocalIndexes::open(&self.root)?).await?;
        let mut warnings = std::mem::take(&mut found.warnings);
        let layers = topmost_first(&image.layers);
        let indexed = layers
            .iter()
            .filter(|layer| {
                let compact = found.compact.as_ref();
                let compact = compact.and_then(|compact| compact.layer(&layer.digest));
                let index = found.index.as_ref();
                compact.is_some() || index.is_some_and(|it| it.ztoc(&layer.digest).is_some())
            })
            .count();
        event(OpenEvent::Resolved {
            layers: layers.len(),
            indexed,
        });

        let streams = Semaphore::new(STREAMS_AT_ONCE);
        let opening: Vec<_> = layers
            .into_iter()
            .map(async |layer| {
                self.layer(layer, &image.source, &found, choice, &streams, event)
                    .await
                    .map_err(|error| image.explain(&layer.digest, error))
            })
            .collect();
        let opened: Vec<(OpenedLayer, Option<String>)> = futures_util::stream::iter(opening)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        let (layers, not_lazy): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        warnings.extend(not_lazy.into_iter().flatten());
        warnings.iter().for_each(|message| {
            event(OpenEvent::Warning {
                message: message.clone(),
            })
        });
        self.store
            .belong_together(layers.iter().map(|layer| &layer.disk));
        prefetch::start(&self.store, &found, &layers);
        Ok(OpenedImage {
            image,
            index: found.index,
            compact: found.compact,
            layers,
            warnings,
        })
    }

    /// Opens the disk of a layer. Returns a warning if an index has a table for the layer that cannot be used.
    async fn layer(
        &self,
        layer: &LayerBlob,
        source: &Source,
        found: &FoundIndexes,
        choice: &IndexChoice,
        streams: &Semaphore,
        event: OnOpenEvent<'_>,
    ) -> Result<(OpenedLayer, Option<String>)> {
        let context = |error: Error| error.context(format!("layer {}", layer.digest));
        if let Some(disk) = self.store.verified(layer).map_err(context)? {
            let basis = DiskBasis::Verified;
            return Ok((OpenedLayer { disk, basis }, None));
        }
        let index = found.index.as_ref();
        let (mut why, mut warning) = (not_indexed(layer, index, choice), None);
        if let Some(compact) = &found.compact
            && let Some(part) = compact.layer(&layer.digest)
        {
            match self.compact(layer, part, source, compact).await {
                Ok(disk) => {
                    let basis = DiskBasis::Compact;
                    return Ok((OpenedLayer { disk, basis }, None));
                }
                Err(error) if is_table_error(&error) => {
                    why = error.report();
                    warning = Some(format!(
                        "layer {} cannot use the compact index: {why}",
                        layer.digest
                    ));
                }
                Err(error) => return Err(context(error)),
            }
        }
        if let Some(index) = index
            && let Some(table) = index.ztoc(&layer.digest)
        {
            match self.indexed(layer, &table, source, index).await {
                Ok(disk) => {
                    let basis = DiskBasis::Ztoc;
                    return Ok((OpenedLayer { disk, basis }, warning));
                }
                Err(error) if is_table_error(&error) => {
                    why = error.report();
                    warning = Some(format!("layer {} is not lazy: {why}", layer.digest));
                }
                Err(error) => return Err(context(error)),
            }
        }
        let _permit = streams
            .acquire()
            .await
            .or_kind(Kind::Io, || "waiting for other downloads".into())?;
        let progress = |done| {
            event(OpenEvent::Streaming {
                layer: layer.digest,
                done,
                size: layer.size,
            })
        };
        let disk = self
            .store
            .streamed(layer, source, &progress)
            .await
            .map_err(context)?;
        let basis = DiskBasis::Whole { why };
        Ok((OpenedLayer { disk, basis }, warning))
    }

    async fn compact(
        &self,
        layer: &LayerBlob,
        part: &LayerIndex,
        source: &Source,
        compact: &CompactIndex,
    ) -> Result<Arc<Disk>> {
        let table = TableBytes::new(compact.fetch_table(part), compact.source.is_here());
        self.store
            .compact(layer, part, table, &compact.source, source)
            .await
    }

    async fn indexed(
        &self,
        layer: &LayerBlob,
        table: &Digest,
        source: &Source,
        index: &SociIndex,
    ) -> Result<Arc<Disk>> {
        let ztoc = TableBytes::new(index.fetch_ztoc(&layer.digest), index.source().is_here());
        self.store.indexed(layer, table, ztoc, source).await
    }
}

/// Whether the error is about the table, not the layer. Then the layer can be read without the table.
pub(crate) fn is_table_error(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Corrupt | Kind::Unsupported | Kind::NotFound
    )
}

/// Why there is no zTOC for a layer.
fn not_indexed(layer: &LayerBlob, index: Option<&SociIndex>, choice: &IndexChoice) -> String {
    match (index, choice.policy) {
        (Some(index), _) => index.unreadable.get(&layer.digest).map_or_else(
            || format!("SOCI index {} has no zTOC for this layer", index.digest),
            Clone::clone,
        ),
        (None, IndexPolicy::None) => "--index-policy none disables SOCI indexes".to_owned(),
        (None, IndexPolicy::V2) => "no SOCI index: the image names none (v2), the state directory has none, and --index-policy v2 ignores those in the repository (v1)".to_owned(),
        (None, IndexPolicy::Any) => "no SOCI index: the image names none (v2), its repository has none (v1), and the state directory has none".to_owned(),
    }
}

/// The layers to stack, topmost first. Of a repeated layer only the topmost occurrence is stacked: mounting the same super block twice
/// fails with ELOOP, and the lower one would show the same content.
fn topmost_first(layers: &[LayerBlob]) -> Vec<&LayerBlob> {
    let mut seen = HashSet::new();
    layers
        .iter()
        .rev()
        .filter(|layer| seen.insert(layer.digest))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Packing;

    #[test]
    fn an_equal_layer_is_stacked_once_and_topmost() {
        let layer = |n: u8| LayerBlob {
            digest: Digest::new([n; 32]),
            size: 1,
            packing: Packing::Gzip,
            diff_id: Digest::new([n; 32]),
        };
        let layers = [layer(1), layer(2), layer(1), layer(3), layer(2)];
        let stacked: Vec<u8> = topmost_first(&layers)
            .iter()
            .map(|layer| layer.digest.bytes()[0])
            .collect();
        assert_eq!(stacked, [2, 3, 1]);
    }
}
