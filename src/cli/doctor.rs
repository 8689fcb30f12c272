//! `socinbd doctor`.

use std::process::ExitCode;

use clap::Args;

use super::{Global, output};
use crate::{error::Result, kernel::probe};

/// Say what this kernel and machine offer, and what to do about what is missing
#[derive(Args)]
pub struct Doctor {}

impl Doctor {
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
        let report = probe::probe();
        if global.json {
            output::json(&report)?;
        } else {
            let rows = report.findings.iter().map(|finding| {
                let mark = if finding.available { "yes" } else { "no" };
                [
                    finding.name.clone(),
                    mark.to_owned(),
                    finding.detail.clone(),
                ]
            });
            output::table(["WHAT", "THERE", "DETAIL"], rows)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
