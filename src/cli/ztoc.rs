//! `socinbd ztoc create`: one layer file to its zTOC.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::Global;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, Packing},
    soci::build::{self, BUILD_TOOL, DEFAULT_SPAN_SIZE, Indexed, LayerIndexer, NoSink, Options},
};

/// Bytes that are read at a time.
const READ_SIZE: usize = 1 << 20;

/// Work on zTOCs, the tables of contents of single layers.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Makes the zTOC of a layer file: gzip (also of several members) or plain tar
    #[command(
        after_help = "Its bytes are those that AWS's `soci` writes with the same span size and build tool, except where that tool is wrong\n\
                      (docs/soci.md). zstd layers and layers with sparse files can have no zTOC.\n\n\
                      Example: socinbd ztoc create layer.tar.gz --span-size 1048576"
    )]
    Create(Create),
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The layer, as it is in the registry
    file: PathBuf,
    /// Where to write the zTOC [default: FILE.ztoc]
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// The least bytes of the uncompressed layer between two checkpoints; each costs 32 KiB in the zTOC
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_SPAN_SIZE, value_parser = clap::value_parser!(u64).range(1..=i64::MAX as u64))]
    span_size: u64,
    /// The tool that the zTOC names as its maker
    #[arg(long, value_name = "NAME", default_value = BUILD_TOOL)]
    build_tool: String,
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Report<'a> {
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

impl Args {
    /// Runs the command.
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
        let json = global.json;
        let work = move || match self.command {
            Command::Create(create) => create.run(json),
        };
        tokio::task::spawn_blocking(work)
            .await
            .or_kind(Kind::Io, || "a worker thread".into())??;
        Ok(ExitCode::SUCCESS)
    }
}

impl Create {
    fn run(self, json: bool) -> Result<()> {
        let indexed = self.index()?;
        let name = self.file.display();
        let ztoc = match indexed.ztoc {
            Some(Ok(ztoc)) => ztoc,
            Some(Err(reason)) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("{name}: this layer can have no zTOC: {reason}"),
                ));
            }
            None => Vec::new(), // one was asked for
        };
        let output = self.output.unwrap_or_else(|| {
            let mut path = self.file.clone().into_os_string();
            path.push(".ztoc");
            path.into()
        });
        write(&output, &ztoc).or_kind(Kind::Io, || {
            format!("writing the zTOC {}", output.display())
        })?;
        let report = Report {
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
        report.print(json).or_kind(Kind::Io, || {
            "printing what was made to standard output".to_owned()
        })
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
        };
        let corrupt = |error: build::Error<std::convert::Infallible>| {
            let kind = error.kind();
            Error::with_source(
                kind,
                format!("indexing the layer {}", self.file.display()),
                error,
            )
        };
        // the file's first bytes say what it is
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

/// Writes the file whole or not at all; in place only what is no ordinary file (`/dev/stdout`).
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return File::options().write(true).open(path)?.write_all(bytes);
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o666)) // less the umask
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

impl Report<'_> {
    fn print(&self, json: bool) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if json {
            serde_json::to_writer(&mut out, self)?;
            return writeln!(out);
        }
        writeln!(
            out,
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
