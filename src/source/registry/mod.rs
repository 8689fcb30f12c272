//! A repository of a registry: the client side of the OCI distribution specification 1.1.

use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::BoxStream;

use super::{Access, Manifest, Referrer};
use crate::{error::Result, oci::Digest};

/// One repository, and what was asked of it.
pub(super) struct Repository {}

impl Repository {
    pub(super) fn open(
        host: &str,
        repository: &str,
        tag: Option<&str>,
        digest: Option<Digest>,
        access: &Access,
    ) -> Result<Self> {
        let _ = (host, repository, tag, digest, access);
        unimplemented!("module source")
    }

    pub(super) async fn root_manifest(&self) -> Result<Manifest> {
        unimplemented!("module source")
    }

    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let _ = digest;
        unimplemented!("module source")
    }

    pub(super) async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        let _ = (digest, size, limit);
        unimplemented!("module source")
    }

    pub(super) async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let _ = (digest, range);
        unimplemented!("module source")
    }

    pub(super) async fn stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let _ = (digest, size);
        unimplemented!("module source")
    }

    pub(super) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>> {
        let _ = (subject, artifact_type);
        unimplemented!("module source")
    }
}
