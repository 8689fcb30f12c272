//! `socinbd ztoc`: makes the zTOC of a layer file, and shows and uses zTOCs.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::artifacts::{self, ArtifactArgs};
use crate::{
    blocking::blocking,
    cli::{
        GlobalArgs,
        new_file::{self, NewFile},
        output,
    },
    engine::{
        cat,
        open::artifacts::{ArtifactKind, IndexArtifact},
    },
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, Packing},
    soci::build::{self, BUILD_TOOL, DEFAULT_SPAN_SIZE, Indexed, LayerIndexer, NoSink, Options},
    source::Source,
    tar::EntryKind,
    ztoc::Ztoc,
};

/// Bytes that are read at a time.
const READ_SIZE: usize = 1 << 20;

/// Make, list, show and use zTOCs, the tables of contents of layers
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd ztoc create layer.tar.gz\n\
\x20 socinbd ztoc info layer.tar.gz.ztoc")]
pub(crate) struct ZtocCommand {
    #[command(subcommand)]
    command: ZtocSubcommand,
}

#[derive(Debug, clap::Subcommand)]
enum ZtocSubcommand {
    /// Make the zTOC of a layer file
    ///
    /// The layer is a tar file, plain or gzip (also with several members). The zTOC is byte for byte the one that AWS's `soci` makes with
    /// the same span size and build tool, except where that tool has errors (docs/soci.md). zstd layers and layers with sparse files cannot
    /// have a zTOC.
    #[command(after_help = "Examples:\n\
\x20 socinbd ztoc create layer.tar.gz --span-size 1048576")]
    Create(ZtocCreateCommand),
    /// List the zTOCs of the indexes in the state directory or of an image
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n\
\x20 socinbd ztoc list\n\
\x20 socinbd ztoc list --at registry.example/app:1"
    )]
    List(ZtocListCommand),
    /// Show a zTOC as JSON
    #[command(after_help = "Examples:\n\
\x20 socinbd ztoc info layer.tar.gz.ztoc\n\
\x20 socinbd ztoc info sha256:6a5d... --at registry.example/app:1")]
    Info(ZtocInfoCommand),
    /// Print a file of a layer, found by the zTOC of the layer
    ///
    /// The layer is read from the image given with --at, or from the image that the index was made for.
    #[command(after_help = "Examples:\n\
\x20 socinbd ztoc get-file sha256:6a5d... etc/os-release")]
    GetFile(ZtocGetFileCommand),
}

#[derive(Debug, clap::Args)]
struct ZtocListCommand {
    #[command(flatten)]
    tables: ArtifactArgs,
    /// Digest of the zTOC to list
    #[arg(long, value_name = "DIGEST")]
    ztoc_digest: Option<Digest>,
    /// Image that the indexes were made for
    #[arg(long, value_name = "IMAGE")]
    image_ref: Option<crate::oci::Reference>,
    /// Print digests only
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, clap::Args)]
struct ZtocInfoCommand {
    /// Digest or file of the zTOC
    ztoc: String,
    #[command(flatten)]
    tables: ArtifactArgs,
}

#[derive(Debug, clap::Args)]
struct ZtocGetFileCommand {
    /// Digest of the zTOC
    digest: Digest,
    /// Path in the layer
    file: String,
    /// Output file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    tables: ArtifactArgs,
}

/// The output of `ztoc info`, with the fields of AWS's tool.
#[derive(serde::Serialize)]
struct ZtocInfoReport {
    version: String,
    build_tool: String,
    size: u64,
    span_size: u64,
    num_spans: usize,
    num_files: usize,
    num_multi_span_files: usize,
    files: Vec<ZtocFileReport>,
}

#[derive(serde::Serialize)]
struct ZtocFileReport {
    filename: String,
    offset: u64,
    size: u64,
    #[serde(rename = "type")]
    kind: &'static str,
    start_span: u32,
    end_span: u32,
}

