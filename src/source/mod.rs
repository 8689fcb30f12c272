//! Sources of blobs: a registry (OCI distribution 1.1), an OCI image layout, in a directory or a tar file, or the images of containerd.
//!
//! [`Source`] is the common interface of all, and [`Destination`] that for writing. Content that is fetched as a whole by its digest (manifests,
//! small blobs) is verified here. Ranges and streams are verified by the caller, which alone knows the digest of a span.

use std::{
    ops::Range,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::BoxStream};

use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    oci::{Digest, Reference},
};

mod access;
mod containerd;
mod destination;
mod go_duration;
pub(crate) mod hosts;
pub mod layout;
mod limits;
mod registry;
mod types;

pub(crate) use access::socket_path;
pub use access::{Access, CredentialPlugins, GivenCredentials};
pub use destination::{DEFAULT_UPLOADS, Destination};
pub use limits::Limits;
pub use types::{Copied, Manifest, Referrer};

pub(crate) use registry::{RequestLoad, request_load};

use containerd::Containerd;
use hosts::RegistryHost;
use layout::Layout;
use registry::{Purpose, Repository, RepositoryName};

pub(crate) use registry::pull_credentials;

/// One place that has manifests and blobs: a repository of a registry, a layout, or a namespace of containerd. Cheap to clone; connections, tokens and redirect
/// targets are shared by clones.
#[derive(Clone)]
pub struct Source(Arc<Opened>);

/// A source that stays open only as long as there is a [`Source`] of it.
#[derive(Clone, Default)]
pub(crate) struct WeakSource(Weak<Opened>);

impl WeakSource {
    pub(crate) fn upgrade(&self) -> Option<Source> {
        self.0.upgrade().map(Source)
    }
}

struct Opened {
    reference: Reference,
    access: Access,
    place: SourcePlace,
}

enum SourcePlace {
    Registry(Repository),
    Layout(Layout),
    Containerd(Containerd),
}

/// The hosts that serve a registry.
async fn hosts_of(registry: &str, access: &Access) -> Result<Vec<RegistryHost>> {
    if access.hosts_dirs.is_empty() {
        return Ok(vec![
            RegistryHost::registry(registry, access)?.with_headers(access),
        ]);
    }
    let (registry, access) = (registry.to_owned(), access.clone());
    blocking(move || hosts::of_registry(&registry, &access)).await
}

/// The repository of a reference to a registry, at these hosts.
fn repository(
    reference: &Reference,
    hosts: Vec<RegistryHost>,
    access: &Access,
    limits: Limits,
    purpose: Purpose,
) -> Result<Repository> {
    let Reference::Registry {
        host,
        repository,
        tag,
        digest,
    } = reference
    else {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{reference} is not in a registry"),
        ));
    };
    let name = RepositoryName {
        host,
        repository,
        tag: tag.as_deref(),
        digest: *digest,
    };
    Repository::open(name, hosts, access, limits, purpose)
}

/// A namespace of the containerd of an access.
fn containerd(namespace: &str, name: Option<&str>, access: &Access, limits: Limits) -> Containerd {
    let address = access.containerd_address.as_deref();
    Containerd::open(address, namespace, name, limits)
}

impl Source {
    /// Opens the place that a reference names. Touches no network.
    pub async fn open(reference: &Reference, access: &Access) -> Result<Self> {
        Self::open_with(reference, access, Limits::default()).await
    }

    /// Like [`Source::open`], with other limits.
    pub async fn open_with(reference: &Reference, access: &Access, limits: Limits) -> Result<Self> {
        let place = match reference {
            Reference::Registry { host, .. } => {
                let hosts = hosts_of(host, access).await?;
                SourcePlace::Registry(repository(reference, hosts, access, limits, Purpose::Pull)?)
            }
            Reference::Layout { path, tag } => {
                SourcePlace::Layout(Layout::open_folder(path, tag.as_deref()).await?)
            }
            Reference::Archive { path, tag } => {
                SourcePlace::Layout(Layout::open_archive(path, tag.as_deref()).await?)
            }
            Reference::Containerd { namespace, name } => {
                SourcePlace::Containerd(containerd(namespace, name.as_deref(), access, limits))
            }
        };
        Ok(Self(Arc::new(Opened {
            reference: reference.clone(),
            access: access.clone(),
            place,
        })))
    }

