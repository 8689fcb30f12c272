//! Flags of commands that make SOCI indexes.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::{
    engine::make::{
        convert::Platforms,
        create::{
            CreateOptions, DEFAULT_COMPACT_SPAN_SIZE, DEFAULT_MIN_LAYER_SIZE, DEFAULT_SPAN_SIZE,
        },
    },
    error::{Error, Kind, Result, ResultExt},
    oci::Platform,
    source::DEFAULT_UPLOADS,
};

/// Bytes of the largest list of files that is read.
const MAX_LIST_BYTES: u64 = 16 << 20;

/// How an index is made.
#[derive(Args, Clone, Debug)]
pub(super) struct MakeArgs {
    #[command(flatten)]
    pub platforms: PlatformsArgs,
    /// Bytes of a layer between checkpoints, at least
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    span_size: u64,
    /// Skip layers whose blob has fewer bytes
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MIN_LAYER_SIZE, value_parser = clap::value_parser!(u64).range(0..=i64::MAX as u64))]
    min_layer_size: u64,
    /// Say of layers without xattrs that they have none; may be repeated
    #[arg(long, value_enum, value_name = "WHAT")]
    optimizations: Vec<Optimization>,
    /// Make a compact index too: finer spans, and little to fetch before the first read
    #[arg(long)]
    compact: bool,
    /// Bytes of a layer between checkpoints of the compact index, at least
    #[arg(long, value_name = "BYTES", requires = "compact", default_value_t = DEFAULT_COMPACT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    compact_span_size: u64,
    /// Make each zTOC anew, also where an index has one of the same layer and span size
    #[arg(long, short)]
    force: bool,
    /// List this file's spans in a prefetch artifact; may be repeated
    #[arg(long, value_name = "FILE")]
    prefetch_file: Vec<String>,
    /// As --prefetch-file, for all files of this JSON list of paths
    #[arg(long, value_name = "FILE")]
    prefetch_files_json: Option<PathBuf>,
}

/// Which images of a multi-platform image are meant.
#[derive(Args, Clone, Debug)]
pub(super) struct PlatformsArgs {
    /// Platform of a multi-platform image, e.g. linux/arm64; may be repeated [default: this machine's]
    #[arg(
        long,
        short,
        value_name = "OS/ARCH[/VARIANT]",
        conflicts_with = "all_platforms"
    )]
    platform: Vec<Platform>,
    /// All platforms that the image has
    #[arg(long)]
    all_platforms: bool,
}

/// How many uploads there are at a time.
#[derive(Args, Clone, Debug)]
pub(super) struct UploadArgs {
    /// Blobs that are sent at a time
    #[arg(long, value_name = "N", default_value_t = DEFAULT_UPLOADS, value_parser = uploads)]
    pub max_concurrent_uploads: usize,
}

fn uploads(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=256).contains(&count) => Ok(count),
        _ => Err("a number from 1 to 256 is expected".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Optimization {
    /// Readers need not look for xattrs where there are none.
    Xattr,
}

impl PlatformsArgs {
    pub(super) fn platforms(&self) -> Platforms {
        match (self.all_platforms, &self.platform[..]) {
            (true, _) => Platforms::All,
            (false, []) => Platforms::Host,
            (false, these) => Platforms::These(these.to_vec()),
        }
    }
}

impl MakeArgs {
    pub(super) fn options(&self) -> Result<CreateOptions> {
        let mut prefetch_files = self.prefetch_file.clone();
        if let Some(file) = &self.prefetch_files_json {
            prefetch_files.extend(list_of(file)?);
        }
        Ok(CreateOptions {
            span_size: self.span_size,
            min_layer_size: self.min_layer_size,
            disable_xattrs: self.optimizations.contains(&Optimization::Xattr),
            compact_span_size: self.compact.then_some(self.compact_span_size),
            force: self.force,
            prefetch_files,
            ..CreateOptions::default()
        })
    }
}

/// A JSON list of paths.
fn list_of(file: &Path) -> Result<Vec<String>> {
    let context = || format!("the list of files {}", file.display());
    let size = file
        .metadata()
        .or_kind(Kind::InvalidArgument, context)?
        .len();
    if size > MAX_LIST_BYTES {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{}: {size} bytes, where at most {MAX_LIST_BYTES} are read",
                context()
            ),
        ));
    }
    let bytes = std::fs::read(file).or_kind(Kind::InvalidArgument, context)?;
    serde_json::from_slice(&bytes).or_kind(Kind::InvalidArgument, || {
        format!("{}: a JSON list of paths is expected", context())
    })
}
