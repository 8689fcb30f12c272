//! `socinbd inspect`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{GlobalArgs, ImageArgs, IndexArgs, absolute, output},
    engine::{
        UsedIndex,
        open::{
            compact_index::CompactIndex, image::Image, local_indexes::LocalIndexes,
            policy::IndexOrigin, search, soci_index::SociIndex,
        },
        transfer::describe::{self, Description},
    },
    error::{Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::{Digest, Packing, Process},
    source::Source,
    tar::Entry,
    ztoc::{SpanTable, Ztoc},
};

/// Show a manifest, its referrers and, for an image, its layers
///
/// Takes any reference: an image, an image index, a SOCI index, a signature, a chart. Referrers are shown with their artifact types, also
/// those of the entries of an image index. For an image, the report says how many bytes an attach fetches before the first read.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd inspect nginx:1.27\n\
\x20 socinbd inspect oci:./app:latest --json")]
pub(crate) struct InspectCommand {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
}

/// The output of `inspect --json`.
#[derive(Serialize)]
struct InspectReport {
    /// The manifest of the reference, and its referrers.
    described: Description,
    reference: String,
    manifest: Digest,
    platform: String,
    /// The program of the image, from its configuration.
    config: Process,
    index: Option<UsedIndex>,
    compact_index: Option<CompactIndexReport>,
    /// Lowest first.
    layers: Vec<InspectedLayer>,
    /// Total size of the layers' blobs in bytes.
    size: u64,
    /// Bytes that an attach fetches before the first read: tables, and layers without one.
    before_first_read: u64,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct InspectedLayer {
    digest: Digest,
    diff_id: Digest,
    size: u64,
    packing: Packing,
    /// The zTOC; only read if there is no compact table.
    ztoc: Option<TableReport>,
    /// The table of the compact index.
    compact: Option<TableReport>,
}

impl InspectedLayer {
    /// The table that an attach uses.
    fn table(&self) -> Option<&TableReport> {
        self.compact.as_ref().or(self.ztoc.as_ref())
    }
}

#[derive(Serialize)]
struct CompactIndexReport {
    digest: Digest,
    origin: IndexOrigin,
}

#[derive(Serialize)]
struct TableReport {
    digest: Digest,
    /// Size of the table in bytes; it is fetched before the first read.
    size: u64,
    span_size: u64,
    spans: usize,
    entries: usize,
    uncompressed_size: u64,
}

impl InspectCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let source = Source::open(&self.image.image, &self.image.access.access()?).await?;
        let described = describe::describe(&source).await?;
        if !described.is_image {
            match global.json {
                true => output::json(&described)?,
                false => print_described(&described)?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let search::FoundIndexes {
            index,
            compact,
            mut warnings,
        } = search::find(&image, &self.index.choice(), &local).await?;
        let mut layers = Vec::with_capacity(image.layers.len());
        for layer in &image.layers {
            let mut report = InspectedLayer {
                digest: layer.digest,
                diff_id: layer.diff_id,
                size: layer.size,
                packing: layer.packing,
                ztoc: None,
                compact: None,
            };
            if let Some(compact) = &compact {
                match compact_table(compact, layer).await {
                    Ok(found) => report.compact = found,
                    // the same as in an attach
                    Err(error) if error.kind() != Kind::Unavailable => {
                        warnings.push(error.report());
                    }
                    Err(error) => return Err(error),
                }
            }
            if let (None, Some(index)) = (&report.compact, &index) {
                report.ztoc = ztoc(index, layer).await?;
            }
            layers.push(report);
        }
        warnings.extend(described.warnings.iter().cloned());
        let report = InspectReport {
            described: described.clone(),
            reference: image.source.reference().to_string(),
            manifest: image.digest,
            platform: image.platform.to_string(),
            config: image.config.process.clone(),
            index: index.as_ref().map(UsedIndex::of),
            compact_index: compact.as_ref().map(|compact| CompactIndexReport {
                digest: compact.digest,
                origin: compact.origin,
            }),
            size: layers.iter().map(|layer| layer.size).sum(),
            before_first_read: layers
                .iter()
                .map(|layer| layer.table().map_or(layer.size, |table| table.size))
                .sum(),
            layers,
            warnings,
        };
        if global.json {
            output::json(&report)?
        } else {
            print_described(&described)?;
            report.print()?
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The zTOC of a layer in the SOCI index.
async fn ztoc(index: &SociIndex, layer: &LayerBlob) -> Result<Option<TableReport>> {
    let Some(digest) = index.ztoc(&layer.digest) else {
        return Ok(None);
    };
    let bytes = index.fetch_ztoc(&layer.digest).await?;
    let ztoc = Ztoc::parse(&bytes).or_kind(Kind::Corrupt, || {
        format!("the zTOC {digest} of layer {}", layer.digest)
    })?;
    Ok(Some(TableReport::of(
        digest,
        &bytes,
        &ztoc.spans,
        &ztoc.entries,
    )))
}

/// The table of a layer in the compact index.
async fn compact_table(compact: &CompactIndex, layer: &LayerBlob) -> Result<Option<TableReport>> {
    let Some((part, bytes, table)) = compact.table(layer).await? else {
        return Ok(None);
    };
    Ok(Some(TableReport::of(
        part.table,
        &bytes,
        &table.spans,
        &table.entries,
    )))
}

impl TableReport {
    fn of(digest: Digest, bytes: &[u8], spans: &SpanTable, entries: &[Entry]) -> Self {
        Self {
            digest,
            size: bytes.len() as u64,
            span_size: spans.span_size,
            spans: spans.spans.len(),
            entries: entries.len(),
            uncompressed_size: spans.uncompressed_size,
        }
    }
}

/// Prints the description of any reference.
fn print_described(described: &Description) -> Result<()> {
    let Description {
        digest,
        media_type,
        what,
        ..
    } = described;
    output::line(&format!("{} is {what}", described.reference))?;
    output::line(&format!("digest    {digest} ({media_type})"))?;
    if let Some(kind) = &described.artifact_type {
        output::line(&format!("artifact  {kind}"))?;
    }
    if let Some(subject) = &described.subject {
        output::line(&format!("subject   {subject}"))?;
    }
    for entry in &described.entries {
        let platform = entry.platform.as_deref().unwrap_or("-");
        let gone = if entry.is_there { "" } else { " (missing)" };
        output::line(&format!(
            "lists     {} {platform} {}{gone}",
            entry.digest, entry.what
        ))?;
    }
    for companion in &described.referrers {
        let by = companion.tag.as_ref().map_or_else(
            || companion.artifact_type.clone(),
            |tag| format!("tag {tag}"),
        );
        output::line(&format!(
            "referrer  {} {} ({by}) of {}",
            companion.digest, companion.what, companion.subject
        ))?;
    }
    if !described.is_image {
        for warning in &described.warnings {
            output::line(&format!("warning: {warning}"))?;
        }
    }
    Ok(())
}

impl InspectReport {
    fn print(&self) -> Result<()> {
        output::line(&format!("image     {}", self.reference))?;
        output::line(&format!("manifest  {} ({})", self.manifest, self.platform))?;
        output::line(&match &self.index {
            Some(index) => format!(
                "index     {} (SOCI v{}, {})",
                index.digest, index.version, index.origin
            ),
            None => {
                "index     none: layers are downloaded whole; make one with `socinbd index create`"
                    .to_owned()
            }
        })?;
        if let Some(compact) = &self.compact_index {
            let CompactIndexReport { digest, origin } = compact;
            output::line(&format!(
                "          {digest} (compact, {origin}), which is preferred"
            ))?;
        }
        let rows = self.layers.iter().enumerate().map(|(number, layer)| {
            let packing = match layer.packing {
                Packing::Gzip => "gzip",
                Packing::Zstd => "zstd",
                Packing::Plain => "plain",
            };
            let (table, spans, files) = layer.table().map_or_else(
                || ("-".to_owned(), "-".to_owned(), "-".to_owned()),
                |table| {
                    (
                        output::bytes(table.size),
                        table.spans.to_string(),
                        table.entries.to_string(),
                    )
                },
            );
            [
                number.to_string(),
                layer.digest.hex()[..12].to_owned(),
                output::bytes(layer.size),
                packing.to_owned(),
                table,
                spans,
                files,
            ]
        });
        output::table(
            [
                "LAYER", "DIGEST", "SIZE", "PACKING", "TABLE", "SPANS", "ENTRIES",
            ],
            rows,
        )?;
        output::line(&format!(
            "before the first read: {} of {} are fetched",
            output::bytes(self.before_first_read),
            output::bytes(self.size)
        ))?;
        self.warnings
            .iter()
            .try_for_each(|warning| output::line(&format!("warning: {warning}")))
    }
}
