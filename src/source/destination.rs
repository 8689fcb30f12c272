//! Destinations of images, indexes and artifacts: a repository of a registry, or a layout in a directory or a new tar file.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{
    future::BoxFuture,
    stream::{self, BoxStream, StreamExt as _, TryStreamExt as _},
};

use super::{
    Access, Copied, Limits, Opened, Source, SourcePlace,
    containerd::Containerd,
    hosts_of,
    layout::{Incoming, Layout, NewArtifact, Pack},
    registry::{Outgoing, Purpose, Repository, Tap, rest_of},
    repository,
};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, Reference},
};

/// Blobs of an artifact that are sent at a time, where nothing else is asked for.
pub const DEFAULT_UPLOADS: usize = 3;
/// Mode of the folders of a new layout, less the umask.
const FOLDER_MODE: u32 = 0o777;

/// A destination of manifests and blobs. Cheap to clone; clones write to the same place.
///
/// The order of writes keeps each state complete: blobs first, then the manifests that refer to them, then tags. An archive appears only
/// at
/// [`Destination::finish`].
#[derive(Clone)]
pub struct Destination(Arc<Inner>);

struct Inner {
    reference: Reference,
    access: Access,
    place: WritePlace,
}

enum WritePlace {
    Registry(Repository),
    Folder(Layout),
    Archive(Pack),
    Containerd(Containerd),
}

impl Destination {
    /// Opens the destination of a reference, and makes the layout if it does not exist. Uses no network. An archive is written anew and
    /// replaces an existing one at the end.
    pub async fn open(reference: &Reference, access: &Access) -> Result<Self> {
        Self::open_with(reference, access, Limits::default()).await
    }

    /// Like [`Destination::open`], with other limits.
    pub async fn open_with(reference: &Reference, access: &Access, limits: Limits) -> Result<Self> {
        let place = match reference {
            Reference::Registry { host, .. } => {
                let hosts = hosts_of(host, access).await?;
                WritePlace::Registry(repository(reference, hosts, access, limits, Purpose::Push)?)
            }
            Reference::Layout { path, tag: _ } => {
                WritePlace::Folder(Layout::open_or_create(path, FOLDER_MODE).await?)
            }
            Reference::Archive { path, tag: _ } => WritePlace::Archive(Pack::create(path).await?),
            Reference::Containerd { namespace, name } => WritePlace::Containerd(super::containerd(
                namespace,
                name.as_deref(),
                access,
                limits,
            )),
        };
        Ok(Self(Arc::new(Inner {
            reference: reference.clone(),
            access: access.clone(),
            place,
        })))
    }

    /// The place of a source, where artifacts are stored beside an image on this host; `None` for a registry, and for a layout that cannot be
    /// changed.
    pub async fn beside(source: &Source) -> Result<Option<Self>> {
        let is_writable = match &source.0.place {
            SourcePlace::Registry(_) => false,
            SourcePlace::Layout(layout) => layout.is_writable(),
            SourcePlace::Containerd(_) => true,
        };
        match is_writable {
            true => Self::open(source.reference(), source.access())
                .await
                .map(Some),
            false => Ok(None),
        }
    }

    /// The reference that this was opened with.
    pub fn reference(&self) -> &Reference {
        &self.0.reference
    }

    /// The same place to read from; `None` for an archive, which cannot be read before it is finished.
    pub async fn source(&self) -> Result<Option<Source>> {
        let place = match &self.0.place {
            WritePlace::Registry(repository) => SourcePlace::Registry(repository.clone()),
            WritePlace::Folder(_) => {
                return Source::open(&self.0.reference, &self.0.access)
                    .await
                    .map(Some);
            }
            WritePlace::Archive(_) => return Ok(None),
            WritePlace::Containerd(containerd) => SourcePlace::Containerd(containerd.clone()),
        };
        Ok(Some(Source(Arc::new(Opened {
            reference: self.0.reference.clone(),
            access: self.0.access.clone(),
            place,
        }))))
    }

    /// Whether a blob is there.
    pub async fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool> {
        match &self.0.place {
            WritePlace::Registry(repository) => repository.has_blob(digest).await,
            WritePlace::Folder(layout) => layout.has_blob(digest, size).await,
            WritePlace::Archive(pack) => Ok(pack.has_blob(digest)),
            WritePlace::Containerd(containerd) => containerd.has_blob(digest, size).await,
        }
    }

