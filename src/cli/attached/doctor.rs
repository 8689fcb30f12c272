//! `socinbd doctor`.

use std::process::ExitCode;

use clap::Args;

use crate::{
    cli::{GlobalArgs, output},
    error::Result,
    kernel::probe,
};

/// Report the kernel features and tools of this machine
///
/// For each that is missing, the report says what to do.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd doctor\n\
\x20 socinbd doctor --json")]
pub(crate) struct DoctorCommand {}

impl DoctorCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let report = probe::probe();
        if global.json {
            output::json(&report)?;
        } else {
            let rows = report.offers.iter().map(|offer| {
                let mark = if offer.available { "yes" } else { "no" };
                let detail = match &offer.advice {
                    Some(advice) => format!("{}: {advice}", offer.detail),
                    None => offer.detail.clone(),
                };
                [offer.name.clone(), mark.to_owned(), detail]
            });
            output::line(&format!("Linux {} on {}", report.kernel, report.machine))?;
            output::table(["FEATURE", "AVAILABLE", "DETAIL"], rows)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
