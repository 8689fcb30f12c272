//! Finds existing zTOCs and compact tables to reuse: in indexes of the state directory, of the image, and of an earlier conversion. A table
//! with the same layer and span size is as good as a new one, and the layer need not be read. For a table of the image's own index, the
//! prefetch list is kept too, so that a recording is not lost when an index is made again.

use bytes::Bytes;
use serde_json::Value;

use super::{
    options::{CreateOptions, DEFAULT_BUILD_TOOL},
    parts::{CompactPart, PartBlob},
};
use crate::{
    compact::manifest::{
        ARTIFACT_TYPE, INDEX_DIGEST as COMPACT_DIGEST, LayerIndex, MAX_PREFETCH_BYTES,
    },
    engine::open::{
        compact_index::CompactIndex, image::Image, local_indexes::LocalIndexes,
        policy::IndexOrigin, soci_index::MAX_ZTOC_BYTES,
    },
    error::{Error, Kind, Result, ResultExt as _},
    layer::LayerBlob,
    oci::{Digest, manifest::MAX_MANIFEST_BYTES},
    soci::{
        index::{INDEX_DIGEST, IndexManifest, V1_TYPE, V2_TYPE},
        prefetch::Prefetch,
    },
    source::{Manifest, Source},
    ztoc::Ztoc,
};

/// Maximum number of indexes to read per place.
const MAX_INDEXES: usize = 64;

/// Existing indexes, each with its source.
#[derive(Default)]
pub(crate) struct ReusableIndexes {
    indexes: Vec<ReusableIndex>,
    compact: Vec<(CompactIndex, IndexOwner)>,
    /// Whether compact indexes are searched too.
    with_compact: bool,
    /// Whether prefetch lists are kept; not if the options ask for others.
    with_lists: bool,
    /// The build tool whose zTOCs are reused; `None`: any.
    build_tool: Option<String>,
}

struct ReusableIndex {
    manifest: IndexManifest,
    source: Source,
    owner: IndexOwner,
}

/// The image that an index belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IndexOwner {
    /// One of the images to index.
    Image,
    /// Another or an unknown image.
    Other,
}

impl ReusableIndexes {
    /// An empty set.
    pub(crate) fn new(options: &CreateOptions) -> Self {
        Self {
            with_compact: options.compact_span_size.is_some(),
            with_lists: options.prefetch_files.is_empty() && options.uses.is_empty(),
            build_tool: Some(options.build_tool.clone()).filter(|tool| tool != DEFAULT_BUILD_TOOL),
            ..Self::default()
        }
    }

    /// Adds the indexes in the state directory. Unreadable indexes are skipped, here and below, because reuse is only an optimization.
    pub(super) async fn add_local(&mut self, local: &LocalIndexes) {
        let list = match local.list().await {
            Ok(list) => list,
            Err(error) => return passed_over(&error),
        };
        let compact = match self.with_compact {
            true => local.listed(ARTIFACT_TYPE).await,
            false => Ok(Vec::new()),
        };
        let compact = compact.unwrap_or_else(|error| {
            passed_over(&error);
            Vec::new()
        });
        if list.is_empty() && compact.is_empty() {
            return; // the layout may not exist yet
        }
        let source = match local.source().await {
            Ok(source) => source,
            Err(error) => return passed_over(&error),
        };
        for index in list.iter().rev().take(MAX_INDEXES) {
            let found = source.manifest(&index.digest).await;
            self.add(found, &source, IndexOwner::Other);
        }
        let newest = compact.into_iter().rev().take(MAX_INDEXES);
        self.add_compact(newest, IndexOrigin::Local, &source, IndexOwner::Other)
            .await;
    }

    /// Adds the indexes of an image: the one that it names, and its referrers.
    pub(super) async fn add_image(&mut self, image: &Image) {
        let source = &image.source;
        let annotations = image.manifest.annotations().as_ref();
        let named = annotations.and_then(|annotations| annotations.get(INDEX_DIGEST)?.parse().ok());
        if let Some(named) = named {
            self.add(source.manifest(&named).await, source, IndexOwner::Image);
        }
        match image.source.referrers(&image.digest, V1_TYPE).await {
            Ok(list) => {
                for referrer in list.iter().rev().take(MAX_INDEXES) {
                    let found = image.source.manifest(&referrer.digest).await;
                    self.add(found, source, IndexOwner::Image);
                }
            }
            Err(error) => passed_over(&error),
        }
        if !self.with_compact {
            return;
        }
        let named = annotations
            .and_then(|annotations| annotations.get(COMPACT_DIGEST)?.parse().ok())
            .into_iter();
        self.add_compact(
            named,
            IndexOrigin::Annotation,
            &image.source,
            IndexOwner::Image,
        )
        .await;
        match image.source.referrers(&image.digest, ARTIFACT_TYPE).await {
            Ok(list) => {
                let newest = list.iter().rev().take(MAX_INDEXES);
                let newest = newest.map(|referrer| referrer.digest);
                self.add_compact(
                    newest,
                    IndexOrigin::Referrer,
                    &image.source,
                    IndexOwner::Image,
                )
                .await;
            }
            Err(error) => passed_over(&error),
        }
    }

