//! `socinbd cat`.

use std::process::ExitCode;

use clap::Args;

use super::{Global, ImageArgs, IndexArgs, absolute};
use crate::{
    engine::{
        cat,
        open::{image::Image, local_indexes::LocalIndexes, soci_index},
    },
    error::Result,
    source::Source,
};

/// Print one file of an image, without mounting it
///
/// Costs the tables of the layers from the top down to the one that has the file, and the file's spans. A layer without a table is read
/// whole. No root, no daemon.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd cat nginx:1.27 /etc/nginx/nginx.conf\n\
\x20 socinbd cat oci:./app:latest /etc/os-release")]
pub(super) struct Cat {
    #[command(flatten)]
    image: ImageArgs,
    /// The file's path in the image; symbolic links are followed in the image
    path: String,
    #[command(flatten)]
    index: IndexArgs,
}

impl Cat {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        let source = Source::open(&self.image.image, &self.image.access.access()?).await?;
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let found = soci_index::find(&image, &self.index.choice(), &local).await?;
        let file = cat::open(&image, &found, &self.path).await?;
        cat::write(file, &mut std::io::stdout()).await?;
        Ok(ExitCode::SUCCESS)
    }
}
