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
    blocking::blocking,
    compact::manifest::LayerIndex,
    engine::{
        space::image_record::{ImageRecords, LayerDisk},
        verifiers::{Subject, Verifiers},
    },
    error::{Error, Kind, Result, ResultExt},
    layer::{DirectoryLock, Disk, LayerBlob, Store, StoreOptions, TableBytes, lock_root},
    oci::{Digest, Platform, Reference},
    source::{Access, Source},
};

/// Number of layers that are streamed in parallel; each has several connections and a decoder.
const STREAMS_AT_ONCE: usize = 3;

/// An image and its indexes.
pub(crate) struct FoundImage {
    /// The image.
    pub(crate) image: Image,
    /// Its indexes.
    pub(crate) indexes: FoundIndexes,
    /// The choice that they were found by.
    choice: IndexChoice,
}

impl FoundImage {
    /// Whether an index has a table for the layer.
    pub(crate) fn has_table(&self, layer: &LayerBlob) -> bool {
        let compact = self.indexes.compact.as_ref();
        let compact = compact.and_then(|compact| compact.layer(&layer.digest));
        let index = self.indexes.index.as_ref();
        compact.is_some() || index.is_some_and(|it| it.ztoc(&layer.digest).is_some())
    }
}

/// The disks and the local indexes of a root.
pub struct Disks {
    root: PathBuf,
    store: Arc<Store>,
    images: ImageRecords,
    verifiers: Verifiers,
}

