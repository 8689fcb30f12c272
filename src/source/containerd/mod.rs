//! Images and content of a containerd: its services for images, content and leases (version 1), as gRPC on its Unix socket.
//!
//! [`channel`] is the connection, [`read`] reads content, [`write`] and [`session`] write it, [`labels`] keeps it from containerd's garbage collection.
//! containerd has no referrers: the labels of a manifest name those that were stored here, and a label of the image the SOCI index that AWS's
//! tool has made.

use std::{collections::HashMap, path::Path, sync::Arc};

use bytes::Bytes;
use tokio::sync::Mutex;
use tonic::{codegen::http::Uri, metadata::AsciiMetadataValue};

use super::{Limits, Manifest, Referrer};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{
        Digest, Reference, manifest::MAX_MANIFEST_BYTES, reference::name_with_tag,
        referrers::referring,
    },
};

mod channel;
mod labels;
mod proto;
mod read;
mod session;
mod write;

use channel::Channel;
use proto::{
    content::{Info, InfoRequest, content_client::ContentClient},
    images::{GetImageRequest, Image, ListImagesRequest, images_client::ImagesClient},
    leases::leases_client::LeasesClient,
};

/// The socket of containerd where no other is given.
pub(super) const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
/// Maximum size of an answer: containerd's own limit.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Maximum number of referrers of a manifest that are read.
const MAX_REFERRERS: usize = 1024;

/// One namespace of a containerd, and the name of the image that was asked for. Cheap to clone; clones share the connection and the lease.
#[derive(Clone)]
pub(super) struct Containerd {
    channel: Channel,
    namespace: String,
    name: Option<String>,
    limits: Limits,
    /// The lease that keeps what is written until something names it.
    lease: Arc<Mutex<Option<String>>>,
}

impl Containerd {
    /// Connects later.
    pub(super) fn open(
        address: Option<&Path>,
        namespace: &str,
        name: Option<&str>,
        limits: Limits,
    ) -> Self {
        let address = address.unwrap_or(Path::new(DEFAULT_ADDRESS));
        Self {
            channel: Channel::new(address, limits),
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
            limits,
            lease: Arc::default(),
        }
    }

    /// The image's name.
    fn name(&self) -> Result<&str> {
        self.name.as_deref().ok_or_else(|| {
            let text = format!(
                "expected an image: containerd://{}/NAME, with a name of `ctr --namespace {0} image ls`",
                self.namespace
            );
            Error::new(Kind::InvalidArgument, text)
        })
    }

    /// The manifest or index that the image's name leads to. Verified.
    pub(super) async fn root_manifest(&self) -> Result<Manifest> {
        let name = self.name()?;
        let image = match self.image(name).await? {
            Some(image) => Some(image),
            None => match full_name(name) {
                Some(full) => self.image(&full).await?,
                None => None,
            },
        };
        let image = image.ok_or_else(|| {
            let text = format!(
                "containerd at {} has no image {name} in namespace {}: `ctr --namespace {1} image ls` lists the names",
                self.channel.address().display(),
                self.namespace
            );
            Error::new(Kind::NotFound, text)
        })?;
        self.target(image).await
    }

