//! `socinbd log-level`.

use std::process::ExitCode;

use clap::Args;

use crate::{
    api::{client::Client, control::LogFilter},
    cli::{GlobalArgs, absolute, log, output},
    error::Result,
};

/// Show or change the log filter of the running daemon
///
/// The change lasts until the daemon reads its configuration again, or another daemon follows it.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd log-level debug\n\
\x20 socinbd log-level info,socinbd::source=trace\n\
\x20 socinbd log-level")]
pub(crate) struct LogLevelCommand {
    /// Log filter, e.g. info or socinbd=debug [default: only show it]
    #[arg(value_parser = log::filter)]
    filter: Option<String>,
}

impl LogLevelCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let client = Client::new(&absolute(&global.run_dir)?);
        client.running_daemon().await?;
        let filter = match self.filter {
            Some(filter) => client.set_log_filter(&LogFilter { filter }).await?,
            None => client.log_filter().await?,
        };
        match global.json {
            true => output::json(&filter)?,
            false => output::line(&filter.filter)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
