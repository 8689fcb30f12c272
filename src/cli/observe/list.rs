//! `socinbd list`.

use std::{process::ExitCode, time::Duration};

use clap::Args;

use super::{
    screen::{self, Style},
    snapshots,
};
use crate::{
    api::client::Client,
    cli::{
        GlobalArgs, absolute,
        attached::{detach, replace},
        output::{self, plain},
    },
    engine::{AttachmentStatus, ServingProgram},
    error::Result,
};

/// How often the attachments are asked for with `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// List the attached images, or the snapshots of containerd
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd list\n\
\x20 socinbd list --snapshots\n\
\x20 socinbd list --watch\n\
\x20 socinbd list --json")]
pub(crate) struct ListCommand {
    /// Show changes until q or Ctrl-C
    ///
    /// On a terminal the list is updated each second. Otherwise it is printed again when it has changed; with --json it is one line of JSON each
    /// second.
    #[arg(long)]
    watch: bool,
    /// List the snapshots of containerd instead
    #[arg(long, conflicts_with = "watch")]
    snapshots: bool,
}

impl ListCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let client = Client::new(&absolute(&global.run_dir)?);
        if self.snapshots {
            let all = snapshots::all(global, &client).await?;
            match global.json {
                true => output::json(&all)?,
                false => output::text(&snapshots::text(&all))?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        match (self.watch, global.json) {
            (true, false) if screen::is_terminal() => watch_on_screen(global, &client).await?,
            (true, _) => watch_in_lines(global, &client).await?,
            (false, true) => output::json(&detach::attached(global, &client).await?)?,
            (false, false) => output::text(&text(&detach::attached(global, &client).await?))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn watch_on_screen(global: &GlobalArgs, client: &Client) -> Result<()> {
    screen::show(INTERVAL, async |_| {
        Ok(match detach::attached(global, client).await {
            Ok(attachments) => {
                let text = text(&attachments);
                let lines = text.lines().enumerate();
                let style = |number| match number {
                    0 => Style::Heading,
                    _ => Style::Plain,
                };
                lines
                    .map(|(number, line)| screen::line(style(number), line))
                    .collect()
            }
            Err(error) => vec![screen::line(Style::Bad, error.report())],
        })
    })
    .await
}

/// Ends when the reader of standard output has gone.
async fn watch_in_lines(global: &GlobalArgs, client: &Client) -> Result<()> {
    let mut before = String::new();
    while !output::is_closed() {
        let attachments = detach::attached(global, client).await?;
        let now = match global.json {
            true => output::json_line(&attachments)?,
            false => text(&attachments),
        };
        if global.json || now != before {
            output::text(&now)?;
        }
        before = now;
        tokio::time::sleep(INTERVAL).await;
    }
    Ok(())
}

/// The table of the attachments, and what is to be said about them.
fn text(attachments: &[AttachmentStatus]) -> String {
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
            if attachment.kept { "yes" } else { "-" }.to_owned(),
            attachment.layers.len().to_string(),
            devices.join(","),
            spans,
            fetched,
            attachment.index.as_ref().map_or("-".to_owned(), |index| {
                format!("v{} {}", index.version, &index.digest.hex()[..12])
            }),
        ]
    });
    let mut text = output::table_text(
        [
            "MOUNTPOINT",
            "IMAGE",
            "STATE",
            "KEPT",
            "LAYERS",
            "DEVICE",
            "SPANS",
            "FETCHED",
            "INDEX",
        ],
        rows,
    );
    let mut programs: Vec<&ServingProgram> = Vec::new();
    for program in attachments.iter().filter_map(|it| it.served_by.as_ref()) {
        if !programs.contains(&program) {
            programs.push(program);
        }
    }
    for program in programs {
        text.push_str(&format!("{}\n", plain(&replace::told(program))));
    }
    for status in attachments {
        if let Some(why) = &status.why {
            let line = format!("{}: {why}", status.attachment.reference);
            text.push_str(&format!("{}\n", plain(&line)));
        }
    }
    text
}
