//! The compact index of an image. If a layer's part of it is not usable, the layer's zTOC is used instead.

use bytes::Bytes;

use super::{image::Image, image_index::ImageIndex, policy::IndexOrigin};
use crate::{
    compact::{
        MAX_TABLE_SIZE, Table,
        manifest::{ARTIFACT_TYPE, INDEX_DIGEST, LayerIndex, Manifest},
    },
    error::{Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::Digest,
    soci::index,
    source::{self, Source},
};

/// The compact index to use for an image.
#[derive(Clone)]
pub struct CompactIndex {
    /// Digest of the index.
    pub digest: Digest,
    /// How the index was found.
    pub origin: IndexOrigin,
    /// The manifest: its parts and their layers.
    pub manifest: Manifest,
    /// The source of its blobs.
    pub source: Source,
}

impl CompactIndex {
    /// The part for a layer.
    pub fn layer(&self, layer: &Digest) -> Option<&LayerIndex> {
        self.manifest.of_layer(layer)
    }

    /// Fetches a layer's table by range, and verifies it against its digest.
    pub async fn fetch_table(&self, layer: &LayerIndex) -> Result<Bytes> {
        let context = || {
            format!(
                "compact index {}, table of layer {}",
                self.digest, layer.layer
            )
        };
        // parsed manifests have only valid sizes; this guards values made elsewhere
        let size = layer.table_size.min(MAX_TABLE_SIZE);
        let bytes = self
            .source
            .verified_range(&layer.blob, 0..size, &layer.table)
            .await;
        bytes.map_err(|error| error.context(context()))
    }

    /// The part for a layer, and its table as bytes and parsed. The table is verified to be of exactly this layer. `None` if there is no
    /// part.
    pub async fn table(&self, layer: &LayerBlob) -> Result<Option<(&LayerIndex, Bytes, Table)>> {
        let Some(part) = self.layer(&layer.digest) else {
            return Ok(None);
        };
        let bytes = self.fetch_table(part).await?;
        let table = Table::parse(&bytes)
            .and_then(|table| {
                table.check(&layer.digest, layer.size, part.size)?;
                Ok(table)
            })
            .or_kind(Kind::Corrupt, || {
                format!("the compact table {} of layer {}", part.table, layer.digest)
            })?;
        Ok(Some((part, bytes, table)))
    }

    /// Parses a manifest that was found.
    pub(crate) fn parse(
        found: &source::Manifest,
        origin: IndexOrigin,
        source: &Source,
    ) -> Result<Self> {
        let digest = found.digest;
        let manifest = Manifest::parse(&found.bytes)
            .or_kind(Kind::Corrupt, || format!("compact index {digest}"))?;
        Ok(Self {
            digest,
            origin,
            manifest,
            source: source.clone(),
        })
    }
}

impl ImageIndex for CompactIndex {
    const NAME: &'static str = "compact";
    const ARTIFACT_TYPE: &'static str = ARTIFACT_TYPE;
    const ANNOTATION: &'static str = INDEX_DIGEST;
    const BARS_REFERRERS: &'static [&'static str] = &[INDEX_DIGEST, index::INDEX_DIGEST];

    fn read(
        found: &source::Manifest,
        origin: IndexOrigin,
        source: &Source,
        _image: &Image,
        _warnings: &mut Vec<String>,
    ) -> Result<Self> {
        Self::parse(found, origin, source)
    }

    fn is_of(&self, image: &Image) -> bool {
        let subject = self.manifest.subject.as_ref();
        subject.is_none_or(|subject| subject.digest == image.digest)
    }

    fn unfit(&self, image: &Image) -> Option<&'static str> {
        let mut layers = image.layers.iter();
        match layers.any(|layer| self.layer(&layer.digest).is_some()) {
            true => None,
            false => Some("it has no table for any layer of this image"),
        }
    }
}
