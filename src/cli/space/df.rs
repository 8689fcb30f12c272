//! `socinbd df`.

use std::process::ExitCode;

use clap::Args;

use super::root::Root;
use crate::{
    cli::{GlobalArgs, output, quantity},
    engine::space::usage::{ImageSpace, LayerSpace},
    error::Result,
    layer::DiskReserve,
};

/// Show what images and layers hold on the local disk
///
/// Sizes are those of allocated blocks. OWN is what no other image has: `prune` frees it when the image is removed. Images are ordered by
/// their last attach or detach.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd df\n\
\x20 socinbd df --layers\n\
\x20 socinbd df --json")]
pub(crate) struct DfCommand {
    /// Show each layer, too
    #[arg(long)]
    layers: bool,
}

impl DfCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let report = Root::open(global).await?.space().await?;
        if global.json {
            output::json(&report)?;
            return Ok(ExitCode::SUCCESS);
        }
        output::table(
            [
                "IMAGE", "MANIFEST", "STATE", "USED", "LAYERS", "SIZE", "OWN", "SHARED",
            ],
            report.images.iter().map(|image| {
                [
                    image.reference.to_string(),
                    image.manifest.hex()[..12].to_owned(),
                    state(image),
                    quantity::ago(image.used),
                    image.layers.to_string(),
                    output::bytes(image.bytes),
                    output::bytes(image.own_bytes),
                    output::bytes(image.shared_bytes),
                ]
            }),
        )?;
        if self.layers {
            output::line("")?;
            output::table(
                ["LAYER", "STATE", "USED", "IMAGES", "SPANS", "SIZE"],
                report.layers.iter().map(|layer| {
                    [
                        layer.layer.to_string(),
                        state_of_layer(layer),
                        quantity::ago(layer.used),
                        layer.images.len().to_string(),
                        format!("{}/{}", layer.spans_present, layer.spans),
                        output::bytes(layer.bytes),
                    ]
                }),
            )?;
        }
        output::line(&format!(
            "{} layers have {}; {} of {} are available on the file system of {}",
            report.layers.len(),
            output::bytes(report.bytes),
            output::bytes(report.available_bytes),
            output::bytes(report.file_system_bytes),
            report.root.display()
        ))?;
        let space = report.space;
        if let Some(limit) = space.limits.limit {
            output::line(&format!("the disk limit is {}", output::bytes(limit)))?;
        }
        match space.limits.reserve {
            Some(DiskReserve::Bytes(bytes)) => {
                output::line(&format!("the reserve is {}", output::bytes(bytes)))?;
            }
            Some(DiskReserve::Percent(share)) => {
                output::line(&format!("the reserve is {share}% of the file system"))?;
            }
            None => {}
        }
        if space.is_full {
            output::line(
                "the limit is reached, and all that is stored is in use: readers get new spans from memory; raise the limit, or detach images",
            )?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn state(image: &ImageSpace) -> String {
    words(&[
        ("attached", image.attached),
        ("pinned", image.pinned),
        ("replaced", image.replaced),
    ])
}

fn state_of_layer(layer: &LayerSpace) -> String {
    words(&[
        ("attached", layer.attached),
        ("pinned", layer.pinned),
        ("complete", layer.complete),
    ])
}

/// The words that hold, separated by commas.
fn words(words: &[(&str, bool)]) -> String {
    let held = words.iter().filter(|(_, holds)| *holds);
    let held: Vec<_> = held.map(|(word, _)| *word).collect();
    match held.is_empty() {
        true => "-".to_owned(),
        false => held.join(","),
    }
}
