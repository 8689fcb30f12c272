//! `socinbd prefetch`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::artifacts::ArtifactArgs;
use crate::{
    cli::{GlobalArgs, output},
    engine::open::artifacts::{ArtifactKind, IndexArtifact},
    error::{Error, Kind, Result, ResultExt},
    oci::Digest,
    soci::prefetch::Prefetch,
};

/// List and show prefetch artifacts: spans to fetch at the start
#[derive(Subcommand)]
#[command(after_help = "Examples:\n\
\x20 socinbd prefetch list --at registry.example/app:1")]
pub(crate) enum PrefetchCommand {
    #[command(visible_alias = "ls")]
    List(PrefetchListCommand),
    Info(PrefetchInfoCommand),
}

/// List the prefetch artifacts of the indexes in the state directory or of an image
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd prefetch list\n\
\x20 socinbd prefetch list --at registry.example/app:1")]
pub(crate) struct PrefetchListCommand {
    #[command(flatten)]
    tables: ArtifactArgs,
    /// Print digests only
    #[arg(long, short)]
    quiet: bool,
}

/// Show the spans of a prefetch artifact
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd prefetch info sha256:6a5d... --at registry.example/app:1")]
pub(crate) struct PrefetchInfoCommand {
    /// Digest of the artifact
    digest: Digest,
    #[command(flatten)]
    tables: ArtifactArgs,
}

/// The output of `prefetch info --json`.
#[derive(Serialize)]
struct PrefetchReport {
    digest: Digest,
    layer: Option<Digest>,
    size: u64,
    spans: Vec<crate::soci::prefetch::PrefetchSpan>,
}

impl PrefetchCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        match self {
            Self::List(command) => command.run(global).await,
            Self::Info(command) => command.run(global).await,
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl PrefetchListCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let tables = self.tables.find(global, ArtifactKind::Prefetch).await?;
        super::artifacts::print(global, &tables, self.quiet)
    }
}

impl PrefetchInfoCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let tables = self.tables.find(global, ArtifactKind::Prefetch).await?;
        let table = super::artifacts::of_digest(&tables, &self.digest)?;
        let IndexArtifact {
            digest,
            layer,
            size,
            ..
        } = table;
        let bytes = table.fetch().await?;
        let prefetch = Prefetch::parse(&bytes)
            .or_kind(Kind::Corrupt, || format!("prefetch artifact {digest}"))?;
        let report = PrefetchReport {
            digest: *digest,
            layer: *layer,
            size: *size,
            spans: prefetch.spans,
        };
        if global.json {
            return output::json(&report);
        }
        let layer = report.layer.ok_or_else(|| {
            Error::new(
                Kind::Corrupt,
                format!("the index does not name the layer of prefetch artifact {digest}"),
            )
        })?;
        output::line(&format!("prefetch artifact {digest} of layer {layer}"))?;
        output::table(
            ["FIRST SPAN", "LAST SPAN", "PRIORITY"],
            report.spans.iter().map(|span| {
                [
                    span.start_span.to_string(),
                    span.end_span.to_string(),
                    span.priority.to_string(),
                ]
            }),
        )
    }
}
