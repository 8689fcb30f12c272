//! `socinbd copy`.

use std::process::ExitCode;

use clap::Args;

use super::making::UploadArgs;
use crate::{
    cli::{AccessArgs, GlobalArgs, output},
    engine::transfer::copy::{self, CopyOptions},
    error::Result,
    oci::Reference,
    source::{Destination, Source},
};

/// Copy an image with its SOCI indexes and other referrers
///
/// Source and destination are a registry, an OCI layout directory, an OCI archive or containerd. All platforms are copied, unchanged; platforms whose
/// content is missing are left out, with a warning. SOCI indexes are always copied; signatures, SBOMs and other referrers are selected by
/// artifact type.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd copy staging.example/app:1 registry.example/app:1\n\
\x20 socinbd copy registry.example/app:1 oci:./app:1 --referrers '*'\n\
\x20 socinbd copy registry.example/app:1 oci-archive:app.tar \\\n\
\x20   --referrers application/vnd.cncf.notary.signature")]
pub(crate) struct CopyCommand {
    /// Image to copy
    source: Reference,
    /// Reference of the copy
    destination: Reference,
    /// Artifact type of referrers to copy too, with * and ? (repeatable)
    #[arg(long, value_name = "TYPE")]
    referrers: Vec<String>,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    access: AccessArgs,
}

impl CopyCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let access = self.access.access()?;
        let source = Source::open(&self.source, &access).await?;
        // if the source does not exist, no layout is left over
        source.root_manifest().await?;
        let destination = Destination::open(&self.destination, &access).await?;
        let options = CopyOptions {
            referrers: self.referrers,
            uploads: self.uploads.max_concurrent_uploads,
        };
        let report = copy::copy(&source, &destination, &options).await?;
        for warning in &report.warnings {
            tracing::warn!("{warning}");
        }
        output::report(global.json, &report)?;
        Ok(ExitCode::SUCCESS)
    }
}