impl Disks {
    /// Opens a root. `Busy` if another process uses it.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_locked(root, lock_root(root, None)?, StoreOptions::default())
    }

    /// Like [`Disks::open`], for a process that has the lock of the root, with options for the store.
    pub fn open_locked(root: &Path, lock: DirectoryLock, options: StoreOptions) -> Result<Self> {
        Ok(Self {
            root: root.to_owned(),
            images: ImageRecords::open(root),
            store: Store::open_locked(root, lock, options)?,
            verifiers: Verifiers::default(),
        })
    }

    /// The store of the disks.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The images that were opened in the root.
    pub fn images(&self) -> &ImageRecords {
        &self.images
    }

    /// The verifiers of images.
    pub fn verifiers(&self) -> &Verifiers {
        &self.verifiers
    }

    /// Resolves an image, has it verified, and opens or makes a disk for each of its layers: from the layer's table in the compact index, otherwise from its
    /// zTOC in the SOCI index, otherwise by streaming the layer.
    pub async fn open_image(
        &self,
        reference: &Reference,
        access: &Access,
        platform: Option<&Platform>,
        choice: &IndexChoice,
        event: OnOpenEvent<'_>,
    ) -> Result<OpenedImage> {
        let mut found = self.find_image(reference, access, platform, choice).await?;
        let mut warnings = std::mem::take(&mut found.indexes.warnings);
        let layers = topmost_first(&found.image.layers);
        event(OpenEvent::Resolved {
            layers: layers.len(),
            indexed: layers.iter().filter(|it| found.has_table(it)).count(),
        });
        let streams = Semaphore::new(STREAMS_AT_ONCE);
        let opening: Vec<_> = layers
            .into_iter()
            .map(|layer| self.open_layer(&found, layer, &streams, event))
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
        self.start_together(&found, &layers);
        let disks = layers.iter().map(|layer| LayerDisk::of(&layer.disk));
        self.record_image(reference, found.image.digest, disks.collect());
        Ok(OpenedImage {
            image: found.image,
            index: found.indexes.index,
            compact: found.indexes.compact,
            layers,
            warnings,
        })
    }

    /// Records that an image was opened.
    pub(crate) fn record_image(
        &self,
        reference: &Reference,
        manifest: Digest,
        layers: Vec<LayerDisk>,
    ) {
        self.images
            .opened(reference, manifest, layers)
            .unwrap_or_else(|error| {
                tracing::warn!(
                    "an image is not recorded, and `socinbd df` does not show it: {}",
                    error.report()
                )
            });
    }

    /// Resolves an image, has it verified, and finds its indexes.
    async fn find_image(
        &self,
        reference: &Reference,
        access: &Access,
        platform: Option<&Platform>,
        choice: &IndexChoice,
    ) -> Result<FoundImage> {
        let source = self.source(reference, access).await?;
        let root = Image::root(&source).await?;
        self.verifiers
            .verify(&Subject::new(reference, &root))
            .await?;
        let image = Image::of_root(&source, &root, platform).await?;
        self.find_indexes(image, choice).await
    }

    /// Opens the place of an image. Touches no network.
    pub(crate) async fn source(&self, reference: &Reference, access: &Access) -> Result<Source> {
        Source::open_with(reference, access, self.store.limits()).await
    }

    /// Resolves an image that was verified, and finds its indexes.
    pub(crate) async fn find_verified_image(
        &self,
        source: &Source,
        choice: &IndexChoice,
    ) -> Result<FoundImage> {
        let image = Image::resolve(source, None).await?;
        self.find_indexes(image, choice).await
    }

    async fn find_indexes(&self, image: Image, choice: &IndexChoice) -> Result<FoundImage> {
        let local = LocalIndexes::open(&self.root)?;
        let indexes = search::find_verified(&image, choice, &local, &self.verifiers).await?;
        Ok(FoundImage {
            image,
            indexes,
            choice: *choice,
        })
    }

    /// Opens or makes the disk of a layer of an image. Returns a warning if an index has a table for the layer that cannot be used.
    pub(crate) async fn open_layer(
        &self,
        found: &FoundImage,
        layer: &LayerBlob,
        streams: &Semaphore,
        event: OnOpenEvent<'_>,
    ) -> Result<(OpenedLayer, Option<String>)> {
        let FoundImage {
            image,
            indexes,
            choice,
        } = found;
        self.layer(layer, &image.source, indexes, choice, streams, event)
            .await
            .map_err(|error| image.explain(&layer.digest, error))
    }

    /// The disk of a layer that was verified as a whole, if there is one.
    pub(crate) async fn verified_layer(&self, layer: &LayerBlob) -> Result<Option<OpenedLayer>> {
        let (store, layer) = (Arc::clone(&self.store), layer.clone());
        let disk = blocking(move || store.verified(&layer)).await?;
        let basis = DiskBasis::Verified;
        Ok(disk.map(|disk| OpenedLayer { disk, basis }))
    }

    /// The disk of a layer that was verified as a whole, else a new one, to which all of the layer is fetched. Its table is not used. `why` is
    /// the reason.
    pub(crate) async fn open_whole_layer(
        &self,
        found: &FoundImage,
        layer: &LayerBlob,
        streams: &Semaphore,
        why: String,
        event: OnOpenEvent<'_>,
    ) -> Result<OpenedLayer> {
        let image = &found.image;
        let opened = match self.verified_layer(layer).await {
            Ok(None) => self.whole(layer, &image.source, streams, why, event).await,
            Ok(Some(opened)) => Ok(opened),
            Err(error) => Err(error),
        };
        opened.map_err(|error| image.explain(&layer.digest, of_layer(layer, error)))
    }

    /// The opened layers of one image share the counting of lost time, and the spans that its index lists for a start are fetched.
    pub(crate) fn start_together(&self, found: &FoundImage, layers: &[OpenedLayer]) {
        self.store
            .belong_together(layers.iter().map(|layer| &layer.disk));
        prefetch::start(&self.store, &found.indexes, layers);
    }

    /// Opens the disk of a layer. Returns a warning if an index has a table for the layer that cannot be used. What makes a
    /// disk is a large future, and boxed: the futures of all layers of an image exist at once, and few run.
    async fn layer(
        &self,
        layer: &LayerBlob,
        source: &Source,
        found: &FoundIndexes,
        choice: &IndexChoice,
        streams: &Semaphore,
        event: OnOpenEvent<'_>,
    ) -> Result<(OpenedLayer, Option<String>)> {
        let context = |error: Error| of_layer(layer, error);
        if let Some(opened) = self.verified_layer(layer).await.map_err(context)? {
            return Ok((opened, None));
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
        let opened = self.whole(layer, source, streams, why, event).await;
        Ok((opened.map_err(context)?, warning))
    }

    async fn whole(
        &self,
        layer: &LayerBlob,
        source: &Source,
        streams: &Semaphore,
        why: String,
        event: OnOpenEvent<'_>,
    ) -> Result<OpenedLayer> {
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
        let disk = Box::pin(self.store.streamed(layer, source, &progress)).await?;
        let basis = DiskBasis::Whole { why };
        Ok(OpenedLayer { disk, basis })
    }

    async fn compact(
        &self,
        layer: &LayerBlob,
        part: &LayerIndex,
        source: &Source,
        compact: &CompactIndex,
    ) -> Result<Arc<Disk>> {
        let table = TableBytes::new(|| compact.fetch_table(part), compact.source.is_here());
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
        let ztoc = TableBytes::new(|| index.fetch_ztoc(&layer.digest), index.source().is_here());
        self.store.indexed(layer, table, ztoc, source).await
    }
}

fn of_layer(layer: &LayerBlob, error: Error) -> Error {
    error.context(format!("layer {}", layer.digest))
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
