//! `socinbd restore`.

use std::{io::Write as _, process::ExitCode};

use clap::Args;

use super::start;
use crate::{
    cli::{GlobalArgs, absolute, exit, output, require_root},
    engine::AttachmentRecords,
    error::Result,
};

/// Attach the images of `attach --keep` again, after a reboot
///
/// The images are mounted from the state directory, in their order, without the registry. A daemon does the same when it starts; this command
/// starts one if none runs. An image that cannot be mounted does not hold up the others.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd restore\n\
\x20 socinbd restore --json")]
pub(crate) struct RestoreCommand {}

impl RestoreCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("restore")?;
        let (root, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
        let results = match AttachmentRecords::open(&root, &run_dir)?
            .all_kept()?
            .is_empty()
        {
            true => Vec::new(),
            false => start::daemon(global).await?.restore().await?,
        };
        if global.json {
            output::json(&results)?;
        }
        let mut status = ExitCode::SUCCESS;
        let mut is_first = true;
        for result in results {
            match (result.failure, &result.attachment) {
                (None, Some(attachment)) if !global.json => {
                    output::attached(false, attachment)?;
                }
                (None, _) => {}
                (Some(failure), _) => {
                    let error = failure.into_error();
                    let text = format!("{}: {}", result.id, error.report());
                    let _ = writeln!(std::io::stderr(), "socinbd: {}", output::plain(&text));
                    if std::mem::take(&mut is_first) {
                        status = exit::code(error.kind());
                    }
                }
            }
        }
        Ok(status)
    }
}
