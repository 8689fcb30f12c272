//! zTOCs and compact tables that exist already: in indexes of the local root, of the image, and of where it was converted to before. One of
//! the same layer and span size is as good as a new one, and costs no byte of the layer.

use bytes::Bytes;
use serde_json::Value;

use super::{
    compact::CompactIndex,
    create::CreateOptions,
    discovery::{MAX_ZTOC_BYTES, Origin, Place},
    image::Image,
    local::LocalIndexes,
    new_compact::{Blob, CompactPart},
};
use crate::{
    compact::manifest::{ARTIFACT_TYPE, INDEX_DIGEST as COMPACT_DIGEST},
    error::{Error, Result},
    layer::LayerBlob,
    oci::Digest,
    soci::index::{INDEX_DIGEST, IndexManifest, V1_TYPE, V2_TYPE},
    source::{Manifest, Source},
    ztoc::Ztoc,
};

/// Indexes that are looked into at one place.
const MAX_INDEXES: usize = 64;

/// Indexes, and where each has its blobs.
#[derive(Default)]
pub(super) struct Known {
    indexes: Vec<(IndexManifest, Place)>,
    compact: Vec<CompactIndex>,
    /// Whether compact indexes are looked for too.
    with_compact: bool,
}

impl Known {
    /// None yet. Compact indexes are looked for where one is wanted.
    pub(super) fn new(options: &CreateOptions) -> Self {
        Self {
            with_compact: options.compact_span_size.is_some(),
            ..Self::default()
        }
    }

    /// Those of the local root. What cannot be read is passed over, here and below: it would only have saved work.
    pub(super) async fn add_local(&mut self, local: &LocalIndexes) {
        let list = match local.list().await {
            Ok(list) => list,
            Err(error) => return passed_over(&error),
        };
        for known in list.iter().rev().take(MAX_INDEXES) {
            self.add(
                local.manifest(&known.digest).await,
                &Place::Local(local.clone()),
            );
        }
        if !self.with_compact {
            return;
        }
        match local.listed(ARTIFACT_TYPE).await {
            Ok(list) if list.is_empty() => {}
            Ok(list) => match local.source().await {
                Ok(source) => {
                    let newest = list.into_iter().rev().take(MAX_INDEXES);
                    self.add_compact(newest, Origin::Local, &source).await;
                }
                Err(error) => passed_over(&error),
            },
            Err(error) => passed_over(&error),
        }
    }

    /// Those of an image: the one that it names, and those that refer to it.
    pub(super) async fn add_image(&mut self, image: &Image) {
        let place = Place::Source(image.source.clone());
        let annotations = image.manifest.annotations().as_ref();
        let named = annotations.and_then(|annotations| annotations.get(INDEX_DIGEST)?.parse().ok());
        if let Some(named) = named {
            self.add(image.source.manifest(&named).await, &place);
        }
        match image.source.referrers(&image.digest, V1_TYPE).await {
            Ok(list) => {
                for referrer in list.iter().rev().take(MAX_INDEXES) {
                    self.add(image.source.manifest(&referrer.digest).await, &place);
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
        self.add_compact(named, Origin::Annotation, &image.source)
            .await;
        match image.source.referrers(&image.digest, ARTIFACT_TYPE).await {
            Ok(list) => {
                let newest = list.iter().rev().take(MAX_INDEXES);
                let newest = newest.map(|referrer| referrer.digest);
                self.add_compact(newest, Origin::Referrer, &image.source)
                    .await;
            }
            Err(error) => passed_over(&error),
        }
    }

    /// Those that an image index lists (version 2).
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
            self.add(
                source.manifest(&digest).await,
                &Place::Source(source.clone()),
            );
        }
        if self.with_compact {
            let listed = listed(ARTIFACT_TYPE).into_iter();
            self.add_compact(listed, Origin::Annotation, source).await;
        }
    }

    fn add(&mut self, manifest: Result<Manifest>, place: &Place) {
        match manifest {
            Ok(manifest) => {
                if let Ok(index) = IndexManifest::parse(&manifest.bytes) {
                    self.indexes.push((index, place.clone()));
                }
            }
            Err(error) => passed_over(&error),
        }
    }

    async fn add_compact(
        &mut self,
        digests: impl Iterator<Item = Digest>,
        origin: Origin,
        source: &Source,
    ) {
        for digest in digests {
            let found = source.manifest(&digest).await;
            match found.and_then(|found| CompactIndex::read(&found, origin, source)) {
                Ok(index) => self.compact.push(index),
                Err(error) => passed_over(&error),
            }
        }
    }

    /// A layer's part of a compact index with this span size; its table is checked to be one of this very layer.
    pub(super) async fn compact(&self, layer: &LayerBlob, span_size: u64) -> Option<CompactPart> {
        for known in &self.compact {
            let part = known.layer(&layer.digest);
            if part.is_none_or(|part| part.span_size != span_size) {
                continue;
            }
            match known.table(layer).await {
                Ok(Some((part, bytes, table))) => {
                    return Some(CompactPart {
                        index: *part,
                        spans: table.spans.spans.len(),
                        table: bytes,
                        blob: Blob::At(known.source.clone()),
                    });
                }
                Ok(None) => {}
                Err(error) => passed_over(&error),
            }
        }
        None
    }

    /// A layer's zTOC with this span size, checked to be one of a blob of this size.
    pub(super) async fn ztoc(&self, layer: &LayerBlob, span_size: u64) -> Option<Bytes> {
        for (index, place) in &self.indexes {
            if index.span_size_of(&layer.digest) != Some(span_size) {
                continue;
            }
            let Ok(Some(found)) = index.ztoc_of(&layer.digest) else {
                continue;
            };
            match place.blob(&found, MAX_ZTOC_BYTES).await {
                Ok(bytes) => {
                    let fits =
                        Ztoc::parse(&bytes).and_then(|ztoc| ztoc.spans.check_blob_size(layer.size));
                    match fits {
                        Ok(()) => return Some(bytes),
                        Err(error) => {
                            tracing::debug!(layer = %layer.digest, %error, "a zTOC that cannot be used again")
                        }
                    }
                }
                Err(error) => passed_over(&error),
            }
        }
        None
    }
}

fn passed_over(error: &Error) {
    tracing::debug!(error = error.report(), "a known index is passed over");
}
