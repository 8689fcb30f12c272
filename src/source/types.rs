//! What sources and destinations tell.

use std::collections::BTreeMap;

use bytes::Bytes;

use serde::Deserialize;

use crate::oci::{
    Digest,
    artifact::{What, what_is},
    media_type::{OCI_INDEX, OCI_MANIFEST},
};

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

impl Manifest {
    /// These bytes, which have this digest. `media_type` is that of the descriptor; without one, the document's own, else its structure
    /// decides.
    pub(super) fn of(digest: Digest, media_type: &str, bytes: Bytes) -> Self {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: String,
        }
        let media_type = if !media_type.is_empty() {
            media_type.to_owned()
        } else if let Ok(typed) = serde_json::from_slice::<Typed>(&bytes) {
            typed.media_type
        } else if what_is(&bytes, "") == What::ImageIndex {
            OCI_INDEX.to_owned()
        } else {
            OCI_MANIFEST.to_owned()
        };
        Self {
            media_type,
            digest,
            bytes,
        }
    }
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
