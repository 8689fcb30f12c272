//! The SOCI index of an image, and the zTOCs of its layers.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{image::Image, image_index::ImageIndex, policy::IndexOrigin};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::Digest,
    soci::index::{BlobRef, INDEX_DIGEST, IndexManifest, V1_TYPE, Version},
    source::{Manifest, Source},
};

/// Maximum size of a zTOC in bytes. A layer of 10 GB with spans of 4 MiB has a zTOC of 80 MB.
pub const MAX_ZTOC_BYTES: u64 = 1 << 30;

/// The SOCI index to use for an image.
#[derive(Clone)]
pub struct SociIndex {
    /// Digest of the index.
    pub digest: Digest,
    /// SOCI version, 1 or 2.
    pub version: u8,
    /// How the index was found.
    pub origin: IndexOrigin,
    /// zTOCs by layer digest.
    pub ztocs: BTreeMap<Digest, BlobRef>,
    /// Layers whose zTOC is not readable, and why.
    pub unreadable: BTreeMap<Digest, String>,
    /// The manifest, which also lists prefetch artifacts.
    pub manifest: IndexManifest,
    source: Source,
}

impl SociIndex {
    /// The source of its blobs.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Digest of a layer's zTOC, if the index has one.
    pub fn ztoc(&self, layer: &Digest) -> Option<Digest> {
        self.ztocs.get(layer).map(|ztoc| ztoc.digest)
    }

    /// Fetches a layer's zTOC, verified against its digest and size.
    pub async fn fetch_ztoc(&self, layer: &Digest) -> Result<Bytes> {
        let context = || format!("SOCI index {}, zTOC of layer {layer}", self.digest);
        let Some(ztoc) = self.ztocs.get(layer) else {
            return Err(Error::new(Kind::NotFound, context()));
        };
        let fetched = self
            .source
            .blob(&ztoc.digest, ztoc.size, MAX_ZTOC_BYTES)
            .await;
        fetched.map_err(|error| error.context(context()))
    }
}

impl ImageIndex for SociIndex {
    const NAME: &'static str = "SOCI";
    const ARTIFACT_TYPE: &'static str = V1_TYPE;
    const ANNOTATION: &'static str = INDEX_DIGEST;
    const BARS_REFERRERS: &'static [&'static str] = &[INDEX_DIGEST];

    fn read(
        found: &Manifest,
        origin: IndexOrigin,
        source: &Source,
        image: &Image,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let digest = found.digest;
        let manifest = IndexManifest::parse(&found.bytes)
            .or_kind(Kind::Corrupt, || format!("SOCI index {digest}"))?;
        let (mut ztocs, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
        for layer in &image.layers {
            let why = match manifest.ztoc_of(&layer.digest) {
                Ok(None) => continue,
                Ok(Some(ztoc)) if ztoc.size <= MAX_ZTOC_BYTES => {
                    ztocs.insert(layer.digest, ztoc);
                    continue;
                }
                Ok(Some(ztoc)) => format!(
                    "its zTOC has {} bytes, over the limit of {MAX_ZTOC_BYTES}",
                    ztoc.size
                ),
                Err(error) => format!("SOCI index {digest}: {error}"),
            };
            warnings.push(format!("layer {} is not lazy: {why}", layer.digest));
            unreadable.insert(layer.digest, why);
        }
        Ok(Self {
            digest,
            version: match manifest.version {
                Version::V1 => 1,
                Version::V2 => 2,
            },
            origin,
            ztocs,
            unreadable,
            manifest,
            source: source.clone(),
        })
    }

    /// Whether the subject is this image or missing: AWS's tool accepts version 1 indexes without a subject.
    fn is_of(&self, image: &Image) -> bool {
        let subject = self.manifest.subject.as_ref();
        subject.is_none_or(|subject| subject.digest == image.digest.to_string())
    }

    fn unfit(&self, _image: &Image) -> Option<&'static str> {
        if self.manifest.version != Version::V1 {
            Some("its version is not 1")
        } else if self.ztocs.is_empty() {
            Some("it has no zTOC for any layer of this image")
        } else {
            None
        }
    }
}
