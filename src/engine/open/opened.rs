//! An image with a disk for each layer, and the events of opening it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{compact_index::CompactIndex, image::Image, soci_index::SociIndex};
use crate::{layer::Disk, oci::Digest};

/// Number of layers that are opened in parallel.
pub const LAYERS_AT_ONCE: usize = 16;

/// An image with a disk for each layer.
pub struct OpenedImage {
    /// The image.
    pub image: Image,
    /// The SOCI index in use.
    pub index: Option<SociIndex>,
    /// The compact index in use; preferred to the SOCI index.
    pub compact: Option<CompactIndex>,
    /// Layers, topmost first. A repeated layer appears once.
    pub layers: Vec<OpenedLayer>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// A layer with its disk.
pub struct OpenedLayer {
    /// The disk.
    pub disk: Arc<Disk>,
    /// How the disk was made.
    pub basis: DiskBasis,
}

/// Called with each event.
pub type OnOpenEvent<'a> = &'a (dyn Fn(OpenEvent) + Send + Sync);

/// How a layer's disk was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "from", rename_all = "lowercase")]
pub enum DiskBasis {
    /// From the layer's table in the compact index. Data is fetched on demand, in small spans.
    Compact,
    /// From the layer's zTOC in the SOCI index. Data is fetched on demand.
    Ztoc,
    /// The disk existed, and the whole layer had been verified against its digest.
    Verified,
    /// The layer was downloaded whole and verified.
    Whole {
        /// Why the layer is not lazy.
        why: String,
    },
}

/// An event of opening an image.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum OpenEvent {
    /// The image was resolved.
    Resolved {
        /// Number of layers.
        layers: usize,
        /// Number of layers with a table in an index.
        indexed: usize,
    },
    /// A part of a layer without a table has been streamed.
    Streaming {
        /// The layer.
        layer: Digest,
        /// Bytes of the blob that were read so far.
        done: u64,
        /// Size of the blob in bytes.
        size: u64,
    },
    /// A warning for the user.
    Warning {
        /// The text.
        message: String,
    },
}
