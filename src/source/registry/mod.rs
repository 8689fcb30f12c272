//! A repository of a registry: the client side of the OCI distribution specification 1.1.
//!
//! From bottom to top: [`transport`] is HTTP, with `transport::trust` and `transport::no_proxy`; [`client`] is one request with [`auth`]orization and redirects; [`reader`] reads a range of
//! a blob across failures ([`retry`]), and [`stream`] a whole blob with several of them; [`document`] reads small JSON documents, on which
//! [`manifest`], [`tags`] and [`referrers`] are based. [`upload`] writes blobs, [`referrers_list`] the list that replaces the referrers API.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{BoxStream, StreamExt as _, try_unfold};

use super::{Access, Copied, Limits, Manifest, Referrer, layout::NewArtifact};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, referrers::referring},
};

mod auth;
mod client;
mod content_range;
mod document;
mod link;
mod manifest;
mod reader;
mod referrers;
mod refusal;
mod retry;
mod stream;
mod tags;
mod transport;
mod upload;

use client::Client;
use reader::Reader;

pub(super) use auth::Purpose;
pub(super) use upload::{Outgoing, Tap};

/// Bytes set aside for a range before any has come; a longer one grows as it comes.
const FIRST_CAPACITY: u64 = 8 << 20;

/// One repository, and what is known of it so far.
#[derive(Clone)]
pub(super) struct Repository {
    client: Arc<Client>,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Repository {
    pub(super) fn open(
        host: &str,
        repository: &str,
        tag: Option<&str>,
        digest: Option<Digest>,
        access: &Access,
        limits: Limits,
        purpose: Purpose,
    ) -> Result<Self> {
        Ok(Self {
            client: Arc::new(Client::new(host, repository, access, limits, purpose)?),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    pub(super) async fn root_manifest(&self) -> Result<Manifest> {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => manifest::by_digest(&self.client, digest).await,
            (None, Some(tag)) => manifest::by_tag(&self.client, tag).await,
            (None, None) => manifest::by_tag(&self.client, "latest").await,
        }
    }

    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        manifest::by_digest(&self.client, digest).await
    }

    pub(super) async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        if size > limit {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "blob {digest} of {} has {size} bytes, over the limit of {limit}",
                    self.client.name()
                ),
            ));
        }
        let mut wrong = None;
        // wrong bytes are mostly a bad copy somewhere on the way: once more, and then it is the registry's
        for _ in 0..2 {
            let bytes =
                collect(Reader::new(&self.client, digest, 0..size, Some(size)), size).await?;
            let found = Digest::of(&bytes);
            if found == *digest {
                return Ok(bytes);
            }
            self.client.forget_target(digest);
            wrong = Some(found);
        }
        let found = wrong.map_or_else(String::new, |found| format!(" (they have {found})"));
        Err(Error::new(
            Kind::Corrupt,
            format!(
                "reading blob {digest} of {}: the content did not match the digest twice{found}",
                self.client.name()
            ),
        ))
    }

    pub(super) async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        collect(Reader::new(&self.client, digest, range, None), length).await
    }

    pub(super) fn pieces(
        &self,
        digest: &Digest,
        range: Range<u64>,
        patience: Duration,
    ) -> BoxStream<'static, Result<Bytes>> {
        let mut reader = Reader::new(&self.client, digest, range, None);
        reader.set_patience(patience);
        try_unfold(reader, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        })
        .boxed()
    }

    pub(super) async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        Ok(stream::open(Arc::clone(&self.client), *digest, size))
    }

    /// A blob from this offset on, in order, by one request after the other.
    pub(super) fn stream_from(
        &self,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> BoxStream<'static, Result<Bytes>> {
        let reader = Reader::new(&self.client, digest, offset..size, Some(size));
        try_unfold(reader, async |mut reader| {
            Ok(reader.next().await?.map(|bytes| (bytes, reader)))
        })
        .boxed()
    }

    /// Those of one type, or all.
    pub(super) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>> {
        referrers::list(&self.client, subject, artifact_type).await
    }

    pub(super) async fn tags(&self) -> Result<Vec<String>> {
        tags::list(&self.client).await
    }

    /// The manifest of a tag; `None` if the tag does not exist.
    pub(super) async fn find_tag(&self, tag: &str) -> Result<Option<Manifest>> {
        match manifest::by_tag(&self.client, tag).await {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool> {
        upload::has(&self.client, digest).await
    }

    pub(super) async fn copy_blob(
        &self,
        blob: Outgoing<'_>,
        tap: Option<Tap<'_>>,
    ) -> Result<Copied> {
        upload::copy(&self.client, blob, tap).await
    }

    /// Stores a manifest, under a tag where one is given.
    pub(super) async fn put_manifest(
        &self,
        media_type: &str,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let name = tag.map_or_else(|| digest.to_string(), str::to_owned);
        manifest::put(&self.client, &name, media_type, bytes).await?;
        Ok(digest)
    }

    /// Stores the manifest of an artifact, and sees to it that it is listed among its subject's referrers.
    pub(super) async fn put_referrer(
        &self,
        artifact: &NewArtifact,
        subject: &Digest,
    ) -> Result<Digest> {
        let digest = Digest::of(&artifact.manifest);
        let name = digest.to_string();
        let (media_type, bytes) = (&artifact.media_type, &artifact.manifest);
        let is_noted = manifest::put(&self.client, &name, media_type, bytes)
            .await?
            .is_some();
        // asked as readers ask, whatever the answer to the PUT was
        let artifact_type = Some(artifact.artifact_type.as_str());
        match referrers::by_api(&self.client, subject, artifact_type).await? {
            None => referrers::list::add(&self.client, subject, &artifact.entry()).await?,
            Some(list) if is_noted || list.iter().any(|listed| listed.digest == digest) => {}
            Some(_) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "{} has the referrers API, but does not list the referrer that it has just stored: {digest} of {subject}",
                        self.client.name()
                    ),
                ));
            }
        }
        Ok(digest)
    }

    /// Removes a referrer and its entry in the list that replaces the referrers API. The manifest with this digest must refer to the
    /// subject. `false` if neither existed.
    pub(super) async fn delete_referrer(&self, digest: &Digest, subject: &Digest) -> Result<bool> {
        let is_there = match manifest::by_digest(&self.client, digest).await {
            Ok(found) if referring(&found.bytes, subject).is_some() => true,
            Ok(_) => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!(
                        "{digest} of {} does not refer to {subject}; it is not removed",
                        self.client.name()
                    ),
                ));
            }
            Err(error) if error.kind() == Kind::NotFound => false,
            Err(error) => return Err(error),
        };
        // the entry first: everything that is listed must exist
        let was_listed = referrers::list::remove(&self.client, subject, digest).await?;
        let was_there = is_there && manifest::delete(&self.client, digest).await?;
        Ok(was_listed || was_there)
    }
}

/// All that a reader gives.
async fn collect(mut reader: Reader, length: u64) -> Result<Bytes> {
    let Some(first) = reader.next().await? else {
        return Ok(Bytes::new());
    };
    if first.len() as u64 == length {
        return Ok(first);
    }
    // at most 8 MiB, which a usize holds
    let capacity = usize::try_from(length.min(FIRST_CAPACITY)).unwrap_or(0);
    let mut bytes = BytesMut::with_capacity(capacity);
    bytes.extend_from_slice(&first);
    while let Some(piece) = reader.next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}