    /// Like [`Source::open_with`], at one of the hosts that serve the registry of the reference.
    pub(crate) fn open_at(
        reference: &Reference,
        access: &Access,
        limits: Limits,
        host: RegistryHost,
    ) -> Result<Self> {
        let repository = repository(reference, vec![host], access, limits, Purpose::Pull)?;
        Ok(Self(Arc::new(Opened {
            reference: reference.clone(),
            access: access.clone(),
            place: SourcePlace::Registry(repository),
        })))
    }

    /// The only host that it asks; `None` where it is on this host, and where there are several.
    pub(crate) fn only_host(&self) -> Option<&RegistryHost> {
        let SourcePlace::Registry(repository) = &self.0.place else {
            return None;
        };
        let mut hosts = repository.hosts();
        let host = hosts.next()?;
        hosts.next().is_none().then_some(host)
    }

    /// This source at each of its hosts alone; none if it has one host only, or is a layout.
    pub(crate) fn at_each_host(&self) -> Vec<Self> {
        let SourcePlace::Registry(repository) = &self.0.place else {
            return Vec::new();
        };
        let places = repository.at_each_host().into_iter();
        places
            .map(|repository| {
                Self(Arc::new(Opened {
                    reference: self.0.reference.clone(),
                    access: self.0.access.clone(),
                    place: SourcePlace::Registry(repository),
                }))
            })
            .collect()
    }

    /// Work that finds out whether the bytes of this source are right. If they are not (`Corrupt`), it is not known which of several hosts has
    /// sent them: the work is done again with each host alone, until one has the right bytes. Others are asked before those that have not.
    pub(crate) async fn with_right_bytes<T, F>(&self, work: impl Fn(Self) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut done = work(self.clone()).await;
        let is_wrong = |done: &Result<T>| {
            let error = done.as_ref().err();
            error.is_some_and(|error| error.kind() == Kind::Corrupt)
        };
        if !is_wrong(&done) {
            return done;
        }
        for host in self.at_each_host() {
            let again = work(host.clone()).await;
            match (&again, &host.0.place) {
                (Ok(_), _) => return again,
                (Err(error), SourcePlace::Registry(repository)) if is_wrong(&again) => {
                    repository.distrust(error);
                    done = again;
                }
                _ => {}
            }
        }
        done
    }

    pub(crate) fn downgrade(&self) -> WeakSource {
        WeakSource(Arc::downgrade(&self.0))
    }

    /// The reference that this was opened with.
    pub fn reference(&self) -> &Reference {
        &self.0.reference
    }

    /// The access that it was opened with.
    pub fn access(&self) -> &Access {
        &self.0.access
    }

    /// The layout of this source, if it is one.
    pub fn layout(&self) -> Option<&Layout> {
        match &self.0.place {
            SourcePlace::Layout(layout) => Some(layout),
            SourcePlace::Registry(_) | SourcePlace::Containerd(_) => None,
        }
    }

    /// Whether it is on this host, and not a registry.
    pub fn is_here(&self) -> bool {
        !matches!(self.0.place, SourcePlace::Registry(_))
    }

