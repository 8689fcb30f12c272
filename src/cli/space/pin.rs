//! `socinbd pin` and `socinbd unpin`.

use std::process::ExitCode;

use clap::Args;

use super::root::Root;
use crate::{
    api::PinRequest,
    cli::{GlobalArgs, output},
    error::Result,
    oci::Reference,
};

/// Keep the disks of an image although nobody uses it
///
/// `prune` does not remove them, and a daemon with a disk limit does not make room with them. The image must have been attached from this
/// state directory. The pin stays with the reference when it is attached with another manifest later.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd pin registry.example/app:1")]
pub(crate) struct PinCommand {
    /// The reference by which the image was attached
    image: Reference,
}

/// End the pin of an image
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd unpin registry.example/app:1")]
pub(crate) struct UnpinCommand {
    /// The reference by which the image was attached
    image: Reference,
}

impl PinCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        pin(global, self.image, true).await
    }
}

impl UnpinCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        pin(global, self.image, false).await
    }
}

async fn pin(global: &GlobalArgs, reference: Reference, pinned: bool) -> Result<ExitCode> {
    let request = PinRequest { reference, pinned };
    let record = Root::open(global).await?.pin(request).await?;
    match global.json {
        true => output::json(&record)?,
        false => {
            let state = if pinned { "pinned" } else { "not pinned" };
            output::line(&format!(
                "{} ({}) is {state}",
                record.reference, record.manifest
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
