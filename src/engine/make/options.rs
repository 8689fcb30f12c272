//! Options for making indexes and for converting images.

pub use crate::{
    compact::DEFAULT_SPAN_SIZE as DEFAULT_COMPACT_SPAN_SIZE,
    soci::index::{DEFAULT_BUILD_TOOL, DEFAULT_MIN_LAYER_SIZE, DEFAULT_SPAN_SIZE},
};

use crate::{
    engine::open::platforms::Platforms, layer::Touch, oci::Digest, source::DEFAULT_UPLOADS,
};

/// Options for making an index.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Minimum distance between checkpoints, in uncompressed bytes.
    pub span_size: u64,
    /// Minimum size in bytes of a layer's blob; smaller layers get no zTOC.
    pub min_layer_size: u64,
    /// Name of the build tool that the index states.
    pub build_tool: String,
    /// Minimum distance between checkpoints of the compact index; `None`: no compact index is made.
    pub compact_span_size: Option<u64>,
    /// Whether to mark layers without xattrs as such (`--optimizations xattr`).
    pub disable_xattrs: bool,
    /// Whether to store the index in the state directory, and not beside an image on this host.
    pub in_state_directory: bool,
    /// Whether to make new zTOCs even if existing ones could be reused.
    pub force: bool,
    /// Paths of files whose spans go into a prefetch artifact.
    pub prefetch_files: Vec<String>,
    /// Reads of a recorded start, in order. Their spans go into prefetch artifacts.
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
            in_state_directory: false,
            force: false,
            prefetch_files: Vec::new(),
            uses: Vec::new(),
        }
    }
}

/// Options for converting an image.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Options for its SOCI indexes.
    pub create: CreateOptions,
    /// Platforms whose images get an index.
    pub platforms: Platforms,
    /// Number of parallel uploads.
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

/// Called with the layer, its bytes that were read so far, and its size.
pub type OnLayerProgress<'a> = &'a (dyn Fn(Digest, u64, u64) + Send + Sync);
