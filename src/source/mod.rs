//! Sources of blobs: a registry (OCI distribution 1.1) or an OCI image layout, in a directory or a tar file.
//!
//! [`Source`] is the common interface of both, and [`Destination`] that for writing. Content that is fetched as a whole by its digest (manifests,
//! small blobs) is verified here. Ranges and streams are verified by the caller, which alone knows the digest of a span.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::BoxStream};

use crate::{
    error::Result,
    oci::{Digest, Reference},
};

mod access;
mod destination;
pub mod layout;
mod limits;
mod registry;
mod types;

pub use access::Access;
pub use destination::{DEFAULT_UPLOADS, Destination};
pub use limits::Limits;
pub use types::{Copied, Manifest, Referrer};

use layout::Layout;
use registry::{Purpose, Repository};

/// One place that has manifests and blobs: a repository of a registry, or a layout. Cheap to clone; connections, tokens and redirect
/// targets are shared by clones.
#[derive(Clone)]
pub struct Source(Arc<Opened>);

struct Opened {
    reference: Reference,
    access: Access,
    place: Place,
}

enum Place {
    Registry(Repository),
    Layout(Layout),
}

impl Source {
    /// Opens the place that a reference names. Touches no network.
    pub async fn open(reference: &Reference, access: &Access) -> Result<Self> {
        Self::open_with(reference, access, Limits::default()).await
    }

    /// Like [`Source::open`], with other limits.
    pub async fn open_with(reference: &Reference, access: &Access, limits: Limits) -> Result<Self> {
        let place = match reference {
            Reference::Registry {
                host,
                repository,
                tag,
                digest,
            } => Place::Registry(Repository::open(
                host,
                repository,
                tag.as_deref(),
                *digest,
                access,
                limits,
                Purpose::Pull,
            )?),
            Reference::Layout { path, tag } => {
                Place::Layout(Layout::open_folder(path, tag.as_deref()).await?)
            }
            Reference::Archive { path, tag } => {
                Place::Layout(Layout::open_archive(path, tag.as_deref()).await?)
            }
        };
        Ok(Self(Arc::new(Opened {
            reference: reference.clone(),
            access: access.clone(),
            place,
        })))
    }

    /// The reference that this was opened with.
    pub fn reference(&self) -> &Reference {
        &self.0.reference
    }

    /// The access that it was opened with.
    pub fn access(&self) -> &Access {
        &self.0.access
    }

    /// The layout of this source; `None` for a registry.
    pub fn layout(&self) -> Option<&Layout> {
        match &self.0.place {
            Place::Registry(_) => None,
            Place::Layout(layout) => Some(layout),
        }
    }

    /// Whether it is on this host: a layout, and not a registry.
    pub fn is_here(&self) -> bool {
        self.layout().is_some()
    }

    /// The manifest or index that the reference itself names (its digest, or its tag).
    pub async fn root_manifest(&self) -> Result<Manifest> {
        match &self.0.place {
            Place::Registry(repository) => repository.root_manifest().await,
            Place::Layout(layout) => layout.root_manifest().await,
        }
    }

    /// The manifest or index that another tag of this place names, if there is one.
    pub async fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        match &self.0.place {
            Place::Registry(repository) => repository.find_tag(tag).await,
            Place::Layout(layout) => layout.tagged(tag).await,
        }
    }

    /// A manifest by digest, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        match &self.0.place {
            Place::Registry(repository) => repository.manifest(digest).await,
            Place::Layout(layout) => layout.manifest(digest).await,
        }
    }

    /// A whole small blob (at most `limit` bytes), verified against digest and size.
    pub async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        match &self.0.place {
            Place::Registry(repository) => repository.blob(digest, size, limit).await,
            Place::Layout(layout) => layout.blob(digest, size, limit).await,
        }
    }

    /// A range of a blob: exactly these bytes. Not verified: the caller has the span's digest. Retries inside.
    pub async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        match &self.0.place {
            Place::Registry(repository) => repository.range(digest, range).await,
            Place::Layout(layout) => layout.range(digest, range).await,
        }
    }

    /// The same bytes in pieces, as they arrive. `patience` limits the time in which failures without any progress are retried, for
    /// callers that have another source or retry by themselves. Ends after exactly the range, or with an error.
    pub fn pieces(
        &self,
        digest: &Digest,
        range: Range<u64>,
        patience: Duration,
    ) -> BoxStream<'static, Result<Bytes>> {
        match &self.0.place {
            Place::Registry(repository) => repository.pieces(digest, range, patience),
            Place::Layout(layout) => {
                let (layout, digest) = (layout.clone(), *digest);
                futures_util::stream::once(async move { layout.range(&digest, range).await })
                    .boxed()
            }
        }
    }

    /// A whole blob in order, from several ranged GETs side by side where it is large; resumes after a cut. Not verified: the caller
    /// hashes as it passes. Ends after exactly `size` bytes or with an error.
    pub async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        match &self.0.place {
            Place::Registry(repository) => repository.stream(digest, size).await,
            Place::Layout(layout) => layout.stream(digest, 0, size).await,
        }
    }

    /// Like [`Source::stream`], from this offset on.
    async fn stream_from(
        &self,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        match &self.0.place {
            Place::Registry(repository) if offset == 0 => repository.stream(digest, size).await,
            Place::Registry(repository) => Ok(repository.stream_from(digest, offset, size)),
            Place::Layout(layout) => layout.stream(digest, offset, size).await,
        }
    }

    /// The referrers of a manifest with this artifact type: the API with pagination, else the tag fallback; for a layout, from its
    /// index. In the order given.
    pub async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Referrer>> {
        self.referrers_of_type(subject, Some(artifact_type)).await
    }

    /// All referrers of a manifest, of any type.
    pub async fn all_referrers(&self, subject: &Digest) -> Result<Vec<Referrer>> {
        self.referrers_of_type(subject, None).await
    }

    async fn referrers_of_type(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>> {
        match &self.0.place {
            Place::Registry(repository) => repository.referrers(subject, artifact_type).await,
            Place::Layout(layout) => layout.referrers(subject, artifact_type).await,
        }
    }

    /// All tags, sorted.
    pub async fn tags(&self) -> Result<Vec<String>> {
        match &self.0.place {
            Place::Registry(repository) => repository.tags().await,
            Place::Layout(layout) => layout.tags().await,
        }
    }
}
