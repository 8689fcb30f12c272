//! SOCI indexes of this host: an OCI layout at `<root>/content`.
//!
//! Each is a version 1 index whose subject is an image's manifest. Whoever can write here is this host's administrator: an index found
//! here is the operator's own word.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Serialize;

use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, Reference},
    soci::index::{IndexManifest, V1_TYPE},
    source::{
        Access, Manifest, Referrer, Source,
        layout::{Collected, Layout, NewArtifact},
    },
};

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
    /// Layers that it has a zTOC for.
    pub ztocs: usize,
    /// Bytes of the index and its zTOCs.
    pub size: u64,
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

    /// Adds an index and its zTOCs; the newest of its image from now on.
    pub async fn store(&self, artifact: NewArtifact) -> Result<Digest> {
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

    /// A zTOC or another blob of an index, verified.
    pub async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        self.existing(digest).await?.blob(digest, size, limit).await
    }

    /// All indexes, in the order in which they were added. What is damaged is left out.
    pub async fn list(&self) -> Result<Vec<LocalIndex>> {
        let Some(layout) = self.layout().await? else {
            return Ok(Vec::new());
        };
        let mut list = Vec::new();
        for digest in layout.manifests(V1_TYPE).await? {
            let Ok(manifest) = layout.manifest(&digest).await else {
                continue;
            };
            let Ok(index) = IndexManifest::parse(&manifest.bytes) else {
                continue;
            };
            list.push(LocalIndex {
                digest,
                image: index
                    .subject
                    .as_ref()
                    .and_then(|subject| subject.digest.parse().ok()),
                ztocs: index.layers.len(),
                size: index
                    .layers
                    .iter()
                    .filter_map(|layer| u64::try_from(layer.size).ok())
                    .fold(manifest.bytes.len() as u64, u64::saturating_add),
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
