//! An image whose layers all have disks, and the events of opening it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{compact_index::CompactIndex, image::Image, soci_index::SociIndex};
use crate::{layer::Disk, oci::Digest};

/// Layers that are opened at a time.
pub const LAYERS_AT_ONCE: usize = 16;

/// An image whose layers all have disks.
pub struct OpenedImage {
    /// The image.
    pub image: Image,
    /// The SOCI index in use.
    pub index: Option<SociIndex>,
    /// The compact index in use, which goes before it.
    pub compact: Option<CompactIndex>,
    /// Its layers, topmost first. Equal ones appear once.
    pub layers: Vec<OpenedLayer>,
    /// What the person should know.
    pub warnings: Vec<String>,
}

/// A layer that has a disk.
pub struct OpenedLayer {
    /// The disk.
    pub disk: Arc<Disk>,
    /// How it came to be.
    pub basis: DiskBasis,
}

/// Who is told what happens.
pub type OnOpenEvent<'a> = &'a (dyn Fn(OpenEvent) + Send + Sync);

/// How a layer's disk came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase")]
pub enum DiskBasis {
    /// Laid out from the table that the compact index has for it; data comes when it is read, in fine spans.
    Compact,
    /// Laid out from the zTOC that the SOCI index has for it; data comes when it is read.
    Ztoc,
    /// It was here, and had been checked in full against the layer's digest.
    Verified,
    /// Downloaded whole, and checked.
    Whole {
        /// Why it is not lazy.
        why: String,
    },
}

/// What happens while an image is being attached.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum OpenEvent {
    /// The image is known: how many layers, how many with a zTOC.
    Resolved {
        /// Layers in all.
        layers: usize,
        /// Layers that a SOCI index has a zTOC for.
        indexed: usize,
    },
    /// A layer without a zTOC is being streamed.
    Streaming {
        /// The layer.
        layer: Digest,
        /// Bytes of the blob so far.
        done: u64,
        /// Bytes of the blob.
        size: u64,
    },
    /// Something that the person should know.
    Warning {
        /// What it is.
        message: String,
    },
}
