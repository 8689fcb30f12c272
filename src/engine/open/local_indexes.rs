//! SOCI indexes of this host: an OCI layout at `<root>/content`.
//!
//! Each is a version 1 index whose subject is an image's manifest. Whoever can write here is this host's administrator: an index found
//! here is the operator's own word.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::Serialize;

use super::image::Image;
use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, Reference},
    soci::index::{IndexManifest, V1_TYPE, Version, ZTOC_TYPE},
    source::{
        Access, Manifest, Referrer, Source,
        layout::{Collected, Layout, NewArtifact},
    },
    tar::Timestamp,
    ztoc::rfc3339,
};

/// On an entry of the local root's `index.json`: the image's reference.
const IMAGE_REF: &str = "io.socinbd.image.ref";
/// The image's platform.
const PLATFORM: &str = "io.socinbd.image.platform";
/// When the index was stored (OCI image specification, annotations).
const CREATED: &str = "org.opencontainers.image.created";

/// The indexes below a root.
#[derive(Clone, Debug)]
pub struct LocalIndexes {
    folder: PathBuf,
}

/// An index below the root.
#[derive(Clone, Debug, Serialize)]
pub struct LocalIndex {
    /// Its digest.
    pub digest: Digest,
    /// The manifest of the image that it belongs to.
    pub image: Option<Digest>,
    /// The image as it was named when the index was made.
    pub reference: Option<String>,
    /// The image's platform.
    pub platform: Option<String>,
    /// When it was stored, RFC 3339.
    pub created: Option<String>,
    /// 1 or 2; only version 1 is stored on its own.
    pub version: u8,
    /// Layers that it has a zTOC for.
    pub ztocs: usize,
    /// Bytes of the index and its zTOCs.
    pub size: u64,
}

impl LocalIndex {
    /// An index of an image, wherever it is.
    pub fn of(image: &Image, manifest: &Manifest) -> Result<Self> {
        let context = || format!("SOCI index {}", manifest.digest);
        let index = IndexManifest::parse(&manifest.bytes).or_kind(Kind::Corrupt, context)?;
        Ok(Self {
            image: Some(image.digest),
            reference: Some(image.reference.to_string()),
            platform: Some(image.platform.to_string()),
            ..Self::parsed(manifest, &index)
        })
    }

    fn parsed(manifest: &Manifest, index: &IndexManifest) -> Self {
        let ztocs = index
            .layers
            .iter()
            .filter(|layer| layer.media_type == ZTOC_TYPE);
        Self {
            digest: manifest.digest,
            image: index
                .subject
                .as_ref()
                .and_then(|subject| subject.digest.parse().ok()),
            reference: None,
            platform: None,
            created: None,
            version: match index.version {
                Version::V1 => 1,
                Version::V2 => 2,
            },
            ztocs: ztocs.count(),
            size: index
                .layers
                .iter()
                .filter_map(|layer| u64::try_from(layer.size).ok())
                .fold(manifest.bytes.len() as u64, u64::saturating_add),
        }
    }
}

impl LocalIndexes {
    /// The indexes below this root. Touches no file: there may be none yet.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_absolute() {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("{} is not an absolute path", root.display()),
            ));
        }
        Ok(Self {
            folder: root.join("content"),
        })
    }

    /// Adds an index of an image and its zTOCs; the newest of its image from now on.
    pub async fn store(&self, mut artifact: NewArtifact, image: &Image) -> Result<Digest> {
        let seconds = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let created = rfc3339(Timestamp {
            seconds: i64::try_from(seconds).unwrap_or(0),
            nanoseconds: 0,
        });
        artifact.annotations.extend([
            (IMAGE_REF.to_owned(), image.reference.to_string()),
            (PLATFORM.to_owned(), image.platform.to_string()),
            (CREATED.to_owned(), created),
        ]);
        Layout::open_or_create(&self.folder, 0o700)
            .await?
            .store(artifact)
            .await
    }

    /// The artifacts of this type of an image, by its manifest's digest; the newest last.
    pub async fn of_image(&self, manifest: &Digest, artifact_type: &str) -> Result<Vec<Referrer>> {
        match self.layout().await? {
            Some(layout) => layout.referrers(manifest, Some(artifact_type)).await,
            None => Ok(Vec::new()),
        }
    }

    /// The artifacts of this type, in the order in which they were added.
    pub(crate) async fn listed(&self, artifact_type: &str) -> Result<Vec<Digest>> {
        let Some(layout) = self.layout().await? else {
            return Ok(Vec::new());
        };
        let listed = layout.listed(artifact_type).await?.into_iter();
        Ok(listed.map(|entry| entry.digest).collect())
    }

    /// The local root's content as a place of blobs. There must be some.
    pub async fn source(&self) -> Result<Source> {
        let reference = Reference::Layout {
            path: self.folder.clone(),
            tag: None,
        };
        Source::open(&reference, &Access::default()).await
    }

    /// An index by its digest, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        self.existing(digest).await?.manifest(digest).await
    }

    /// All indexes, in the order in which they were added. What is damaged is left out.
    pub async fn list(&self) -> Result<Vec<LocalIndex>> {
        let Some(layout) = self.layout().await? else {
            return Ok(Vec::new());
        };
        let mut list = Vec::new();
        for entry in layout.listed(V1_TYPE).await? {
            let digest = entry.digest;
            let noted = |key: &str| entry.annotations.get(key).cloned();
            let Ok(manifest) = layout.manifest(&digest).await else {
                continue;
            };
            let Ok(index) = IndexManifest::parse(&manifest.bytes) else {
                continue;
            };
            list.push(LocalIndex {
                reference: noted(IMAGE_REF),
                platform: noted(PLATFORM),
                created: noted(CREATED),
                ..LocalIndex::parsed(&manifest, &index)
            });
        }
        Ok(list)
    }

    /// Removes an index and the zTOCs that no other one has. `None` when there is no such index.
    pub async fn remove(&self, digest: &Digest) -> Result<Option<Collected>> {
        match self.layout().await? {
            Some(layout) => layout.remove(digest).await,
            None => Ok(None),
        }
    }

    /// The layout, if anything was ever stored.
    async fn layout(&self) -> Result<Option<Layout>> {
        let marker = self.folder.join("oci-layout");
        let exists = tokio::fs::try_exists(&marker)
            .await
            .or_kind(Kind::Io, || marker.display().to_string())?;
        if !exists {
            return Ok(None);
        }
        Layout::open_folder(&self.folder, None).await.map(Some)
    }

    async fn existing(&self, digest: &Digest) -> Result<Layout> {
        self.layout().await?.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("{digest} is not in {}", self.folder.display()),
            )
        })
    }
}
