//! A repository of a registry: the client side of the OCI distribution specification 1.1.
//!
//! From bottom to top: [`transport`] is HTTP, with `transport::trust` and `transport::no_proxy`; [`client`] is one request with [`auth`]orization and redirects; [`reader`] reads a range of
//! a blob across failures ([`retry`]), [`stream`] a whole blob with several of them, and [`failover`] from several hosts; [`document`] reads small JSON documents, on which
//! [`manifest`], [`tags`] and [`referrers`] are based. [`upload`] writes blobs, [`referrers_list`] the list that replaces the referrers API.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;

use super::{
    Access, Copied, Limits, Manifest, Referrer,
    hosts::{RegistryHost, host::Request},
    layout::NewArtifact,
};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, referrers::referring},
};

mod activity;
mod auth;
mod client;
mod document;
mod failover;
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
pub(crate) use auth::pull_credentials;
pub(crate) use transport::{RequestLoad, request_load};
pub(super) use upload::{Outgoing, Tap, rest_of};

/// Bytes set aside for a range before any has come; a longer one grows as it comes.
const FIRST_CAPACITY: u64 = 8 << 20;

/// One repository, and what is known of it so far.
#[derive(Clone)]
pub(super) struct Repository {
    /// One for each host, in the order of `hosts.toml`; at least one.
    clients: Arc<[Arc<Client>]>,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What a reference names.
pub(super) struct RepositoryName<'a> {
    /// The registry.
    pub(super) host: &'a str,
    pub(super) repository: &'a str,
    pub(super) tag: Option<&'a str>,
    pub(super) digest: Option<Digest>,
}

