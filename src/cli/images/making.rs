//! The options of commands that make SOCI indexes.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::{
    cli::{INDEX, REGISTRY},
    engine::{
        make::options::{
            CreateOptions, DEFAULT_BUILD_TOOL, DEFAULT_COMPACT_SPAN_SIZE, DEFAULT_MIN_LAYER_SIZE,
            DEFAULT_SPAN_SIZE,
        },
        open::platforms::Platforms,
    },
    error::{Error, Kind, Result, ResultExt},
    oci::{Platform, Reference},
    source::{Access, DEFAULT_UPLOADS, GivenCredentials},
};

/// Maximum size of a list of files, in bytes.
const MAX_LIST_BYTES: u64 = 16 << 20;

/// How an index is made.
#[derive(Args, Clone, Debug)]
pub(crate) struct MakeArgs {
    /// Minimum distance between checkpoints
    ///
    /// In uncompressed bytes. Each checkpoint takes 32 KiB in the zTOC.
    #[arg(help_heading = INDEX, long, value_name = "BYTES", default_value_t = DEFAULT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    span_size: u64,
    /// Minimum compressed size of a layer to index
    ///
    /// Smaller layers get no zTOC and are downloaded whole.
    #[arg(help_heading = INDEX, long, value_name = "BYTES", default_value_t = DEFAULT_MIN_LAYER_SIZE, value_parser = clap::value_parser!(u64).range(0..=i64::MAX as u64))]
    min_layer_size: u64,
    /// Tool name to record in zTOCs
    ///
    /// zTOCs of existing indexes are used again; with this option only those of the same tool.
    #[arg(help_heading = INDEX, long, value_name = "NAME", default_value = DEFAULT_BUILD_TOOL)]
    build_tool: String,
    /// Optimization to declare (repeatable)
    #[arg(help_heading = INDEX, long, value_enum, value_name = "NAME")]
    optimizations: Vec<Optimization>,
    /// Make a compact index too: finer spans and a smaller table
    #[arg(help_heading = INDEX, long)]
    compact: bool,
    /// Same as --span-size, for the compact index
    #[arg(help_heading = INDEX, long, value_name = "BYTES", requires = "compact", default_value_t = DEFAULT_COMPACT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    compact_span_size: u64,
    /// Make new zTOCs even if an index has usable ones
    #[arg(help_heading = INDEX, long, short)]
    force: bool,
    /// Path whose spans go into a prefetch artifact (repeatable)
    #[arg(help_heading = INDEX, long, value_name = "PATH")]
    prefetch_file: Vec<String>,
    /// JSON array of paths, each as for --prefetch-file
    #[arg(help_heading = INDEX, long, value_name = "FILE")]
    prefetch_files_json: Option<PathBuf>,
}

/// Credentials for the registry of a destination, as `soci push` takes them.
#[derive(Args)]
pub(super) struct LoginArgs {
    /// User of the destination's registry
    ///
    /// No other credentials are used for this registry. Other users of the host can see the arguments of a program: `docker login` is better.
    #[arg(help_heading = REGISTRY, long, value_name = "USER[:PASSWORD]", hide_short_help = true)]
    user: Option<String>,
    /// Refresh token for the token service of the destination's registry
    #[arg(help_heading = REGISTRY, long, value_name = "TOKEN", hide_short_help = true)]
    refresh: Option<String>,
}

impl LoginArgs {
    /// The access with these credentials, to the registry of this reference.
    pub(super) fn with(&self, access: Access, to: &Reference) -> Access {
        let Reference::Registry { host, .. } = to else {
            return access;
        };
        Access {
            given_credentials: GivenCredentials::new(host, self.user.clone(), self.refresh.clone()),
            ..access
        }
    }
}

/// Some platforms of an image.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlatformsArgs {
    /// Platform, e.g. linux/arm64 (repeatable) [default: the host's]
    #[arg(long, short, value_name = "PLATFORM", conflicts_with = "all_platforms")]
    platform: Vec<Platform>,
    /// Take all platforms of the image
    #[arg(long)]
    all_platforms: bool,
}

/// The number of parallel uploads.
#[derive(Args, Clone, Debug)]
pub(crate) struct UploadArgs {
    /// Maximum number of parallel uploads
    #[arg(help_heading = REGISTRY, long, value_name = "N", default_value_t = DEFAULT_UPLOADS, value_parser = uploads)]
    pub max_concurrent_uploads: usize,
}

fn uploads(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=256).contains(&count) => Ok(count),
        _ => Err("expected a number from 1 to 256".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Optimization {
    /// Mark layers without extended attributes as such
    Xattr,
}

impl PlatformsArgs {
    pub(crate) fn platforms(&self) -> Platforms {
        match (self.all_platforms, &self.platform[..]) {
            (true, _) => Platforms::All,
            (false, []) => Platforms::Host,
            (false, these) => Platforms::These(these.to_vec()),
        }
    }
}

impl MakeArgs {
    pub(crate) fn options(&self) -> Result<CreateOptions> {
        let mut prefetch_files = self.prefetch_file.clone();
        if let Some(file) = &self.prefetch_files_json {
            prefetch_files.extend(list_of(file)?);
        }
        Ok(CreateOptions {
            span_size: self.span_size,
            min_layer_size: self.min_layer_size,
            build_tool: self.build_tool.clone(),
            disable_xattrs: self.optimizations.contains(&Optimization::Xattr),
            compact_span_size: self.compact.then_some(self.compact_span_size),
            force: self.force,
            prefetch_files,
            ..CreateOptions::default()
        })
    }
}

/// Reads a JSON array of paths from a file.
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
                "{}: {size} bytes, over the limit of {MAX_LIST_BYTES}",
                context()
            ),
        ));
    }
    let bytes = std::fs::read(file).or_kind(Kind::InvalidArgument, context)?;
    serde_json::from_slice(&bytes).or_kind(Kind::InvalidArgument, || {
        format!("{}: expected a JSON array of paths", context())
    })
}
