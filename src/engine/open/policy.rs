//! The caller's choice of an index, and how an index was found.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// Which sources of indexes are trusted.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum IndexPolicy {
    /// The index that the image names (version 2, bound to the image's digest), the index of `--index`, and those of the state directory.
    V2,
    /// As `v2`, and the referrers in the image's repository (version 1), which every user who can push there can add.
    #[default]
    Any,
    /// None: each layer is downloaded whole and verified against the image.
    None,
}

/// The caller's choice of an index.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct IndexChoice {
    /// Digest of the only index to use; any failure is then an error.
    pub digest: Option<Digest>,
    /// The trusted sources if no digest is given.
    #[serde(default)]
    pub policy: IndexPolicy,
    /// Whether to fail if there is no index, or if its table for a layer is unusable.
    #[serde(default)]
    pub is_required: bool,
}

/// How an index was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexOrigin {
    /// By the digest that the caller has given.
    Given,
    /// By an annotation of the image manifest.
    Annotation,
    /// Among the referrers of the image manifest.
    Referrer,
    /// In the state directory.
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