impl Repository {
    /// `hosts`: those that serve the registry. To write, the first that may be written to is used alone: a mirror may not have yet what was
    /// written elsewhere.
    pub(super) fn open(
        name: RepositoryName<'_>,
        hosts: Vec<RegistryHost>,
        access: &Access,
        limits: Limits,
        purpose: Purpose,
    ) -> Result<Self> {
        let RepositoryName {
            host: registry,
            repository,
            tag,
            digest,
        } = name;
        let hosts: Vec<RegistryHost> = match purpose {
            Purpose::Pull => hosts,
            Purpose::Push => hosts
                .into_iter()
                .find(|host| host.allows(Request::Push))
                .map(RegistryHost::with_all_capabilities)
                .into_iter()
                .collect(),
        };
        let count = hosts.len();
        if count == 0 {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("no host of hosts.toml for {registry} has the capability \"push\""),
            ));
        }
        let mut clients = Vec::new();
        for (number, host) in hosts.into_iter().enumerate() {
            let limits = match number + 1 < count {
                true => failover::limits_before_others(limits),
                false => limits,
            };
            let client = Client::new(host, registry, repository, access, limits, purpose)?;
            clients.push(Arc::new(client));
        }
        Ok(Self {
            clients: clients.into(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// The hosts that it asks.
    pub(super) fn hosts(&self) -> impl Iterator<Item = &RegistryHost> {
        self.clients.iter().map(|client| client.host())
    }

    /// The same repository at each of its hosts that blobs are pulled from, alone; none if there is one host only.
    pub(super) fn at_each_host(&self) -> Vec<Self> {
        if self.clients.len() < 2 {
            return Vec::new();
        }
        let clients = self.clients.iter();
        clients
            .filter(|client| client.host().allows(Request::Pull))
            .map(|client| Self {
                clients: Arc::from([Arc::clone(client)]),
                ..self.clone()
            })
            .collect()
    }

    /// Its hosts have sent wrong bytes: others are asked before them for a while.
    pub(super) fn distrust(&self, error: &Error) {
        for host in self.hosts() {
            failover::note(host, error);
        }
    }

    /// Whether one of its hosts was waited for as long as this without progress.
    pub(super) fn is_silent(&self, time: Duration) -> bool {
        self.clients
            .iter()
            .any(|client| client.activity.is_silent(time))
    }

    /// The client of the only host, or of the one that is written to.
    fn client(&self) -> &Arc<Client> {
        &self.clients[0] // there is at least one
    }

    pub(super) async fn root_manifest(&self) -> Result<Manifest> {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => self.manifest(digest).await,
            (None, tag) => self.by_tag(tag.as_deref().unwrap_or("latest")).await,
        }
    }

    async fn by_tag(&self, tag: &str) -> Result<Manifest> {
        let ask = |client: Arc<Client>| async move { manifest::by_tag(&client, tag).await };
        failover::first(&self.clients, Request::Resolve, ask).await
    }

    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let ask = |client: Arc<Client>| async move { manifest::by_digest(&client, digest).await };
        failover::first(&self.clients, Request::Pull, ask).await
    }

    pub(super) async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        if size > limit {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "blob {digest} of {} has {size} bytes, over the limit of {limit}",
                    self.client().name()
                ),
            ));
        }
        let ask = |client: Arc<Client>| async move { blob_at(&client, digest, size).await };
        failover::first(&self.clients, Request::Pull, ask).await
    }

    pub(super) async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let ask = |client: Arc<Client>| {
            let reader = Reader::new(&client, digest, range.clone(), None);
            collect(reader, length)
        };
        failover::first(&self.clients, Request::Pull, ask).await
    }

    pub(super) async fn verified_range(
        &self,
        digest: &Digest,
        range: Range<u64>,
        expected: &Digest,
    ) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let ask = |client: Arc<Client>| {
            let reader = Reader::new(&client, digest, range.clone(), None);
            async move {
                let bytes = collect(reader, length).await?;
                let verified = expected.verify(&bytes);
                verified.map_err(|error| error.context(format!("from {}", client.name())))?;
                Ok(bytes)
            }
        };
        failover::first(&self.clients, Request::Pull, ask).await
    }

    pub(super) fn pieces(
        &self,
        digest: &Digest,
        range: Range<u64>,
        patience: Duration,
    ) -> BoxStream<'static, Result<Bytes>> {
        if let [client] = &self.clients[..] {
            let mut reader = Reader::new(client, digest, range, None);
            reader.set_patience(patience);
            return reader.into_stream();
        }
        failover::pieces(&self.clients, digest, (range.start, range.end), patience)
    }

    pub(super) async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        if let [client] = &self.clients[..] {
            return Ok(stream::open(Arc::clone(client), *digest, size));
        }
        Ok(failover::stream(
            &self.clients,
            digest,
            (0, size),
            Some(size),
        ))
    }

    /// A blob from this offset on, in order, by one request after the other.
    pub(super) fn stream_from(
        &self,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> BoxStream<'static, Result<Bytes>> {
        if let [client] = &self.clients[..] {
            return Reader::new(client, digest, offset..size, Some(size)).into_stream();
        }
        failover::stream(&self.clients, digest, (offset, size), Some(size))
    }

    /// Those of one type, or all. Where no host has the API, as containerd: those that answer tags are asked for the list under a tag.
    pub(super) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>> {
        let has_api = self.hosts().any(|host| host.allows(Request::Referrers));
        let request = match has_api {
            true => Request::Referrers,
            false if self.hosts().any(|host| host.allows(Request::Resolve)) => Request::Resolve,
            false => return Ok(Vec::new()),
        };
        let ask = |client: Arc<Client>| async move {
            match has_api {
                true => referrers::list(&client, subject, artifact_type).await,
                false => referrers::by_tag(&client, subject, artifact_type).await,
            }
        };
        failover::first_list(&self.clients, request, ask).await
    }

    pub(super) async fn tags(&self) -> Result<Vec<String>> {
        let ask = |client: Arc<Client>| async move { tags::list(&client).await };
        failover::first(&self.clients, Request::Resolve, ask).await
    }

    /// The manifest of a tag; `None` if the tag does not exist.
    pub(super) async fn find_tag(&self, tag: &str) -> Result<Option<Manifest>> {
        match self.by_tag(tag).await {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool> {
        upload::has(self.client(), digest).await
    }

    pub(super) async fn copy_blob(
        &self,
        blob: Outgoing<'_>,
        tap: Option<Tap<'_>>,
    ) -> Result<Copied> {
        upload::copy(self.client(), blob, tap).await
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
        manifest::put(self.client(), &name, media_type, bytes).await?;
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
        let is_noted = manifest::put(self.client(), &name, media_type, bytes)
            .await?
            .is_some();
        // asked as readers ask, whatever the answer to the PUT was
        let artifact_type = Some(artifact.artifact_type.as_str());
        match referrers::by_api(self.client(), subject, artifact_type).await? {
            None => referrers::list::add(self.client(), subject, &artifact.entry()).await?,
            Some(list) if is_noted || list.iter().any(|listed| listed.digest == digest) => {}
            Some(_) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "{} has the referrers API, but does not list the referrer that it has just stored: {digest} of {subject}",
                        self.client().name()
                    ),
                ));
            }
        }
        Ok(digest)
    }

    /// Removes a referrer and its entry in the list that replaces the referrers API. The manifest with this digest must refer to the
    /// subject. `false` if neither existed.
    pub(super) async fn delete_referrer(&self, digest: &Digest, subject: &Digest) -> Result<bool> {
        let is_there = match manifest::by_digest(self.client(), digest).await {
            Ok(found) if referring(&found.bytes, subject).is_some() => true,
            Ok(_) => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!(
                        "{digest} of {} does not refer to {subject}; it is not removed",
                        self.client().name()
                    ),
                ));
            }
            Err(error) if error.kind() == Kind::NotFound => false,
            Err(error) => return Err(error),
        };
        // the entry first: everything that is listed must exist
        let was_listed = referrers::list::remove(self.client(), subject, digest).await?;
        let was_there = is_there && manifest::delete(self.client(), digest).await?;
        Ok(was_listed || was_there)
    }
}

/// A small blob, verified.
async fn blob_at(client: &Arc<Client>, digest: &Digest, size: u64) -> Result<Bytes> {
    let mut wrong = None;
    // wrong bytes are mostly a bad copy somewhere on the way: once more, and then it is the registry's
    for _ in 0..2 {
        let bytes = collect(Reader::new(client, digest, 0..size, Some(size)), size).await?;
        let found = Digest::of(&bytes);
        if found == *digest {
            return Ok(bytes);
        }
        client.forget_target(digest);
        wrong = Some(found);
    }
    let found = wrong.map_or_else(String::new, |found| format!(" (they have {found})"));
    Err(Error::new(
        Kind::Corrupt,
        format!(
            "reading blob {digest} of {}: the content did not match the digest twice{found}",
            client.name()
        ),
    ))
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
