//! Where blobs come from: a registry (OCI distribution 1.1) or an OCI image layout, in a folder or a tar file.

use std::{collections::BTreeMap, ops::Range, path::PathBuf};

use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::{
    error::Result,
    oci::{Digest, Reference},
};

/// How a source may be reached. Comes with each request, never from the daemon's environment, and is kept with a disk's sources.
/// Holds no secret itself: only where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Access {
    /// Docker's `config.json`; credential helpers are those that it names.
    pub docker_config: Option<PathBuf>,
    /// Plain HTTP also for hosts that are not loopback.
    pub plain_http: bool,
    /// Further CA certificates, PEM files.
    pub ca_certificates: Vec<PathBuf>,
    /// `HTTPS_PROXY` of the person who asked.
    pub https_proxy: Option<String>,
    /// `HTTP_PROXY`.
    pub http_proxy: Option<String>,
    /// `NO_PROXY`.
    pub no_proxy: Option<String>,
}

/// A manifest or index as it stands at its source, verified against its digest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What a referrers query gives.
#[derive(Clone, Debug)]
pub struct Referrer {
    /// The referrer's manifest.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// Its artifact type.
    pub artifact_type: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// One place that has manifests and blobs: a repository of a registry, or a layout. Cheap to clone; connections, tokens and redirect
/// targets are shared by clones.
#[derive(Clone)]
pub struct Source {}

impl Source {
    /// Opens the place that a reference names. Touches no network.
    pub async fn open(reference: &Reference, access: &Access) -> Result<Self> {
        let _ = (reference, access);
        unimplemented!("module source")
    }

    /// The reference that this was opened with.
    pub fn reference(&self) -> &Reference {
        unimplemented!("module source")
    }

    /// What it was opened with.
    pub fn access(&self) -> &Access {
        unimplemented!("module source")
    }

    /// The manifest or index that the reference itself names (its digest, or its tag).
    pub async fn root_manifest(&self) -> Result<Manifest> {
        unimplemented!("module source")
    }

    /// A manifest by digest, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let _ = digest;
        unimplemented!("module source")
    }

    /// A whole small blob (at most `limit` bytes), verified against digest and size.
    pub async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        let _ = (digest, size, limit);
        unimplemented!("module source")
    }

    /// A range of a blob: exactly these bytes. Not verified: the caller has the span's digest. Retries inside.
    pub async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let _ = (digest, range);
        unimplemented!("module source")
    }

    /// A whole blob in order, from several ranged GETs side by side where it is large; resumes after a cut. Not verified: the caller
    /// hashes as it passes. Ends after exactly `size` bytes or with an error.
    pub async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let _ = (digest, size);
        unimplemented!("module source")
    }

    /// The referrers of a manifest with this artifact type: the API with pagination, else the tag fallback; for a layout, from its
    /// index. In the order given.
    pub async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Referrer>> {
        let _ = (subject, artifact_type);
        unimplemented!("module source")
    }
}
