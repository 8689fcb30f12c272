//! `socinbd copy`.

use std::process::ExitCode;

use clap::Args;

use super::{AccessArgs, Global, making::UploadArgs, output};
use crate::{
    engine::transfer::copy::{self, CopyOptions},
    error::Result,
    oci::Reference,
    source::{Destination, Source},
};

/// Copy an image with its SOCI indexes, and what else refers to it
///
/// Between registries and OCI layouts (folders, tar files), all platforms, byte for byte; platforms that are listed and not there are left
/// out, with a warning. SOCI indexes always go along; signatures,
/// SBOMs and other referrers by their artifact types.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd copy staging.example/app:1 registry.example/app:1\n\
\x20 socinbd copy registry.example/app:1 oci:./app:1 --referrers '*'\n\
\x20 socinbd copy registry.example/app:1 oci-archive:app.tar --referrers application/vnd.cncf.notary.signature")]
pub(super) struct Copy {
    /// The image
    source: Reference,
    /// Its new place and name
    destination: Reference,
    /// Copy referrers of this artifact type too (`*` and `?` are wildcards); may be repeated
    #[arg(long, value_name = "TYPE")]
    referrers: Vec<String>,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    access: AccessArgs,
}

impl Copy {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        let access = self.access.access()?;
        let source = Source::open(&self.source, &access).await?;
        // a source that is not there leaves no layout behind
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
