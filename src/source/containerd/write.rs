//! Writing of content and images.
//!
//! Blobs are written with a lease, which keeps them until an image or other content names them. A write that broke off is resumed at the
//! offset that containerd has.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use prost_types::FieldMask;
use tokio::time::sleep;

use super::{
    Containerd,
    channel::{Waits, number},
    labels,
    proto::{
        content::{AbortRequest, Info, UpdateRequest},
        images::{CreateImageRequest, Image, UpdateImageRequest},
        leases::{AddResourceRequest, CreateRequest, DeleteRequest, Resource},
        types::Descriptor,
    },
    session::{Listener, Session, ingest},
};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, reference::name_with_tag, referrers::referring},
    source::{
        Copied,
        layout::NewArtifact,
        registry::{Outgoing, Tap, rest_of},
    },
    tar::Timestamp,
    ztoc::rfc3339,
};

/// The life of a lease that its writer did not end, as of containerd's own client.
const LEASE_SECONDS: u64 = 24 * 60 * 60;

/// The number of leases of this process.
static LEASES: AtomicU64 = AtomicU64::new(0);

impl Containerd {
    /// Whether a blob is there. It is kept by the lease from now on.
    pub(in crate::source) async fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool> {
        let Some(info) = self.info(digest).await? else {
            return Ok(false);
        };
        if u64::try_from(info.size) != Ok(size) {
            return Ok(false);
        }
        let lease = self.lease().await?;
        let request = AddResourceRequest {
            id: lease,
            resource: Some(Resource {
                id: digest.to_string(),
                r#type: "content".to_owned(),
            }),
        };
        let request = self.request(request).await?;
        let mut leases = self.leases();
        match self.channel.answer(leases.add_resource(request)).await {
            Ok(()) => Ok(true),
            Err(error) if is_there(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Writes a blob, unless it is there. `tap` is called where bytes are written, and its result receives them.
    pub(in crate::source) async fn copy_blob(
        &self,
        blob: Outgoing<'_>,
        tap: Option<Tap<'_>>,
    ) -> Result<Copied> {
        self.write(blob, &HashMap::new(), tap).await
    }

    async fn write(
        &self,
        blob: Outgoing<'_>,
        labels: &HashMap<String, String>,
        mut tap: Option<Tap<'_>>,
    ) -> Result<Copied> {
        self.lease().await?;
        let (mut waits, mut since) = (Waits::default(), Instant::now());
        let mut listener = Listener::default();
        loop {
            let before = listener.seen;
            let error = match self.attempt(blob, labels, &mut tap, &mut listener).await {
                Ok(copied) => return Ok(copied),
                Err(error) => error,
            };
            if listener.seen > before {
                (waits, since) = (Waits::default(), Instant::now());
            }
            if error.kind() != Kind::Unavailable || since.elapsed() > self.limits.data_patience {
                let text = format!("writing blob {} to containerd", blob.digest);
                return Err(error.context(text));
            }
            sleep(waits.next()).await;
        }
    }

    async fn attempt(
        &self,
        blob: Outgoing<'_>,
        labels: &HashMap<String, String>,
        tap: &mut Option<Tap<'_>>,
        listener: &mut Listener,
    ) -> Result<Copied> {
        let mut session = match Session::begin(self, blob).await {
            Ok(session) => session,
            Err(error) if is_there(&error) => return Ok(Copied::Present),
            Err(error) => return Err(error),
        };
        if let Some(tap) = tap.take() {
            listener.sender = Some(tap());
        }
        // a receiver gets all bytes: what an earlier process has written is written again
        let unseen = listener.sender.is_some() && session.offset > listener.seen;
        if unseen || session.offset > blob.size {
            session.offset = 0;
        }
        let resumed = session.offset > 0;
        match session.send(blob, labels, listener).await {
            Ok(()) => Ok(Copied::Uploaded),
            // another writer was faster
            Err(error) if is_there(&error) && listener.seen < blob.size => Ok(Copied::Present),
            Err(error) if is_there(&error) => Ok(Copied::Uploaded),
            Err(error) if error.kind() == Kind::Corrupt => {
                drop(session);
                let reference = ingest(blob.digest);
                let request = self.request(AbortRequest { r#ref: reference }).await?;
                let aborted = self.channel.answer(self.content().abort(request)).await;
                match (resumed, aborted) {
                    (true, Ok(())) => {
                        let text = "its first part was of other content; it is written again";
                        Err(Error::with_source(Kind::Unavailable, text, error))
                    }
                    _ => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Writes a manifest whose content exists, with the labels that keep that content.
    pub(in crate::source) async fn put_manifest(
        &self,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let labels = labels::of_manifest(bytes, media_type);
        let feed = |offset: u64| -> BoxFuture<'_, _> { rest_of(bytes, offset) };
        let blob = Outgoing {
            digest: &digest,
            size: bytes.len() as u64,
            mount: None,
            feed: &feed,
        };
        if self.write(blob, &labels, None).await? == Copied::Present {
            self.set_labels(&digest, labels).await?;
        }
        Ok(digest)
    }

    /// Adds labels to content; an empty value removes a label.
    async fn set_labels(&self, digest: &Digest, labels: HashMap<String, String>) -> Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let request = UpdateRequest {
            info: Some(Info {
                digest: digest.to_string(),
                labels,
                ..Info::default()
            }),
            update_mask: Some(FieldMask { paths }),
        };
        let request = self.request(request).await?;
        let updated = self.channel.answer(self.content().update(request)).await;
        updated.map(drop).map_err(|error| match error.kind() {
            Kind::NotFound => self.missing(digest),
            _ => error,
        })
    }

    /// Writes a manifest whose content exists, and makes or changes the image with this name, or with this tag in its place.
    pub(in crate::source) async fn tag(
        &self,
        media_type: &str,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Digest> {
        let name = self.name()?;
        let name = tag.map_or_else(|| name.to_owned(), |tag| name_with_tag(name, tag));
        let digest = self.put_manifest(media_type, bytes).await?;
        let image = Image {
            name,
            target: Some(Descriptor {
                media_type: media_type.to_owned(),
                digest: digest.to_string(),
                size: number(bytes.len() as u64)?,
                ..Descriptor::default()
            }),
            ..Image::default()
        };
        let request = CreateImageRequest {
            image: Some(image.clone()),
            ..CreateImageRequest::default()
        };
        let request = self.request(request).await?;
        let created = self.channel.answer(self.images().create(request)).await;
        match created {
            Err(error) if is_there(&error) => self.update_image(image, "target").await?,
            other => other.map(drop)?,
        }
        Ok(digest)
    }

    async fn update_image(&self, image: Image, field: &str) -> Result<()> {
        let request = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(FieldMask {
                paths: vec![field.to_owned()],
            }),
            ..UpdateImageRequest::default()
        };
        let request = self.request(request).await?;
        let updated = self.channel.answer(self.images().update(request)).await;
        updated.map(drop)
    }

    /// Writes the manifest of an artifact whose blobs exist, and lists it among the referrers of its subject, which must exist. The newest SOCI
    /// index of an image has the label that AWS's tool gives it.
    pub(in crate::source) async fn put_referrer(
        &self,
        artifact: &NewArtifact,
        subject: &Digest,
    ) -> Result<Digest> {
        let digest = self
            .put_manifest(&artifact.media_type, &artifact.manifest)
            .await?;
        // written also where it has them: the time of the change makes it the newest one
        let labels = labels::of_manifest(&artifact.manifest, &artifact.media_type);
        self.set_labels(&digest, labels).await?;
        let label = (labels::of_referrer(&digest), digest.to_string());
        self.set_labels(subject, HashMap::from([label])).await?;
        if artifact.artifact_type == crate::soci::index::V1_TYPE
            && let Some(name) = &self.name
        {
            self.label_image(name, &digest.to_string()).await?;
        }
        Ok(digest)
    }

    /// Sets the label of an image with its SOCI index. An image that does not exist (yet) has none.
    async fn label_image(&self, name: &str, value: &str) -> Result<()> {
        let image = Image {
            name: name.to_owned(),
            labels: HashMap::from([(labels::SOCI_INDEX.to_owned(), value.to_owned())]),
            // containerd 2.4 dies of an image without a target, also where only labels are changed
            target: Some(Descriptor::default()),
            ..Image::default()
        };
        let field = format!("labels.{}", labels::SOCI_INDEX);
        match self.update_image(image, &field).await {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Takes a referrer from the labels of its subject and of images; containerd's garbage collection removes it. A manifest that does not
    /// refer to the subject is an error. `false` if it is not listed.
    pub(in crate::source) async fn delete_referrer(
        &self,
        digest: &Digest,
        subject: &Digest,
    ) -> Result<bool> {
        if self.info(digest).await?.is_some() {
            let found = self.manifest(digest).await?;
            if referring(&found.bytes, subject).is_none() {
                let text = format!("{digest} does not refer to {subject}; it is not removed");
                return Err(Error::new(Kind::InvalidArgument, text));
            }
        }
        let label = labels::of_referrer(digest);
        let info = self.info(subject).await?.unwrap_or_default();
        let mut was_listed = info.labels.contains_key(&label);
        if was_listed {
            let label = HashMap::from([(label, String::new())]);
            self.set_labels(subject, label).await?;
        }
        let filter = format!("labels.\"{}\"==\"{digest}\"", labels::SOCI_INDEX);
        for image in self.list(vec![filter]).await? {
            self.label_image(&image.name, "").await?;
            was_listed = true;
        }
        Ok(was_listed)
    }

    /// The lease for what is written, made by the first write.
    async fn lease(&self) -> Result<String> {
        // other first writes wait for it
        let mut lease = self.lease.lock().await;
        if let Some(lease) = &*lease {
            return Ok(lease.clone());
        }
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let end = now.as_secs().saturating_add(LEASE_SECONDS);
        let end = rfc3339(Timestamp {
            seconds: i64::try_from(end).unwrap_or(i64::MAX),
            nanoseconds: 0,
        });
        let number = LEASES.fetch_add(1, Ordering::Relaxed);
        let id = format!("socinbd-{}-{}-{number}", now.as_nanos(), std::process::id());
        let request = CreateRequest {
            id: id.clone(),
            labels: HashMap::from([(labels::EXPIRE.to_owned(), end)]),
        };
        let request = self.with_lease(request, None)?;
        self.channel.answer(self.leases().create(request)).await?;
        *lease = Some(id.clone());
        Ok(id)
    }

    /// All is written and named: ends the lease. A lease that cannot be ended now ends by itself.
    pub(in crate::source) async fn finish(&self) {
        let Some(id) = self.lease.lock().await.take() else {
            return;
        };
        let ended = async {
            let request = self.request(DeleteRequest { id, sync: false }).await?;
            self.channel.answer(self.leases().delete(request)).await
        };
        if let Err(error) = ended.await {
            tracing::warn!("a lease of containerd was not ended: {}", error.report());
        }
    }
}

/// Whether the error is that the content, image or lease exists already.
fn is_there(error: &Error) -> bool {
    error.kind() == Kind::Immutable
}
