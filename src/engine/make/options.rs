//! Options for making indexes and for converting images.

pub use crate::{
    compact::DEFAULT_SPAN_SIZE as DEFAULT_COMPACT_SPAN_SIZE,
    soci::index::{DEFAULT_BUILD_TOOL, DEFAULT_MIN_LAYER_SIZE, DEFAULT_SPAN_SIZE},
};

use crate::{
    engine::open::platforms::Platforms, layer::Touch, oci::Digest, source::DEFAULT_UPLOADS,
};

/// How an index is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of a layer between checkpoints, at least.
    pub span_size: u64,
    /// Layers whose blobs have fewer bytes get no zTOC.
    pub min_layer_size: u64,
    /// What the index says that it was made by.
    pub build_tool: String,
    /// Whether a compact index is made in the same pass, and its bytes of a layer between checkpoints, at least.
    pub compact_span_size: Option<u64>,
    /// Say of layers without any xattr that they have none (`--optimizations xattr`).
    pub disable_xattrs: bool,
    /// Make each zTOC anew, also where there is one of the same layer and span size.
    pub force: bool,
    /// Files whose spans a prefetch artifact lists.
    pub prefetch_files: Vec<String>,
    /// What a recorded start has read, in order: its spans are listed in prefetch artifacts.
    pub uses: Vec<Touch>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            span_size: DEFAULT_SPAN_SIZE,
            min_layer_size: DEFAULT_MIN_LAYER_SIZE,
            build_tool: DEFAULT_BUILD_TOOL.to_owned(),
            compact_span_size: None,
            disable_xattrs: false,
            force: false,
            prefetch_files: Vec::new(),
            uses: Vec::new(),
        }
    }
}

/// How an image is converted.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// How its SOCI indexes are made.
    pub create: CreateOptions,
    /// Which images get one.
    pub platforms: Platforms,
    /// Blobs that are sent at a time.
    pub uploads: usize,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            create: CreateOptions::default(),
            platforms: Platforms::default(),
            uploads: DEFAULT_UPLOADS,
        }
    }
}

/// Told the bytes of a layer that have passed, and all that it has.
pub type OnLayerProgress<'a> = &'a (dyn Fn(Digest, u64, u64) + Send + Sync);
