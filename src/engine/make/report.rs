//! Reports of created indexes and converted images.

use std::fmt;

use serde::Serialize;

use super::options::DEFAULT_MIN_LAYER_SIZE;
use crate::{
    engine::transfer::{manifests::BlobCounts, referrers::RelatedArtifact},
    error::{Error, Kind},
    oci::Digest,
};

/// The report of a new index.
#[derive(Clone, Debug, Serialize)]
pub struct CreateReport {
    /// Digest of the index.
    pub index: Digest,
    /// Digest of the compact index, if one was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_index: Option<Digest>,
    /// Digest of the image manifest.
    pub image: Digest,
    /// Platform of the image.
    pub platform: String,
    /// Where the index was stored.
    pub stored_in: String,
    /// Layers, lowest first.
    pub layers: Vec<LayerReport>,
    /// Warnings for the user, e.g. prefetch files that do not exist.
    pub warnings: Vec<String>,
}

/// The report of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Digest of the layer.
    pub layer: Digest,
    /// Media type of the layer.
    pub media_type: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Whether it has a zTOC.
    #[serde(flatten)]
    pub outcome: LayerOutcome,
    /// Its part of the compact index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact: Option<CompactTableReport>,
}

/// A layer's part of a compact index.
#[derive(Clone, Debug, Serialize)]
pub struct CompactTableReport {
    /// Digest of the table.
    pub table: Digest,
    /// Size of the table in bytes; it is fetched before the first read.
    pub table_size: u64,
    /// Size of the table and all windows in bytes.
    pub blob_size: u64,
    /// Number of spans.
    pub spans: usize,
    /// Whether it is from an existing index.
    pub reused: bool,
}

/// The outcome of a layer.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum LayerOutcome {
    /// The layer has a zTOC.
    Indexed {
        /// Digest of the zTOC.
        ztoc: Digest,
        /// Size of the zTOC in bytes.
        ztoc_size: u64,
        /// Whether it is from an existing index.
        reused: bool,
    },
    /// The layer has no zTOC, so clients download it whole.
    Skipped {
        /// The reason.
        skipped: String,
    },
}

impl fmt::Display for LayerReport {
    /// The format of AWS's tool.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            LayerOutcome::Indexed { ztoc, reused, .. } => {
                let exists = if *reused { " (already exists)" } else { "" };
                write!(f, "layer {} -> ztoc {ztoc}{exists}", self.layer)?;
            }
            LayerOutcome::Skipped { skipped } => write!(
                f,
                "ztoc skipped - layer {} ({}): {skipped}",
                self.layer, self.media_type
            )?,
        }
        match &self.compact {
            Some(compact) => {
                let exists = if compact.reused {
                    " (already exists)"
                } else {
                    ""
                };
                write!(
                    f,
                    ", compact table of {} bytes ({} spans, {} bytes with their windows){exists}",
                    compact.table_size, compact.spans, compact.blob_size
                )
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for CreateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in &self.layers {
            writeln!(f, "{layer}")?;
        }
        if let Some(compact) = &self.compact_index {
            writeln!(f, "compact index {compact}")?;
        }
        write!(f, "index {} in {}", self.index, self.stored_in)
    }
}

/// The report of a conversion.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// Reference of the source.
    pub source: String,
    /// Digest that the source's reference names.
    pub source_digest: Digest,
    /// Reference of the destination.
    pub destination: String,
    /// Digest of the image index at the destination.
    pub digest: Digest,
    /// Images that got a SOCI index.
    pub images: Vec<ConvertedImage>,
    /// Counts of blobs that were present, mounted and uploaded.
    pub blobs: BlobCounts,
    /// Signatures and attestations of the source.
    pub vouchers: Vec<SignatureCoverage>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// A converted image.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertedImage {
    /// Platform.
    pub platform: String,
    /// Digest of the old manifest.
    pub old: Digest,
    /// Digest of the new manifest.
    pub manifest: Digest,
    /// Digest of the SOCI index.
    pub index: Digest,
    /// Digest of the compact index, if one was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_index: Option<Digest>,
    /// Layers.
    pub layers: Vec<LayerReport>,
}

/// A signature or attestation of the source, and whether it covers a part of the new image.
#[derive(Clone, Debug, Serialize)]
pub struct SignatureCoverage {
    /// The signature or attestation.
    #[serde(flatten)]
    pub companion: RelatedArtifact,
    /// Whether its subject is part of the new image, unchanged.
    pub covers: bool,
}

impl fmt::Display for ConvertReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for image in &self.images {
            for layer in &image.layers {
                writeln!(f, "{layer}")?;
            }
            writeln!(
                f,
                "{} {} -> {}, SOCI index {}",
                image.platform, image.old, image.manifest, image.index
            )?;
            if let Some(compact) = &image.compact_index {
                writeln!(f, "{} compact index {compact}", image.platform)?;
            }
        }
        for voucher in &self.vouchers {
            let RelatedArtifact {
                what,
                digest,
                subject,
                ..
            } = &voucher.companion;
            let covers = match voucher.covers {
                true => "still covers its part of the new image",
                false => "does not cover the new image: sign the new image",
            };
            writeln!(f, "{what} ({digest}) of {subject} {covers}")?;
        }
        writeln!(f, "{}", self.blobs)?;
        write!(f, "{} is {}", self.destination, self.digest)
    }
}

/// The error if no layer has a zTOC.
pub(super) fn nothing_made(layers: &[LayerReport]) -> Error {
    let mut text = "no zTOC was made: every layer was skipped".to_owned();
    for layer in layers {
        text.push_str(&format!("\n  {layer}"));
    }
    if layers
        .iter()
        .any(|layer| layer.size < DEFAULT_MIN_LAYER_SIZE)
    {
        text.push_str("\n  --min-layer-size sets the minimum size of a layer to index");
    }
    Error::new(Kind::Unsupported, text)
}
