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

/// Bytes of the largest zTOC that is fetched: 10 GB of layer at 4 MiB a span have 80 MB.
pub const MAX_ZTOC_BYTES: u64 = 1 << 30;

/// The SOCI index that counts for an image.
#[derive(Clone)]
pub struct SociIndex {
    /// Its digest.
    pub digest: Digest,
    /// 1 or 2.
    pub version: u8,
    /// How it was found.
    pub origin: IndexOrigin,
    /// The zTOCs of the image's layers, by the layer's digest.
    pub ztocs: BTreeMap<Digest, BlobRef>,
    /// The layers that it has a zTOC for which cannot be read, and why.
    pub unreadable: BTreeMap<Digest, String>,
    /// What it says, prefetch artifacts too.
    pub manifest: IndexManifest,
    source: Source,
}

impl SociIndex {
    /// Where its blobs are.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// The digest of a layer's zTOC, if it has one.
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
                    "its zTOC has {} bytes, where at most {MAX_ZTOC_BYTES} are read",
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

    /// Whether the subject, if there is one, is this image. AWS's tool accepts version 1 without a subject.
    fn is_of(&self, image: &Image) -> bool {
        let subject = self.manifest.subject.as_ref();
        subject.is_none_or(|subject| subject.digest == image.digest.to_string())
    }

    fn unfit(&self, _image: &Image) -> Option<&'static str> {
        if self.manifest.version != Version::V1 {
            Some("it is not of version 1")
        } else if self.ztocs.is_empty() {
            Some("it has a zTOC for no layer of this image")
        } else {
            None
        }
    }
}
