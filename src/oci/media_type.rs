//! Media types of images, layers and SOCI's artifacts.

/// How a layer's blob is packed, from its media type (and, where that lies or says nothing, from its first bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// gzip, one or several members.
    Gzip,
    /// Zstandard.
    Zstd,
    /// A plain tar.
    Plain,
}
