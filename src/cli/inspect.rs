//! `socinbd inspect`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{Global, ImageArgs, IndexArgs, absolute, output};
use crate::{
    engine::{Process, UsedIndex, discovery, image::Image, local::LocalIndexes},
    error::Result,
    oci::{Digest, Packing},
    source::Source,
    ztoc::Ztoc,
};

/// Show an image's layers and SOCI index, and what would be fetched before the first read
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd inspect nginx:1.27\n\
\x20 socinbd inspect oci:./app:latest --json")]
pub struct Inspect {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
}

/// What `inspect --json` prints.
#[derive(Serialize)]
struct Report {
    reference: String,
    manifest: Digest,
    platform: String,
    /// The image's program, as its configuration says.
    config: Process,
    index: Option<UsedIndex>,
    /// Lowest first.
    layers: Vec<LayerReport>,
    /// Bytes of all layers' blobs.
    size: u64,
    /// Bytes that an attach fetches before the first read: tables, and layers without one.
    before_first_read: u64,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct LayerReport {
    digest: Digest,
    diff_id: Digest,
    size: u64,
    packing: Packing,
    ztoc: Option<ZtocReport>,
}

#[derive(Serialize)]
struct ZtocReport {
    digest: Digest,
    size: u64,
    span_size: u64,
    spans: usize,
    entries: usize,
    uncompressed_size: u64,
}

impl Inspect {
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
        let source = Source::open(&self.image.image, &self.image.access.access()?).await?;
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let discovery::Found { index, warnings } =
            discovery::find(&image, &self.index.choice(), &local).await?;
        let mut layers = Vec::with_capacity(image.layers.len());
        for layer in &image.layers {
            let ztoc = match index
                .as_ref()
                .and_then(|index| Some((index, index.ztoc(&layer.digest)?)))
            {
                None => None,
                Some((index, digest)) => {
                    let bytes = index.fetch_ztoc(&layer.digest).await?;
                    let ztoc = Ztoc::parse(&bytes).map_err(|error| {
                        crate::error::Error::with_source(
                            crate::error::Kind::Corrupt,
                            format!("the zTOC {digest} of layer {}", layer.digest),
                            error,
                        )
                    })?;
                    Some(ZtocReport {
                        digest,
                        size: bytes.len() as u64,
                        span_size: ztoc.spans.span_size,
                        spans: ztoc.spans.spans.len(),
                        entries: ztoc.entries.len(),
                        uncompressed_size: ztoc.spans.uncompressed_size,
                    })
                }
            };
            layers.push(LayerReport {
                digest: layer.digest,
                diff_id: layer.diff_id,
                size: layer.size,
                packing: layer.packing,
                ztoc,
            });
        }
        let report = Report {
            reference: image.source.reference().to_string(),
            manifest: image.digest,
            platform: image.platform.to_string(),
            config: Process::of(&image.config),
            index: index.as_ref().map(UsedIndex::of),
            size: layers.iter().map(|layer| layer.size).sum(),
            before_first_read: layers
                .iter()
                .map(|layer| layer.ztoc.as_ref().map_or(layer.size, |ztoc| ztoc.size))
                .sum(),
            layers,
            warnings,
        };
        if global.json {
            output::json(&report)?
        } else {
            report.print()?
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        output::line(&format!("image     {}", self.reference))?;
        output::line(&format!("manifest  {} ({})", self.manifest, self.platform))?;
        output::line(&match &self.index {
            Some(index) => format!(
                "index     {} (SOCI v{}, {})",
                index.digest, index.version, index.origin
            ),
            None => {
                "index     none: every layer is streamed whole; `socinbd index create` makes one"
                    .to_owned()
            }
        })?;
        let rows = self.layers.iter().enumerate().map(|(number, layer)| {
            let packing = match layer.packing {
                Packing::Gzip => "gzip",
                Packing::Zstd => "zstd",
                Packing::Plain => "plain",
            };
            let (ztoc, spans, files) = layer.ztoc.as_ref().map_or_else(
                || ("-".to_owned(), "-".to_owned(), "-".to_owned()),
                |ztoc| {
                    (
                        output::bytes(ztoc.size),
                        ztoc.spans.to_string(),
                        ztoc.entries.to_string(),
                    )
                },
            );
            [
                number.to_string(),
                layer.digest.hex()[..12].to_owned(),
                output::bytes(layer.size),
                packing.to_owned(),
                ztoc,
                spans,
                files,
            ]
        });
        output::table(
            [
                "LAYER", "DIGEST", "SIZE", "PACKING", "ZTOC", "SPANS", "ENTRIES",
            ],
            rows,
        )?;
        output::line(&format!(
            "before the first read {} of {} are fetched",
            output::bytes(self.before_first_read),
            output::bytes(self.size)
        ))?;
        self.warnings
            .iter()
            .try_for_each(|warning| output::line(&format!("warning: {warning}")))
    }
}
