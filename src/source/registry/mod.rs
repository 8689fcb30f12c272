//! A repository of a registry: the client side of the OCI distribution specification 1.1.
//!
//! From below: [`transport`] is HTTP; [`client`] one GET with [`auth`]orization and redirects; [`reader`] reads a range of a blob
//! through failures ([`retry`]), and [`stream`] a whole blob by several of them; [`document`] reads small JSON, from which
//! [`manifest`] and [`referrers`] are made.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;

use super::{Access, Limits, Manifest, Referrer};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
};

mod auth;
mod challenge;
mod client;
mod content_range;
mod credentials;
mod document;
mod link;
mod manifest;
mod reader;
mod referrers;
mod refusal;
mod retry;
mod stream;
mod transport;

use client::Client;
use reader::Reader;

/// Bytes set aside for a range before any has come; a longer one grows as it comes.
const FIRST_CAPACITY: u64 = 8 << 20;

/// One repository, and what was asked of it.
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
    ) -> Result<Self> {
        Ok(Self {
            client: Arc::new(Client::new(host, repository, access, limits)?),
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
                    "blob {digest} of {} has {size} bytes: at most {limit} are taken here",
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
                "reading blob {digest} of {}: twice other bytes than the digest's{found}",
                self.client.name()
            ),
        ))
    }

    /// `patience`: other than the limit for blobs.
    pub(super) async fn range(
        &self,
        digest: &Digest,
        range: Range<u64>,
        patience: Option<Duration>,
    ) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let mut reader = Reader::new(&self.client, digest, range, None);
        if let Some(patience) = patience {
            reader.set_patience(patience);
        }
        collect(reader, length).await
    }

    pub(super) async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        Ok(stream::open(Arc::clone(&self.client), *digest, size))
    }

    pub(super) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>> {
        referrers::list(&self.client, subject, artifact_type).await
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
