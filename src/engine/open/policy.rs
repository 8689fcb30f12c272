//! The choice of an index by the caller, and how an index was found.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// Whose word about an image's layers counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum IndexPolicy {
    /// The image's own (version 2, bound to the image's digest), the caller's (`--index`), and this host's operator's (the local root).
    V2,
    /// As `v2`, and that of whoever may push to the image's repository (version 1).
    #[default]
    Any,
    /// Nobody's: each layer is downloaded whole, and checked against the image.
    None,
}

/// Which index a caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexChoice {
    /// This one and no other, by its digest: then any failure is an error.
    pub digest: Option<Digest>,
    /// Whose counts where none is named.
    #[serde(default)]
    pub policy: IndexPolicy,
    /// Whether to fail rather than go on without one, or with one that cannot be read for a layer.
    #[serde(default)]
    pub is_required: bool,
}

/// How an index was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexOrigin {
    /// Named by the caller.
    Given,
    /// By the annotation of the image manifest.
    Annotation,
    /// Among the referrers of the image manifest.
    Referrer,
    /// In the local root.
    Local,
}

impl fmt::Display for IndexOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "given",
            Self::Annotation => "annotation",
            Self::Referrer => "referrer",
            Self::Local => "local",
        })
    }
}