#[derive(Debug, clap::Args)]
struct ZtocCreateCommand {
    /// Layer file, as it is in the registry
    file: PathBuf,
    /// Output file [default: FILE.ztoc]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Minimum distance between checkpoints
    ///
    /// In uncompressed bytes. Each checkpoint takes 32 KiB in the zTOC.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    span_size: u64,
    /// Tool name to record in the zTOC
    #[arg(long, value_name = "NAME", default_value = BUILD_TOOL)]
    build_tool: String,
}

/// The output of `--json`.
#[derive(serde::Serialize)]
struct ZtocCreateReport<'a> {
    layer: Digest,
    size: u64,
    packing: Packing,
    uncompressed_size: u64,
    entries: usize,
    spans: usize,
    ztoc: Digest,
    ztoc_size: usize,
    path: &'a Path,
}

impl ZtocCommand {
    /// Runs the command.
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let json = global.json;
        let create = match self.command {
            ZtocSubcommand::Create(create) => create,
            ZtocSubcommand::List(list) => return list.run(global).await,
            ZtocSubcommand::Info(info) => return info.run(global).await,
            ZtocSubcommand::GetFile(get) => return get.run(global).await,
        };
        blocking(move || create.run(json)).await?;
        Ok(ExitCode::SUCCESS)
    }
}

