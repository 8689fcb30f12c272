//! zTOCs that exist already: in indexes of the local root, of the image, and of where it was converted to before. One of the same layer
//! and span size is as good as a new one, and costs no byte of the layer.

use bytes::Bytes;
use serde_json::Value;

use super::{
    discovery::{MAX_ZTOC_BYTES, Place},
    image::Image,
    local::LocalIndexes,
};
use crate::{
    error::Result,
    layer::LayerBlob,
    oci::Digest,
    soci::index::{INDEX_DIGEST, IndexManifest, V1_TYPE, V2_TYPE},
    source::{Manifest, Source},
    ztoc::Ztoc,
};

/// Indexes that are looked into at one place.
const MAX_INDEXES: usize = 64;

/// Indexes, and where each has its zTOCs.
#[derive(Default)]
pub(super) struct Known(Vec<(IndexManifest, Place)>);

impl Known {
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
    }

    /// Those that an image index lists (version 2).
    pub(super) async fn add_listed(&mut self, source: &Source, index: &Manifest) {
        let index: Value = serde_json::from_slice(&index.bytes).unwrap_or_default();
        let entries = index["manifests"].as_array().into_iter().flatten();
        let listed = entries
            .filter(|entry| entry["artifactType"] == V2_TYPE)
            .filter_map(|entry| entry["digest"].as_str()?.parse::<Digest>().ok());
        for digest in listed.take(MAX_INDEXES) {
            self.add(
                source.manifest(&digest).await,
                &Place::Source(source.clone()),
            );
        }
    }

    fn add(&mut self, manifest: Result<Manifest>, place: &Place) {
        match manifest {
            Ok(manifest) => {
                if let Ok(index) = IndexManifest::parse(&manifest.bytes) {
                    self.0.push((index, place.clone()));
                }
            }
            Err(error) => passed_over(&error),
        }
    }

    /// A layer's zTOC with this span size, checked to be one of a blob of this size.
    pub(super) async fn ztoc(&self, layer: &LayerBlob, span_size: u64) -> Option<Bytes> {
        for (index, place) in &self.0 {
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

fn passed_over(error: &crate::error::Error) {
    tracing::debug!(error = error.report(), "known zTOCs are not looked for");
}
