//! `socinbd list`.

use std::process::ExitCode;

use clap::Args;

use super::detach;
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, output},
    error::Result,
};

/// List the attached images
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd list\n\
\x20 socinbd list --json")]
pub(crate) struct ListCommand {}

impl ListCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let client = Client::new(&absolute(&global.run_dir)?);
        let attachments = detach::attached(global, &client).await?;
        if global.json {
            output::json(&attachments)?;
            return Ok(ExitCode::SUCCESS);
        }
        let rows = attachments.iter().map(|status| {
            let attachment = &status.attachment;
            let spans = status
                .spans
                .map_or("-".to_owned(), |(present, all)| format!("{present}/{all}"));
            let mountpoint = attachment
                .mountpoint
                .as_ref()
                .map_or("-".to_owned(), |path| path.display().to_string());
            let mut devices: Vec<String> = attachment
                .layers
                .iter()
                .map(|layer| layer.device.to_string())
                .collect();
            devices.sort();
            devices.dedup();
            let fetched = status.fetched_bytes.map_or("-".to_owned(), output::bytes);
            [
                mountpoint,
                attachment.reference.to_string(),
                status.state.to_string(),
                attachment.layers.len().to_string(),
                devices.join(","),
                spans,
                fetched,
                attachment.index.as_ref().map_or("-".to_owned(), |index| {
                    format!("v{} {}", index.version, &index.digest.hex()[..12])
                }),
            ]
        });
        output::table(
            [
                "MOUNTPOINT",
                "IMAGE",
                "STATE",
                "LAYERS",
                "DEVICE",
                "SPANS",
                "FETCHED",
                "INDEX",
            ],
            rows,
        )?;
        for status in &attachments {
            if let Some(why) = &status.why {
                output::line(&format!("{}: {why}", status.attachment.reference))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
