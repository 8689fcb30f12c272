//! The SOCI indexes of this host: an OCI layout at `<root>/content`.
//!
//! Each is a version 1 index whose subject is an image manifest. Only the administrator can write here, so the indexes are trusted as the
//! administrator's.

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

/// Annotation of an entry in `index.json`: the image reference.
const IMAGE_REF: &str = "io.socinbd.image.ref";
/// Platform of the image.
const PLATFORM: &str = "io.socinbd.image.platform";
/// Annotation: time when the index was stored (OCI image specification, annotations).
const CREATED: &str = "org.opencontainers.image.created";

/// The indexes in a root.
#[derive(Clone, Debug)]
pub struct LocalIndexes {
    directory: PathBuf,
}

/// An index in the root, or of an image.
#[derive(Clone, Debug, Serialize)]
pub struct LocalIndex {
    /// Digest of the index.
    pub digest: Digest,
    /// Digest of the image manifest that it belongs to.
    pub image: Option<Digest>,
    /// Reference of the image that the index was made for.
    pub reference: Option<String>,
    /// Platform of the image.
    pub platform: Option<String>,
    /// Time when it was stored, RFC 3339.
    pub created: Option<String>,
    /// SOCI version; version 2 indexes are never stored here.
    pub version: u8,
    /// Number of its zTOCs.
    pub ztocs: usize,
    /// Size of the index and its zTOCs in bytes.
    pub size: u64,
}

impl LocalIndex {
    /// An index of an image, from any source.
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
    /// The indexes in this root. Reads no file: the layout may not exist yet.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_absolute() {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("{} is not an absolute path", root.display()),
            ));
        }
        Ok(Self {
            directory: root.join("content"),
        })
    }

    /// Stores an index with its zTOCs. It is the newest index of its image from now on.
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
        Layout::open_or_create(&self.directory, 0o700)
            .await?
            .store(artifact)
            .await
    }

    /// The artifacts of this type that refer to an image manifest, newest last.
    pub async fn of_image(&self, manifest: &Digest, artifact_type: &str) -> Result<Vec<Referrer>> {
        match self.layout().await? {
            Some(layout) => layout.referrers(manifest, Some(artifact_type)).await,
            None => Ok(Vec::new()),
        }
    }

    /// All artifacts of this type, in the order in which they were stored.
    pub(crate) async fn listed(&self, artifact_type: &str) -> Result<Vec<Digest>> {
        let Some(layout) = self.layout().await? else {
            return Ok(Vec::new());
        };
        let listed = layout.listed(artifact_type).await?.into_iter();
        Ok(listed.map(|entry| entry.digest).collect())
    }

    /// The layout as a source. The layout must exist.
    pub async fn source(&self) -> Result<Source> {
        let reference = Reference::Layout {
            path: self.directory.clone(),
            tag: None,
        };
        Source::open(&reference, &Access::default()).await
    }

    /// The manifest of an index, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        self.existing(digest).await?.manifest(digest).await
    }

    /// All indexes, in the order in which they were stored, except damaged ones.
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

    /// Removes an index and the zTOCs that no other index has. `None` if the index does not exist.
    pub async fn remove(&self, digest: &Digest) -> Result<Option<Collected>> {
        match self.layout().await? {
            Some(layout) => layout.remove(digest).await,
            None => Ok(None),
        }
    }

    /// The layout, if it exists.
    async fn layout(&self) -> Result<Option<Layout>> {
        let marker = self.directory.join("oci-layout");
        let exists = tokio::fs::try_exists(&marker)
            .await
            .or_kind(Kind::Io, || marker.display().to_string())?;
        if !exists {
            return Ok(None);
        }
        Layout::open_folder(&self.directory, None).await.map(Some)
    }

    async fn existing(&self, digest: &Digest) -> Result<Layout> {
        self.layout().await?.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("{digest} is not in {}", self.directory.display()),
            )
        })
    }
}
