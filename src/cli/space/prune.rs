//! `socinbd prune`.

use std::{process::ExitCode, time::Duration};

use clap::Args;

use super::root::Root;
use crate::{
    cli::{GlobalArgs, output, quantity},
    engine::space::prune::PruneRequest,
    error::Result,
};

/// Remove layers that nobody uses from the local disk
///
/// Without --all: the images whose reference was attached with another manifest later, and layers that no image has. What is attached, kept
/// for after a reboot, or pinned is not removed, nor a layer that it has.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd prune\n\
\x20 socinbd prune --all --older-than 14d\n\
\x20 socinbd prune --all --dry-run --json")]
pub(crate) struct PruneCommand {
    /// Remove all images that are not in use
    #[arg(long)]
    all: bool,
    /// Time since the last use, e.g. 90s, 30m, 12h or 7d
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = quantity::duration)]
    older_than: Duration,
    /// Print what would be removed
    #[arg(long)]
    dry_run: bool,
}

impl PruneCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let request = PruneRequest {
            all: self.all,
            older_than: self.older_than.as_secs(),
            dry_run: self.dry_run,
        };
        let report = Root::open(global).await?.prune(request).await?;
        output::report(global.json, &report)?;
        Ok(ExitCode::SUCCESS)
    }
}
