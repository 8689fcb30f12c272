//! `socinbd doctor`.

use std::{path::Path, process::ExitCode};

use clap::Args;

use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, output},
    error::Result,
    kernel::probe::{self, Offer},
};

/// Free space below which the state directory is too small for most images.
const LEAST_FREE: u64 = 1 << 30;

/// Report the kernel features and tools of this machine, the daemon and the space
///
/// For each that is missing, the report says what to do.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd doctor\n\
\x20 socinbd doctor --json")]
pub(crate) struct DoctorCommand {}

impl DoctorCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let mut report = probe::probe();
        report.offers.push(daemon(global).await);
        report.offers.push(space(&absolute(&global.root)?));
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

/// The daemon of the runtime directory.
async fn daemon(global: &GlobalArgs) -> Offer {
    const NAME: &str = "daemon";
    let found = match absolute(&global.run_dir) {
        Ok(run_dir) => Client::new(&run_dir).daemon().await,
        Err(error) => Err(error),
    };
    match found {
        Ok(Some(daemon)) => {
            let mut detail = format!("version {}, process {}", daemon.version, daemon.pid);
            if daemon.program.is_some_and(|program| program.is_replaced) {
                detail.push_str(
                    "; its program was replaced since it was started: `socinbd daemon --replace` starts the new one",
                );
            }
            Offer::there(NAME, detail)
        }
        Ok(None) => Offer::missing(
            NAME,
            "none runs",
            "`attach` and `run` start one; `socinbd daemon` as a service also attaches kept images after a reboot",
        ),
        Err(error) => Offer::missing(NAME, error.report(), "see its log"),
    }
}

/// The space of the state directory, or of the directory that it will be in.
fn space(root: &Path) -> Offer {
    const NAME: &str = "space";
    let place = root.ancestors().find(|directory| directory.exists());
    let place = place.unwrap_or(Path::new("/"));
    let space = match rustix::fs::statvfs(place) {
        Ok(space) => space,
        Err(error) => {
            let detail = format!("{}: {error}", place.display());
            return Offer::missing(NAME, detail, "choose another directory with --root");
        }
    };
    let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
    let free = bytes(space.f_bavail);
    let detail = format!(
        "{} of {} are free for {}",
        output::bytes(free),
        output::bytes(bytes(space.f_blocks)),
        root.display()
    );
    match free < LEAST_FREE {
        true => Offer::missing(
            NAME,
            detail,
            "layers take space as they are read: free some with `socinbd prune`, or use another directory with --root",
        ),
        false => Offer::there(NAME, detail),
    }
}
