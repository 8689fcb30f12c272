//! Copies manifests with all that they lead to, unchanged.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture};
use serde::Serialize;
use serde_json::Value;

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::Digest,
    source::{Copied, Destination, Manifest, Source},
};

/// Indexes in indexes, at most.
const MAX_DEPTH: usize = 8;
/// Manifests of one copy, at most.
const MAX_MANIFESTS: usize = 4096;

/// How the blobs of a copy came to their destination.
#[derive(Debug, Default)]
pub(super) struct Tally {
    present: AtomicU64,
    mounted: AtomicU64,
    uploaded: AtomicU64,
    uploaded_bytes: AtomicU64,
}

/// The counts of a [`Tally`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Blobs that were there.
    pub present: u64,
    /// Blobs that the registry took from another repository of its own.
    pub mounted: u64,
    /// Blobs that were sent.
    pub uploaded: u64,
    /// Their bytes.
    pub uploaded_bytes: u64,
}

impl Tally {
    /// Counts a blob.
    pub(super) fn count(&self, copied: Copied, size: u64) {
        match copied {
            Copied::Present => &self.present,
            Copied::Mounted => &self.mounted,
            Copied::Uploaded => {
                self.uploaded_bytes.fetch_add(size, Ordering::Relaxed);
                &self.uploaded
            }
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub(super) fn counts(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            present: of(&self.present),
            mounted: of(&self.mounted),
            uploaded: of(&self.uploaded),
            uploaded_bytes: of(&self.uploaded_bytes),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            present,
            mounted,
            uploaded,
            uploaded_bytes,
        } = self;
        write!(
            f,
            "blobs: {present} were there, {mounted} mounted, {uploaded} sent ({uploaded_bytes} bytes)"
        )
    }
}

/// A copy of some manifests of a source.
pub(super) struct Graph<'a> {
    pub(super) source: &'a Source,
    pub(super) destination: &'a Destination,
    /// Blobs at a time.
    pub(super) uploads: usize,
    pub(super) tally: &'a Tally,
    done: Mutex<HashSet<Digest>>,
}

impl<'a> Graph<'a> {
    pub(super) fn new(
        source: &'a Source,
        destination: &'a Destination,
        uploads: usize,
        tally: &'a Tally,
    ) -> Self {
        Self {
            source,
            destination,
            uploads: uploads.max(1),
            tally,
            done: Mutex::default(),
        }
    }

    /// Copies what a manifest leads to, and then the manifest.
    pub(super) async fn copy(&self, manifest: &Manifest) -> Result<()> {
        self.children(manifest, 0).await?;
        self.destination
            .put_manifest(&manifest.media_type, &manifest.bytes)
            .await?;
        Ok(())
    }

    /// Copies the blobs that a manifest names, and not the manifest.
    pub(super) async fn copy_blobs(&self, manifest: &Manifest) -> Result<()> {
        let digest = manifest.digest;
        let document: Value = serde_json::from_slice(&manifest.bytes)
            .or_kind(Kind::Corrupt, || format!("manifest {digest}"))?;
        self.blobs(&document)
            .await
            .map_err(|error| error.context(format!("manifest {digest}")))
    }

    fn children<'b>(&'b self, manifest: &'b Manifest, depth: usize) -> BoxFuture<'b, Result<()>> {
        Box::pin(async move {
            let digest = manifest.digest;
            let document: Value = serde_json::from_slice(&manifest.bytes)
                .or_kind(Kind::Corrupt, || format!("manifest {digest}"))?;
            self.blobs(&document)
                .await
                .map_err(|error| error.context(format!("manifest {digest}")))?;
            if depth == MAX_DEPTH {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("manifest {digest}: more than {MAX_DEPTH} indexes in each other"),
                ));
            }
            for entry in list(&document, "manifests") {
                let (digest, _) = blob_of(entry)?;
                if !self.is_new(&digest)? {
                    continue;
                }
                let child = self.source.manifest(&digest).await?;
                self.children(&child, depth + 1).await?;
                self.destination
                    .put_manifest(&child.media_type, &child.bytes)
                    .await?;
            }
            Ok(())
        })
    }

    /// Copies the blobs that a manifest names.
    async fn blobs(&self, document: &Value) -> Result<()> {
        let config = document.get("config").filter(|config| config.is_object());
        let named = config
            .into_iter()
            .chain(list(document, "layers"))
            .chain(list(document, "blobs")); // of OCI artifact manifests
        let mut seen = HashSet::new();
        let mut blobs = Vec::new();
        for descriptor in named {
            let (digest, size) = blob_of(descriptor)?;
            let elsewhere = !list(descriptor, "urls").is_empty();
            if seen.insert(digest) {
                blobs.push((digest, size, elsewhere));
            }
        }
        futures_util::stream::iter(blobs)
            .map(|(digest, size, elsewhere)| self.blob(digest, size, elsewhere))
            .buffer_unordered(self.uploads)
            .try_for_each(|()| async { Ok(()) })
            .await
    }

    async fn blob(&self, digest: Digest, size: u64, elsewhere: bool) -> Result<()> {
        let copied = self
            .destination
            .copy_blob(self.source, &digest, size, None)
            .await;
        match copied {
            Ok(copied) => self.tally.count(copied, size),
            // a layer that registries do not keep: its descriptor says where it is
            Err(error) if elsewhere && error.kind() == Kind::NotFound => {
                tracing::info!(blob = %digest, "not at its source, and left where its URLs say");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn is_new(&self, digest: &Digest) -> Result<bool> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if done.len() == MAX_MANIFESTS {
            return Err(Error::new(
                Kind::Unsupported,
                format!("more than {MAX_MANIFESTS} manifests"),
            ));
        }
        Ok(done.insert(*digest))
    }
}

fn list<'a>(document: &'a Value, key: &str) -> &'a [Value] {
    document
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn blob_of(descriptor: &Value) -> Result<(Digest, u64)> {
    let text = descriptor["digest"].as_str().unwrap_or_default();
    let size = descriptor["size"].as_u64().ok_or_else(|| {
        Error::new(
            Kind::Corrupt,
            format!("the descriptor of {text:?} has no size"),
        )
    })?;
    Ok((text.parse()?, size))
}