    /// The manifest or index of the image with the same name and another tag, if there is one. Verified.
    pub(super) async fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        match self.image(&name_with_tag(self.name()?, tag)).await? {
            Some(image) => self.target(image).await.map(Some),
            None => Ok(None),
        }
    }

    /// The tags of the images with the same name, sorted.
    pub(super) async fn tags(&self) -> Result<Vec<String>> {
        let prefix = name_with_tag(self.name()?, "");
        let names = self.names().await?;
        let mut tags: Vec<String> = names
            .into_iter()
            .filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned))
            .filter(|tag| !tag.contains('@'))
            .collect();
        tags.sort();
        Ok(tags)
    }

    /// The names of all images of the namespace.
    pub(super) async fn names(&self) -> Result<Vec<String>> {
        let images = self.list(Vec::new()).await?;
        Ok(images.into_iter().map(|image| image.name).collect())
    }

    /// The images that these filters select; all without a filter.
    async fn list(&self, filters: Vec<String>) -> Result<Vec<Image>> {
        let request = self.request(ListImagesRequest { filters }).await?;
        let answer = self.channel.answer(self.images().list(request)).await?;
        Ok(answer.images)
    }

    async fn image(&self, name: &str) -> Result<Option<Image>> {
        let name = name.to_owned();
        let request = self.request(GetImageRequest { name }).await?;
        match self.channel.answer(self.images().get(request)).await {
            Ok(answer) => Ok(answer.image),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn target(&self, image: Image) -> Result<Manifest> {
        let context = || format!("image {} of containerd", image.name);
        let target = image.target.clone().unwrap_or_default();
        let digest: Digest = target.digest.parse().or_kind(Kind::Corrupt, context)?;
        let bytes = self.whole(&digest, None, MAX_MANIFEST_BYTES).await;
        let bytes = bytes.map_err(|error| error.context(context()))?;
        Ok(Manifest::of(digest, &target.media_type, bytes))
    }

    /// A manifest by digest, verified.
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let bytes = self.whole(digest, None, MAX_MANIFEST_BYTES).await?;
        Ok(Manifest::of(*digest, "", bytes))
    }

    /// A whole small blob (at most `limit` bytes), verified against digest and size.
    pub(super) async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        self.whole(digest, Some(size), limit).await
    }

    /// A whole blob, verified.
    async fn whole(&self, digest: &Digest, size: Option<u64>, limit: u64) -> Result<Bytes> {
        let found = self.size(digest, size).await?;
        if found > limit {
            let text = format!("blob {digest} has {found} bytes, over the limit of {limit}");
            return Err(Error::new(Kind::Unsupported, text));
        }
        let bytes = self.range(digest, 0..found).await?;
        digest.verify(&bytes)?;
        Ok(bytes)
    }

    /// The size of a blob, which must be this one, if it is known.
    async fn size(&self, digest: &Digest, expected: Option<u64>) -> Result<u64> {
        let info = self
            .info(digest)
            .await?
            .ok_or_else(|| self.missing(digest))?;
        let size = u64::try_from(info.size).unwrap_or(0);
        match expected {
            Some(expected) if expected != size => {
                let text = format!(
                    "blob {digest} of containerd has {size} bytes, but {expected} in its descriptor"
                );
                Err(Error::new(Kind::Corrupt, text))
            }
            _ => Ok(size),
        }
    }

    fn missing(&self, digest: &Digest) -> Error {
        let text = format!(
            "containerd has no content {digest} in namespace {}: it has none of other platforms, and no layers that were pulled lazily or discarded after they were unpacked; use the image in its registry",
            self.namespace
        );
        Error::new(Kind::NotFound, text)
    }

    /// The record of a blob, if there is one.
    async fn info(&self, digest: &Digest) -> Result<Option<Info>> {
        let digest = digest.to_string();
        let request = self.request(InfoRequest { digest }).await?;
        match self.channel.answer(self.content().info(request)).await {
            Ok(answer) => Ok(answer.info),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The referrers of a manifest that its labels name, and the SOCI index that a label of the image names, in the order in which they were
    /// stored.
    pub(super) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>> {
        let mut named: Vec<Digest> = Vec::new();
        let mut add = |labels: &HashMap<String, String>| {
            for digest in labels::referrers(labels) {
                if !named.contains(&digest) && named.len() < MAX_REFERRERS {
                    named.push(digest);
                }
            }
        };
        if let Some(info) = self.info(subject).await? {
            add(&info.labels);
        }
        if let Some(name) = &self.name
            && let Some(image) = self.image(name).await?
        {
            add(&image.labels);
        }
        let mut found = Vec::new();
        for digest in named {
            let Some(info) = self.info(&digest).await? else {
                continue; // an index that was removed by itself
            };
            let bytes = self.whole(&digest, None, MAX_MANIFEST_BYTES).await?;
            let Some(referring) = referring(&bytes, subject) else {
                continue;
            };
            if artifact_type.is_some_and(|wanted| wanted != referring.artifact_type) {
                continue;
            }
            let stored = info.updated_at.unwrap_or_default();
            let referrer = Referrer {
                digest,
                size: bytes.len() as u64,
                artifact_type: referring.artifact_type,
                annotations: referring.annotations,
            };
            found.push(((stored.seconds, stored.nanos), referrer));
        }
        found.sort_by_key(|(stored, _)| *stored);
        Ok(found.into_iter().map(|(_, referrer)| referrer).collect())
    }

    /// A request with the headers of the namespace and of the lease.
    async fn request<T>(&self, message: T) -> Result<tonic::Request<T>> {
        self.with_lease(message, self.lease.lock().await.as_deref())
    }

    fn with_lease<T>(&self, message: T, lease: Option<&str>) -> Result<tonic::Request<T>> {
        let mut request = tonic::Request::new(message);
        let value = |text: &str| {
            AsciiMetadataValue::try_from(text)
                .or_kind(Kind::InvalidArgument, || format!("the name {text:?}"))
        };
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", value(&self.namespace)?);
        if let Some(lease) = lease {
            metadata.insert("containerd-lease", value(lease)?);
        }
        Ok(request)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::with_origin(self.channel.clone(), origin())
            .max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::with_origin(self.channel.clone(), origin())
            .max_decoding_message_size(MAX_ANSWER_BYTES)
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::with_origin(self.channel.clone(), origin())
    }
}

/// The host of requests on a Unix socket, which nobody reads.
fn origin() -> Uri {
    Uri::from_static("http://localhost")
}

/// The name with the host, the path and the tag that short names stand for; `None` where it has them.
fn full_name(name: &str) -> Option<String> {
    let full = match name.parse() {
        Ok(reference @ Reference::Registry { .. }) => reference.to_string(),
        _ => return None,
    };
    (full != name).then_some(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_of_images() {
        let full = "docker.io/library/app:1";
        assert_eq!(full_name("app:1").as_deref(), Some(full));
        assert_eq!(full_name(full), None);
        assert_eq!(full_name("Not A Name"), None);
    }
}
