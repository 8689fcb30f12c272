//! `socinbd cat`.

use std::process::ExitCode;

use clap::Args;

use crate::{
    cli::{GlobalArgs, ImageArgs, IndexArgs, absolute, output},
    engine::{
        cat,
        open::{image::Image, local_indexes::LocalIndexes, search},
    },
    error::Result,
    source::Source,
};

/// Print a file of an image without mounting the image
///
/// Fetches the tables of the layers from the topmost to the one with the file, and the spans of the file. A layer without a table is read
/// whole. Needs neither root nor a daemon.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd cat nginx:1.27 /etc/nginx/nginx.conf\n\
\x20 socinbd cat oci:./app:latest /etc/os-release")]
pub(crate) struct CatCommand {
    #[command(flatten)]
    image: ImageArgs,
    /// Path in the image; symbolic links are resolved within the image
    path: String,
    #[command(flatten)]
    index: IndexArgs,
}

impl CatCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let source = Source::open(&self.image.image, &self.image.access.access()?).await?;
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let found = search::find(&image, &self.index.choice(), &local).await?;
        let file = cat::open(&image, &found, &self.path).await?;
        let mut out = output::StdoutPipe::default();
        let written = cat::write(file, &mut out).await;
        out.end(written)?;
        Ok(ExitCode::SUCCESS)
    }
}
