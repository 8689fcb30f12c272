//! What sources and destinations tell.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::oci::Digest;

/// A manifest or index, byte for byte as its source has it, verified against its digest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
}

/// How a blob came to its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Copied {
    /// It was there.
    Present,
    /// The registry took it from another of its repositories.
    Mounted,
    /// Its bytes were sent.
    Uploaded,
}

/// The result of a referrers query.
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
