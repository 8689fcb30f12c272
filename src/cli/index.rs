//! `socinbd index`.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{Global, ImageArgs, absolute, output, progress::Progress};
use crate::{
    engine::{create, image::Image, local::LocalIndexes},
    error::Result,
    source::Source,
};

/// Make SOCI indexes
#[derive(Subcommand)]
pub enum Index {
    Create(Create),
}

/// Make a SOCI index (v1) for an image
///
/// Each layer passes once. The index is stored in the OCI layout that the image is in, or in the local root, where `attach` finds it.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index create oci:./app:latest\n\
\x20 socinbd index create registry.example/app --span-size 1048576")]
pub struct Create {
    #[command(flatten)]
    image: ImageArgs,
    /// Bytes of a layer between checkpoints, at least
    #[arg(long, value_name = "BYTES", default_value_t = create::DEFAULT_SPAN_SIZE)]
    span_size: u64,
    /// Skip layers whose blob has fewer bytes
    #[arg(long, value_name = "BYTES", default_value_t = create::DEFAULT_MIN_LAYER_SIZE)]
    min_layer_size: u64,
    /// Make a compact index too: finer spans, and little to fetch before the first read
    #[arg(long)]
    compact: bool,
    /// Bytes of a layer between checkpoints of the compact index, at least
    #[arg(long, value_name = "BYTES", requires = "compact", default_value_t = create::DEFAULT_COMPACT_SPAN_SIZE)]
    compact_span_size: u64,
}

impl Index {
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
        match self {
            Self::Create(command) => command.run(global).await,
        }
    }
}

impl Create {
    async fn run(self, global: &Global) -> Result<ExitCode> {
        let source = Source::open(&self.image.image, &self.image.access.access()?).await?;
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let options = create::CreateOptions {
            span_size: self.span_size,
            min_layer_size: self.min_layer_size,
            compact_span_size: self.compact.then_some(self.compact_span_size),
            ..create::CreateOptions::default()
        };
        let progress = Progress::new(global.json);
        let report = create::create(&image, &options, &local, &|layer, done, size| {
            progress.layer(layer, done, size)
        })
        .await?;
        progress.finish();
        if global.json {
            output::json(&report)?
        } else {
            output::line(&report.to_string())?
        }
        Ok(ExitCode::SUCCESS)
    }
}