    /// Adds bytes as a blob, unless it is there.
    pub async fn put_blob(&self, bytes: &Bytes) -> Result<Copied> {
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        let feed = |offset: u64| -> BoxFuture<'_, _> { rest_of(bytes, offset) };
        let blob = Outgoing {
            digest: &digest,
            size,
            mount: None,
            feed: &feed,
        };
        match &self.0.place {
            WritePlace::Registry(repository) => repository.copy_blob(blob, None).await,
            WritePlace::Containerd(containerd) => containerd.copy_blob(blob, None).await,
            WritePlace::Folder(layout) => {
                if layout.has_blob(&digest, size).await? {
                    return Ok(Copied::Present);
                }
                layout.put_blob(bytes).await.map(|()| Copied::Uploaded)
            }
            WritePlace::Archive(pack) => {
                if pack.has_blob(&digest) {
                    return Ok(Copied::Present);
                }
                pack.put_blob(bytes).await.map(|()| Copied::Uploaded)
            }
        }
    }

    /// Copies a blob to the destination. Nothing is sent if the destination has it; a registry mounts a blob of its other repositories;
    /// else the bytes are streamed. Only in this last case `tap` is called, and its result receives all bytes, once and in order;
    /// `Uploaded` says that they have the digest.
    pub async fn copy_blob(
        &self,
        from: &Source,
        digest: &Digest,
        size: u64,
        tap: Option<Tap<'_>>,
    ) -> Result<Copied> {
        let feed = |offset: u64| -> BoxFuture<'_, Result<BoxStream<'static, _>>> {
            Box::pin(from.stream_from(digest, offset, size))
        };
        let blob = Outgoing {
            digest,
            size,
            mount: self.mountable(from),
            feed: &feed,
        };
        match &self.0.place {
            WritePlace::Registry(repository) => repository.copy_blob(blob, tap).await,
            WritePlace::Containerd(containerd) => containerd.copy_blob(blob, tap).await,
            WritePlace::Folder(layout) => {
                if layout.has_blob(digest, size).await? {
                    return Ok(Copied::Present);
                }
                let blob = incoming(from, digest, size, tap).await?;
                let other = from.layout();
                layout
                    .copy_blob(blob, other)
                    .await
                    .map(|()| Copied::Uploaded)
            }
            WritePlace::Archive(pack) => {
                if pack.has_blob(digest) {
                    return Ok(Copied::Present);
                }
                let blob = incoming(from, digest, size, tap).await?;
                pack.copy_blob(blob).await.map(|()| Copied::Uploaded)
            }
        }
    }

