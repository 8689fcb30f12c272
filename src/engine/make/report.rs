//! Reports of created indexes and converted images.

use std::fmt;

use serde::Serialize;

use super::options::DEFAULT_MIN_LAYER_SIZE;
use crate::{
    engine::transfer::{manifests::BlobCounts, referrers::Companion},
    error::{Error, Kind},
    oci::Digest,
};

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct CreateReport {
    /// The index.
    pub index: Digest,
    /// The compact index, if one was made too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_index: Option<Digest>,
    /// The manifest of the image that it belongs to.
    pub image: Digest,
    /// The image's platform.
    pub platform: String,
    /// Where it was stored.
    pub stored_in: String,
    /// The image's layers, the lowest first.
    pub layers: Vec<LayerReport>,
    /// What the person should know: files to prefetch that are nowhere.
    pub warnings: Vec<String>,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: Digest,
    /// Its media type.
    pub media_type: String,
    /// Bytes of its blob.
    pub size: u64,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: LayerOutcome,
    /// What the compact index has of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact: Option<CompactTableReport>,
}

/// What a compact index has of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct CompactTableReport {
    /// The table.
    pub table: Digest,
    /// Bytes of the table: what is fetched before the first read.
    pub table_size: u64,
    /// Bytes of the table and of all windows.
    pub blob_size: u64,
    /// Spans.
    pub spans: usize,
    /// An index had it already.
    pub reused: bool,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum LayerOutcome {
    /// It has a zTOC now.
    Indexed {
        /// The zTOC.
        ztoc: Digest,
        /// Its bytes.
        ztoc_size: u64,
        /// An index had it already.
        reused: bool,
    },
    /// It has none: it will be streamed whole.
    Skipped {
        /// Why.
        skipped: String,
    },
}

impl fmt::Display for LayerReport {
    /// As AWS's tool says it.
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

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// What was converted.
    pub source: String,
    /// The digest that the source's reference names.
    pub source_digest: Digest,
    /// Where it went.
    pub destination: String,
    /// The image index there.
    pub digest: Digest,
    /// The images that got a SOCI index.
    pub images: Vec<ConvertedImage>,
    /// How the blobs went.
    pub blobs: BlobCounts,
    /// Signatures and attestations of the source.
    pub vouchers: Vec<Voucher>,
    /// What the person should know.
    pub warnings: Vec<String>,
}

/// An image that was converted.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertedImage {
    /// Its platform.
    pub platform: String,
    /// The digest of its manifest before.
    pub old: Digest,
    /// The digest of its manifest now.
    pub manifest: Digest,
    /// Its SOCI index.
    pub index: Digest,
    /// Its compact index, if one was made too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_index: Option<Digest>,
    /// Its layers.
    pub layers: Vec<LayerReport>,
}

/// A signature or attestation of the source, and what it is worth for what was made of it.
#[derive(Clone, Debug, Serialize)]
pub struct Voucher {
    /// What vouches.
    #[serde(flatten)]
    pub companion: Companion,
    /// Whether its subject is part of the new image, byte for byte.
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
            let Companion {
                what,
                digest,
                subject,
                ..
            } = &voucher.companion;
            let covers = match voucher.covers {
                true => "still covers its part of the new image",
                false => "does not cover the new image: sign that anew",
            };
            writeln!(f, "{what} ({digest}) of {subject} {covers}")?;
        }
        writeln!(f, "{}", self.blobs)?;
        write!(f, "{} is {}", self.destination, self.digest)
    }
}

/// The error where no layer has a zTOC.
pub(super) fn nothing_made(layers: &[LayerReport]) -> Error {
    let mut text = "no zTOC was made: every layer was skipped".to_owned();
    for layer in layers {
        text.push_str(&format!("\n  {layer}"));
    }
    if layers
        .iter()
        .any(|layer| layer.size < DEFAULT_MIN_LAYER_SIZE)
    {
        text.push_str("\n  --min-layer-size sets from which size on a layer is indexed");
    }
    Error::new(Kind::Unsupported, text)
}