    /// Adds the indexes (version 2) that an image index lists.
    pub(super) async fn add_listed(&mut self, source: &Source, index: &Manifest) {
        let index: Value = serde_json::from_slice(&index.bytes).unwrap_or_default();
        let listed = |artifact_type: &str| -> Vec<Digest> {
            let entries = index["manifests"].as_array().into_iter().flatten();
            entries
                .filter(|entry| entry["artifactType"] == artifact_type)
                .filter_map(|entry| entry["digest"].as_str()?.parse().ok())
                .take(MAX_INDEXES)
                .collect()
        };
        for digest in listed(V2_TYPE) {
            self.add(source.manifest(&digest).await, source, IndexOwner::Other);
        }
        if self.with_compact {
            let listed = listed(ARTIFACT_TYPE).into_iter();
            self.add_compact(listed, IndexOrigin::Annotation, source, IndexOwner::Other)
                .await;
        }
    }

    fn add(&mut self, manifest: Result<Manifest>, source: &Source, owner: IndexOwner) {
        match manifest {
            Ok(manifest) => {
                if let Ok(manifest) = IndexManifest::parse(&manifest.bytes) {
                    self.indexes.push(ReusableIndex {
                        manifest,
                        source: source.clone(),
                        owner,
                    });
                }
            }
            Err(error) => passed_over(&error),
        }
    }

    async fn add_compact(
        &mut self,
        digests: impl Iterator<Item = Digest>,
        origin: IndexOrigin,
        source: &Source,
        owner: IndexOwner,
    ) {
        for digest in digests {
            let found = source.manifest(&digest).await;
            match found.and_then(|found| CompactIndex::parse(&found, origin, source)) {
                Ok(index) => self.compact.push((index, owner)),
                Err(error) => passed_over(&error),
            }
        }
    }

    /// Finds a layer's part of a compact index with this span size. Its table is verified to be of this layer.
    pub(crate) async fn compact(&self, layer: &LayerBlob, span_size: u64) -> Option<CompactPart> {
        for (index, _) in &self.compact {
            let part = index.layer(&layer.digest);
            if part.is_none_or(|part| part.span_size != span_size) {
                continue;
            }
            match index.table(layer).await {
                Ok(Some((part, bytes, table))) => {
                    return Some(CompactPart {
                        prefetch: self.compact_list(part).await,
                        index: *part,
                        spans: table.spans.spans.len(),
                        table: bytes,
                        blob: PartBlob::At(index.source.clone()),
                    });
                }
                Ok(None) => {}
                Err(error) => passed_over(&error),
            }
        }
        None
    }

    /// Finds a layer's zTOC with this span size. It is verified to be of a blob with this size.
    pub(crate) async fn ztoc(&self, layer: &LayerBlob, span_size: u64) -> Option<Bytes> {
        for ReusableIndex {
            manifest: index,
            source,
            ..
        } in &self.indexes
        {
            if index.span_size_of(&layer.digest) != Some(span_size) {
                continue;
            }
            let Ok(Some(found)) = index.ztoc_of(&layer.digest) else {
                continue;
            };
            match source.blob(&found.digest, found.size, MAX_ZTOC_BYTES).await {
                Ok(bytes) => {
                    let ztoc = Ztoc::parse(&bytes).and_then(|ztoc| {
                        ztoc.spans.check_blob_size(layer.size)?;
                        Ok(ztoc)
                    });
                    let is_of_tool = |ztoc: &Ztoc| {
                        self.build_tool
                            .as_ref()
                            .is_none_or(|tool| ztoc.build_tool == *tool)
                    };
                    match ztoc {
                        Ok(ztoc) if is_of_tool(&ztoc) => return Some(bytes),
                        Ok(_) => {}
                        Err(error) => {
                            tracing::debug!(layer = %layer.digest, %error, "a zTOC cannot be reused")
                        }
                    }
                }
                Err(error) => passed_over(&error),
            }
        }
        None
    }
}

impl ReusableIndexes {
    /// The prefetch list for this zTOC in the image's own index.
    pub(crate) async fn list(&self, layer: &Digest, ztoc: &Digest) -> Option<Bytes> {
        let has_ztoc = |index: &&ReusableIndex| {
            let found = index.manifest.ztoc_of(layer);
            index.owner == IndexOwner::Image
                && matches!(found, Ok(Some(found)) if found.digest == *ztoc)
        };
        let index = self.indexes.iter().find(has_ztoc);
        let index = index.filter(|_| self.with_lists)?;
        let list = index.manifest.prefetch_of(layer).ok().flatten()?;
        let blob = index
            .source
            .blob(&list.digest, list.size, MAX_MANIFEST_BYTES);
        sound(blob.await)
    }

    /// The prefetch list for this table in the image's own compact index.
    async fn compact_list(&self, part: &LayerIndex) -> Option<Bytes> {
        let has_table = |(index, owner): &&(CompactIndex, IndexOwner)| {
            let found = index.layer(&part.layer);
            *owner == IndexOwner::Image && found.is_some_and(|found| found.table == part.table)
        };
        let (index, _) = self.compact.iter().find(has_table)?;
        let list = index.manifest.prefetch_of(part);
        let list = list.filter(|_| self.with_lists)?;
        let blob = index.source.blob(&list.blob, list.size, MAX_PREFETCH_BYTES);
        sound(blob.await)
    }
}

/// The list, if it is readable and valid.
fn sound(list: Result<Bytes>) -> Option<Bytes> {
    let read = list.and_then(|bytes| {
        Prefetch::parse(&bytes).or_kind(Kind::Corrupt, || "decoding a prefetch list".to_owned())?;
        Ok(bytes)
    });
    read.map_err(|error| passed_over(&error)).ok()
}

fn passed_over(error: &Error) {
    tracing::debug!(
        error = error.report(),
        "an index that cannot be reused is skipped"
    );
}
