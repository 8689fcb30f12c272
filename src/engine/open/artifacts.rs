//! Lists zTOCs and prefetch artifacts of the local root or of one image.

use bytes::Bytes;
use serde::Serialize;

use super::{
    local_indexes::LocalIndexes,
    soci_index::{MAX_ZTOC_BYTES, SociIndex},
};
use crate::{
    error::{Kind, Result, ResultExt as _},
    oci::Digest,
    soci::index::{IndexManifest, LAYER_DIGEST, PREFETCH_TYPE, SPAN_SIZE, ZTOC_TYPE},
    source::Source,
};

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArtifactKind {
    /// zTOCs.
    Ztoc,
    /// Prefetch artifacts.
    Prefetch,
}

/// A zTOC or a prefetch artifact, as an index lists it.
#[derive(Clone, Serialize)]
pub struct IndexArtifact {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// The layer that it is of.
    pub layer: Option<Digest>,
    /// The layer's media type, and the span size, as far as the index says.
    pub span_size: Option<u64>,
    /// The index that lists it.
    pub index: Digest,
    /// The image that the index was made for, as it was named then.
    pub image: Option<String>,
    #[serde(skip)]
    source: Source,
}

impl IndexArtifact {
    /// Its bytes, verified.
    pub async fn fetch(&self) -> Result<Bytes> {
        self.source
            .blob(&self.digest, self.size, MAX_ZTOC_BYTES)
            .await
    }
}

/// Those of the local root, in the order of its indexes.
pub async fn local(local: &LocalIndexes, kind: ArtifactKind) -> Result<Vec<IndexArtifact>> {
    let list = local.list().await?;
    if list.is_empty() {
        return Ok(Vec::new()); // there may be no layout yet
    }
    let source = local.source().await?;
    let mut tables = Vec::new();
    for listed in list {
        let manifest = source.manifest(&listed.digest).await?;
        let index = IndexManifest::parse(&manifest.bytes)
            .or_kind(Kind::Corrupt, || format!("SOCI index {}", listed.digest))?;
        tables.extend(of(&index, listed.digest, listed.reference, &source, kind));
    }
    Ok(tables)
}

/// Those of an image's index.
pub fn of_index(index: &SociIndex, image: &str, kind: ArtifactKind) -> Vec<IndexArtifact> {
    let image = Some(image.to_owned());
    of(&index.manifest, index.digest, image, index.source(), kind)
}

fn of(
    index: &IndexManifest,
    digest: Digest,
    image: Option<String>,
    source: &Source,
    kind: ArtifactKind,
) -> Vec<IndexArtifact> {
    let media_type = match kind {
        ArtifactKind::Ztoc => ZTOC_TYPE,
        ArtifactKind::Prefetch => PREFETCH_TYPE,
    };
    let listed = index
        .layers
        .iter()
        .filter(|entry| entry.media_type == media_type);
    listed
        .filter_map(|entry| {
            let noted = |key: &str| entry.annotations.get(key);
            Some(IndexArtifact {
                digest: entry.digest.parse().ok()?,
                size: u64::try_from(entry.size).ok()?,
                layer: noted(LAYER_DIGEST).and_then(|layer| layer.parse().ok()),
                span_size: noted(SPAN_SIZE).and_then(|size| size.parse().ok()),
                index: digest,
                image: image.clone(),
                source: source.clone(),
            })
        })
        .collect()
}