    /// Whether it has requests without an answer, and was waited for as long as this without progress.
    pub(crate) fn is_silent(&self, time: Duration) -> bool {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.is_silent(time),
            SourcePlace::Layout(_) | SourcePlace::Containerd(_) => false,
        }
    }

    /// The manifest or index that the reference itself names (its digest, or its tag).
    pub async fn root_manifest(&self) -> Result<Manifest> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.root_manifest().await,
            SourcePlace::Layout(layout) => layout.root_manifest().await,
            SourcePlace::Containerd(containerd) => containerd.root_manifest().await,
        }
    }

    /// The manifest or index that another tag of this place names, if there is one.
    pub async fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.find_tag(tag).await,
            SourcePlace::Layout(layout) => layout.tagged(tag).await,
            SourcePlace::Containerd(containerd) => containerd.tagged(tag).await,
        }
    }

    /// A manifest by digest, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.manifest(digest).await,
            SourcePlace::Layout(layout) => layout.manifest(digest).await,
            SourcePlace::Containerd(containerd) => containerd.manifest(digest).await,
        }
    }

    /// A whole small blob (at most `limit` bytes), verified against digest and size.
    pub async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.blob(digest, size, limit).await,
            SourcePlace::Layout(layout) => layout.blob(digest, size, limit).await,
            SourcePlace::Containerd(containerd) => containerd.blob(digest, size, limit).await,
        }
    }

    /// A range of a blob: exactly these bytes. Not verified: the caller has the span's digest. Retries inside.
    pub async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.range(digest, range).await,
            SourcePlace::Layout(layout) => layout.range(digest, range).await,
            SourcePlace::Containerd(containerd) => containerd.range(digest, range).await,
        }
    }

    /// Like [`Source::range`], of bytes with this digest. A host that sends other bytes is followed by the next.
    pub async fn verified_range(
        &self,
        digest: &Digest,
        range: Range<u64>,
        expected: &Digest,
    ) -> Result<Bytes> {
        match &self.0.place {
            SourcePlace::Registry(repository) => {
                repository.verified_range(digest, range, expected).await
            }
            SourcePlace::Layout(_) | SourcePlace::Containerd(_) => {
                let bytes = self.range(digest, range).await?;
                expected.verify(&bytes)?;
                Ok(bytes)
            }
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
            SourcePlace::Registry(repository) => repository.pieces(digest, range, patience),
            SourcePlace::Layout(layout) => {
                let (layout, digest) = (layout.clone(), *digest);
                futures_util::stream::once(async move { layout.range(&digest, range).await })
                    .boxed()
            }
            SourcePlace::Containerd(containerd) => containerd.pieces(digest, range),
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
            SourcePlace::Registry(repository) => repository.stream(digest, size).await,
            SourcePlace::Layout(layout) => layout.stream(digest, 0, size).await,
            SourcePlace::Containerd(containerd) => containerd.stream(digest, 0, size).await,
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
            SourcePlace::Registry(repository) if offset == 0 => {
                repository.stream(digest, size).await
            }
            SourcePlace::Registry(repository) => Ok(repository.stream_from(digest, offset, size)),
            SourcePlace::Layout(layout) => layout.stream(digest, offset, size).await,
            SourcePlace::Containerd(containerd) => containerd.stream(digest, offset, size).await,
        }
    }

    /// The referrers of a manifest with this artifact type: the API with pagination, else the tag fallback; for a layout, from its
    /// index; for containerd, from labels. In the order given.
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
            SourcePlace::Registry(repository) => repository.referrers(subject, artifact_type).await,
            SourcePlace::Layout(layout) => layout.referrers(subject, artifact_type).await,
            SourcePlace::Containerd(containerd) => {
                containerd.referrers(subject, artifact_type).await
            }
        }
    }

    /// The images of a namespace of containerd, if it was opened without the name of one; else the reference that it was opened with.
    pub async fn images(&self) -> Result<Vec<Reference>> {
        match (&self.0.place, &self.0.reference) {
            (
                SourcePlace::Containerd(containerd),
                Reference::Containerd {
                    namespace,
                    name: None,
                },
            ) => {
                let of_name = |name| Reference::Containerd {
                    namespace: namespace.clone(),
                    name: Some(name),
                };
                let names = containerd.names().await?;
                Ok(names.into_iter().map(of_name).collect())
            }
            (_, reference) => Ok(vec![reference.clone()]),
        }
    }

    /// All tags, sorted.
    pub async fn tags(&self) -> Result<Vec<String>> {
        match &self.0.place {
            SourcePlace::Registry(repository) => repository.tags().await,
            SourcePlace::Layout(layout) => layout.tags().await,
            SourcePlace::Containerd(containerd) => containerd.tags().await,
        }
    }
}