    /// The repository that blobs of this source can be mounted from: one of the same registry.
    fn mountable<'a>(&self, from: &'a Source) -> Option<&'a str> {
        match (&self.0.reference, from.reference()) {
            (
                Reference::Registry {
                    host, repository, ..
                },
                Reference::Registry {
                    host: from_host,
                    repository: from_repository,
                    ..
                },
            ) if host == from_host && repository != from_repository => Some(from_repository),
            _ => None,
        }
    }

    /// Adds a manifest whose blobs exist, without a tag.
    pub async fn put_manifest(&self, media_type: &str, bytes: &Bytes) -> Result<Digest> {
        match &self.0.place {
            WritePlace::Registry(repository) => {
                repository.put_manifest(media_type, bytes, None).await
            }
            WritePlace::Folder(layout) => layout.put_blob(bytes).await.map(|()| Digest::of(bytes)),
            WritePlace::Archive(pack) => pack.put_blob(bytes).await.map(|()| Digest::of(bytes)),
            WritePlace::Containerd(containerd) => containerd.put_manifest(media_type, bytes).await,
        }
    }

    /// Adds a manifest whose blobs are there, and gives it the tag of this destination's reference: `latest` in a registry if it names
    /// none; in containerd, it makes or changes the image. By a digest in the reference nothing can be tagged: an error.
    pub async fn tag_manifest(&self, media_type: &str, bytes: &Bytes) -> Result<Digest> {
        let tag = match &self.0.reference {
            Reference::Registry {
                digest: Some(digest),
                ..
            } if *digest != Digest::of(bytes) => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!(
                        "{}: the digest of the destination cannot be chosen; give a tag",
                        self.0.reference
                    ),
                ));
            }
            Reference::Registry { tag, digest, .. } => match (tag, digest) {
                (Some(tag), _) => Some(tag.as_str()),
                (None, Some(_)) => None,
                (None, None) => Some("latest"),
            },
            Reference::Layout { tag, .. } | Reference::Archive { tag, .. } => tag.as_deref(),
            Reference::Containerd { .. } => None,
        };
        match &self.0.place {
            WritePlace::Registry(repository) => {
                repository.put_manifest(media_type, bytes, tag).await
            }
            WritePlace::Folder(layout) => layout.tag(media_type, bytes, tag).await,
            WritePlace::Archive(pack) => pack.tag(media_type, bytes, tag).await,
            WritePlace::Containerd(containerd) => containerd.tag(media_type, bytes, tag).await,
        }
    }

    /// Adds a manifest whose blobs are there, under another tag of this place.
    pub async fn tag_as(&self, media_type: &str, bytes: &Bytes, tag: &str) -> Result<Digest> {
        match &self.0.place {
            WritePlace::Registry(repository) => {
                repository.put_manifest(media_type, bytes, Some(tag)).await
            }
            WritePlace::Folder(layout) => layout.tag(media_type, bytes, Some(tag)).await,
            WritePlace::Archive(pack) => pack.tag(media_type, bytes, Some(tag)).await,
            WritePlace::Containerd(containerd) => {
                containerd.tag(media_type, bytes, Some(tag)).await
            }
        }
    }

    /// Adds an artifact that refers to a manifest, so that it is listed among the referrers of the manifest: by the API of the registry or
    /// else in the list under the referrers tag, in a layout by `index.json`, and in containerd by labels. `uploads` blobs are sent in
    /// parallel.
    pub async fn put_referrer(
        &self,
        artifact: NewArtifact,
        subject: &Digest,
        uploads: usize,
    ) -> Result<Digest> {
        match &self.0.place {
            WritePlace::Registry(repository) => {
                self.put_blobs(&artifact, uploads).await?;
                repository.put_referrer(&artifact, subject).await
            }
            WritePlace::Containerd(containerd) => {
                self.put_blobs(&artifact, uploads).await?;
                containerd.put_referrer(&artifact, subject).await
            }
            WritePlace::Folder(layout) => layout.store(artifact).await,
            WritePlace::Archive(pack) => {
                for blob in artifact.blobs.iter().chain([&artifact.manifest]) {
                    pack.put_blob(blob).await?;
                }
                pack.list(artifact.entry());
                Ok(Digest::of(&artifact.manifest))
            }
        }
    }

    async fn put_blobs(&self, artifact: &NewArtifact, uploads: usize) -> Result<()> {
        stream::iter(artifact.blobs.clone())
            .map(|blob| {
                let to = self.clone();
                async move { to.put_blob(&blob).await }
            })
            .buffer_unordered(uploads.max(1))
            .try_for_each(|_| async { Ok(()) })
            .await
    }

    /// Removes a referrer and its entries in lists; a manifest that does not refer to the subject is an error. `false` if it does not
    /// exist.
    pub async fn delete_referrer(&self, digest: &Digest, subject: &Digest) -> Result<bool> {
        match &self.0.place {
            WritePlace::Registry(repository) => repository.delete_referrer(digest, subject).await,
            WritePlace::Folder(layout) => layout.unlist_referrer(digest, subject).await,
            WritePlace::Archive(_) => Ok(false),
            WritePlace::Containerd(containerd) => containerd.delete_referrer(digest, subject).await,
        }
    }

    /// All is written. Makes an archive whole, and ends the lease of containerd; a registry and a folder are whole at each moment.
    pub async fn finish(&self) -> Result<()> {
        match &self.0.place {
            WritePlace::Registry(_) | WritePlace::Folder(_) => Ok(()),
            WritePlace::Archive(pack) => pack.finish().await,
            WritePlace::Containerd(containerd) => {
                containerd.finish().await;
                Ok(())
            }
        }
    }
}

/// A blob of a source, with the receivers of its bytes.
async fn incoming(
    from: &Source,
    digest: &Digest,
    size: u64,
    tap: Option<Tap<'_>>,
) -> Result<Incoming> {
    Ok(Incoming {
        digest: *digest,
        size,
        pieces: from.stream(digest, size).await?,
        tap: tap.map(|tap| tap()),
    })
}