impl ZtocListCommand {
    async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let mut found = self.tables.find(global, ArtifactKind::Ztoc).await?;
        let image = self.image_ref.map(|image| image.to_string());
        found.retain(|table| {
            self.ztoc_digest.is_none_or(|digest| table.digest == digest)
                && (image.is_none() || table.image == image)
        });
        artifacts::print(global, &found, self.quiet)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl ZtocInfoCommand {
    async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let bytes = match self.ztoc.parse::<Digest>() {
            Ok(digest) => {
                let found = self.tables.find(global, ArtifactKind::Ztoc).await?;
                artifacts::of_digest(&found, &digest)?.fetch().await?
            }
            Err(error) if self.ztoc.starts_with("sha") => return Err(error),
            Err(_) => std::fs::read(&self.ztoc)
                .or_kind(Kind::NotFound, || format!("the zTOC {}", self.ztoc))?
                .into(),
        };
        let ztoc =
            Ztoc::parse(&bytes).or_kind(Kind::Corrupt, || format!("the zTOC {}", self.ztoc))?;
        output::json(&ZtocInfoReport::of(&ztoc, bytes.len()))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl ZtocInfoReport {
    fn of(ztoc: &Ztoc, size: usize) -> Self {
        let files: Vec<ZtocFileReport> = ztoc
            .entries
            .iter()
            .map(|entry| {
                let start = entry.data_offset;
                // an entry without data is at the position where its data would begin
                let length = entry.size.max(1);
                let spans = ztoc
                    .spans
                    .covering(start..start.checked_add(length).unwrap_or(start));
                ZtocFileReport {
                    filename: String::from_utf8_lossy(&entry.name).into_owned(),
                    offset: start.get(),
                    size: entry.size,
                    kind: match entry.kind {
                        EntryKind::Regular => "reg",
                        EntryKind::Directory => "dir",
                        EntryKind::Symlink => "symlink",
                        EntryKind::Hardlink => "hardlink",
                        EntryKind::Char => "char",
                        EntryKind::Block => "block",
                        EntryKind::Fifo => "fifo",
                    },
                    start_span: spans.start.get(),
                    end_span: spans.end.get().saturating_sub(1).max(spans.start.get()),
                }
            })
            .collect();
        Self {
            version: ztoc.version.clone(),
            build_tool: ztoc.build_tool.clone(),
            size: size as u64,
            span_size: ztoc.spans.span_size,
            num_spans: ztoc.spans.spans.len(),
            num_files: files.len(),
            num_multi_span_files: files
                .iter()
                .filter(|file| file.end_span > file.start_span)
                .count(),
            files,
        }
    }
}

impl ZtocGetFileCommand {
    async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let found = self.tables.find(global, ArtifactKind::Ztoc).await?;
        let table = artifacts::of_digest(&found, &self.digest)?;
        let IndexArtifact { layer, image, .. } = table;
        let (Some(layer), Some(image)) = (layer, image) else {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "the index does not name the image of zTOC {}: give the image with --at",
                    self.digest
                ),
            ));
        };
        let source = Source::open(&image.parse()?, &self.tables.access.access()?).await?;
        let file = cat::open_in_layer(&source, *layer, table.fetch().await?, &self.file).await?;
        match &self.output {
            None => {
                let mut out = output::StdoutPipe::default();
                let written = cat::write(file, &mut out).await;
                out.end(written)?;
            }
            Some(path) => {
                let context = || format!("writing the file {}", path.display());
                let mut out = NewFile::create(path).or_kind(Kind::Io, context)?;
                cat::write(file, &mut out).await?;
                out.finish().or_kind(Kind::Io, context)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl ZtocCreateCommand {
    fn run(self, json: bool) -> Result<()> {
        let output = self.output.clone().unwrap_or_else(|| {
            let mut path = self.file.clone().into_os_string();
            path.push(".ztoc");
            path.into()
        });
        if new_file::is_same(&self.file, &output) {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{} is the layer itself; use another output file",
                    output.display()
                ),
            ));
        }
        let indexed = self.index()?;
        let name = self.file.display();
        let ztoc = match indexed.ztoc {
            Some(Ok(ztoc)) => ztoc,
            Some(Err(reason)) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("{name}: this layer cannot have a zTOC: {reason}"),
                ));
            }
            None => Vec::new(), // not reached: the options ask for a zTOC
        };
        let context = || format!("writing the zTOC {}", output.display());
        let write = || {
            let mut file = NewFile::create(&output)?;
            file.write_all(&ztoc)?;
            file.finish()
        };
        write().or_kind(Kind::Io, context)?;
        let report = ZtocCreateReport {
            layer: indexed.digest,
            size: indexed.size,
            packing: indexed.packing,
            uncompressed_size: indexed.uncompressed_size,
            entries: indexed.entries.len(),
            spans: indexed.spans,
            ztoc: Digest::of(&ztoc),
            ztoc_size: ztoc.len(),
            path: &output,
        };
        output::report(json, &report)
    }

    fn index(&self) -> Result<Indexed> {
        let reading = || format!("reading the layer {}", self.file.display());
        let mut file = File::open(&self.file).map_err(|source| {
            let kind = match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                _ => Kind::Io,
            };
            Error::with_source(kind, reading(), source)
        })?;
        let size = file.metadata().or_kind(Kind::Io, reading)?.len();
        // draws on a terminal only
        let progress = indicatif::ProgressBar::new(size);
        let options = Options {
            span_size: self.span_size,
            build_tool: self.build_tool.clone(),
            ztoc: true,
            compact_span_size: None,
            diff_id: false,
            checked_digest: None,
        };
        let corrupt = |error: build::Error<std::convert::Infallible>| {
            let kind = error.kind();
            Error::with_source(
                kind,
                format!("indexing the layer {}", self.file.display()),
                error,
            )
        };
        // the first bytes of the file decide its format
        let mut indexer = LayerIndexer::new(Packing::Plain, options, NoSink);
        let mut buffer = vec![0; READ_SIZE];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    indexer.write(&buffer[..count]).map_err(corrupt)?;
                    progress.inc(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).or_kind(Kind::Io, reading),
            }
        }
        let (indexed, NoSink) = indexer.finish().map_err(corrupt)?;
        progress.finish_and_clear();
        Ok(indexed)
    }
}

impl std::fmt::Display for ZtocCreateReport<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {} bytes, {} spans, {} entries\nlayer {} ({} bytes, {} uncompressed)",
            self.path.display(),
            self.ztoc_size,
            self.spans,
            self.entries,
            self.layer,
            self.size,
            self.uncompressed_size,
        )
    }
}
