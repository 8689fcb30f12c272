//! `socinbd report`.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{page, why::Named};
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, attached::detach, new_file::NewFile, output},
    error::{Error, Kind, Result, ResultExt as _},
};

/// Write a page about the start of an attached image
///
/// The page is one HTML file that needs nothing else. It shows which files were waited for and when, what was fetched for them, how much of
/// the image was fetched, and which files no start has read. The daemon remembers the first 768 and the last 256 fetches and waits of each
/// layer.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd report -o start.html\n\
\x20 socinbd report registry.example/app -o start.html\n\
\x20 socinbd report /mnt --json")]
pub(crate) struct ReportCommand {
    /// Mount point, ID or image [default: the only one]
    #[arg(value_name = "MOUNTPOINT|IMAGE")]
    what: Option<String>,
    /// File to write; - is standard output
    #[arg(long, short, value_name = "FILE", required_unless_present = "json")]
    output: Option<PathBuf>,
}

impl ReportCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let run_dir = absolute(&global.run_dir)?;
        let client = Client::new(&run_dir);
        if client.daemon().await?.is_none() {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "no daemon runs at {}, and what it has fetched is not stored",
                    run_dir.display()
                ),
            ));
        }
        let mut attached = detach::attached(global, &client).await?;
        // a daemon knows fetches of what it serves
        attached.retain(|status| status.served_by.is_some());
        if let Some(what) = &self.what {
            let named = Named::of(what);
            attached.retain(|status| named.means(status));
        }
        let id = match &attached[..] {
            [only] => &only.attachment.id,
            [] => {
                let text = "no such image is attached; see `socinbd list`";
                return Err(Error::new(Kind::NotFound, text));
            }
            several => {
                let names = several.iter().map(|status| {
                    let attachment = &status.attachment;
                    format!("{} ({})", attachment.reference, attachment.id)
                });
                let names: Vec<_> = names.collect();
                let text = format!("which one: {}?", names.join(", "));
                return Err(Error::new(Kind::InvalidArgument, text));
            }
        };
        match (
            global.json,
            self.output.filter(|path| path.as_os_str() != "-"),
        ) {
            (true, None) => output::json(&client.fetches(id).await?)?,
            (true, Some(path)) => write(&path, &output::json_text(&client.fetches(id).await?)?)?,
            (false, None) => output::text(&page::page(&client.fetches(id).await?))?,
            (false, Some(path)) => write_page(&client, id, &path).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Writes the page about an attachment that the daemon serves.
pub(in crate::cli) async fn write_page(client: &Client, id: &str, path: &Path) -> Result<()> {
    write(path, &page::page(&client.fetches(id).await?))
}

fn write(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = NewFile::create(path)?;
        file.write_all(text.as_bytes())?;
        file.finish()
    };
    write().or_kind(Kind::Io, || format!("writing {}", path.display()))
}
