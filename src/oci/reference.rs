//! What a person writes for an image: `nginx:1.27`, `registry/repo@sha256:...`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`.

use std::{fmt, path::PathBuf, str::FromStr};

use super::Digest;
use crate::error::Error;

/// An image reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Reference {
    /// A repository of a registry.
    Registry {
        /// Host and optional port, e.g. `docker.io`, `127.0.0.1:5000`.
        host: String,
        /// e.g. `library/nginx`.
        repository: String,
        /// e.g. `1.27`; `latest` when neither tag nor digest was given.
        tag: Option<String>,
        /// The manifest's digest; counts where both are given.
        digest: Option<Digest>,
    },
    /// An OCI image layout in a folder.
    Layout {
        /// The folder, absolute.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` in its index; may be left out where there is one image.
        tag: Option<String>,
    },
    /// An OCI image layout in a tar file.
    Archive {
        /// The file, absolute.
        path: PathBuf,
        /// As in [`Reference::Layout`].
        tag: Option<String>,
    },
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(_text: &str) -> Result<Self, Error> {
        unimplemented!("module oci")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        unimplemented!("module oci")
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}
