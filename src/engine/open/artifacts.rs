//! Lists the zTOCs and prefetch artifacts of the state directory or of one image.

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

/// The kind of artifact.
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
    /// Digest of the artifact.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Digest of the layer that it belongs to.
    pub layer: Option<Digest>,
    /// Span size, if the index states it.
    pub span_size: Option<u64>,
    /// Digest of the index that lists it.
    pub index: Digest,
    /// Reference of the image that the index was made for.
    pub image: Option<String>,
    #[serde(skip)]
    source: Source,
}

impl IndexArtifact {
    /// Fetches the artifact, verified.
    pub async fn fetch(&self) -> Result<Bytes> {
        self.source
            .blob(&self.digest, self.size, MAX_ZTOC_BYTES)
            .await
    }
}

/// The artifacts in the state directory, in the order of its indexes.
pub async fn local(local: &LocalIndexes, kind: ArtifactKind) -> Result<Vec<IndexArtifact>> {
    let list = local.list().await?;
    if list.is_empty() {
        return Ok(Vec::new()); // the layout may not exist yet
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

/// The artifacts of an image's index.
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
