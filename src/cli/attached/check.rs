//! `socinbd check`.

use std::{collections::HashSet, process::ExitCode};

use clap::Args;

use crate::{
    api::client::Client,
    cli::{AccessArgs, GlobalArgs, absolute, exit::REPAIRED, output, progress::ProgressBars},
    engine::{
        Disks, Image,
        examine::check::{self, CheckEvent, CheckRequest},
    },
    error::{Error, Kind, Result},
    layer::ScrubReport,
    oci::{Digest, Platform, Reference},
    source::Source,
};

/// Verify layer disks against their checksums, and repair them
///
/// Reads the disks, attached or not, complete or not, and compares them with the checksums that were written with the data. Damaged spans
/// are fetched again and written to the same disk, so mounts stay. Pages that the kernel has cached stay as they are until the image is
/// detached or the caches are dropped.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd check --all\n\
\x20 socinbd check registry.example/app:1\n\
\x20 socinbd check sha256:6a5d... --json\n\n\
Exit status:\n\
\x20 0   no damage\n\
\x20 7   damage is left\n\
\x20 10  damage was found and repaired")]
pub(crate) struct CheckCommand {
    /// Digest of a layer, or an image reference
    #[arg(value_name = "LAYER|IMAGE", required_unless_present = "all")]
    what: Option<String>,
    /// Check all disks of the state directory
    #[arg(long, conflicts_with = "what")]
    all: bool,
    /// Platform, e.g. linux/arm64 [default: the host's]
    #[arg(long, short, value_name = "PLATFORM")]
    platform: Option<Platform>,
    #[command(flatten)]
    access: AccessArgs,
}

impl CheckCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let request = CheckRequest {
            layers: self.layers().await?,
        };
        let progress = ProgressBars::new(global.json);
        let reports = std::sync::Mutex::new(Vec::new());
        let event = |event| match event {
            CheckEvent::Reading { layer, done, size } => progress.layer(layer, done, size),
            CheckEvent::Checked(report) => {
                progress.layer(report.layer, 1, 1);
                let mut reports = reports
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                reports.push(report);
            }
        };
        let client = Client::new(&absolute(&global.run_dir)?);
        let root = absolute(&global.root)?;
        // the daemon reports its root without symlinks
        let root = root.canonicalize().unwrap_or(root);
        match client.daemon().await? {
            Some(daemon) if daemon.root == root => client.check(&request, &event).await?,
            _ if !root.is_dir() => {}
            // the lock of the root keeps other processes out
            _ => check::check(Disks::open(&root)?.store(), &request, &event).await?,
        }
        progress.finish();
        let reports = reports
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if reports.is_empty() && !self.all {
            let what = self.what.unwrap_or_default();
            let context = format!("there is no disk of {what} in {}", root.display());
            return Err(Error::new(Kind::NotFound, context));
        }
        match global.json {
            true => output::json(&reports)?,
            false => reports.iter().try_for_each(print)?,
        }
        Ok(status(&reports))
    }

    /// The layers to check; `None`: all.
    async fn layers(&self) -> Result<Option<HashSet<Digest>>> {
        let Some(what) = &self.what else {
            return Ok(None);
        };
        if let Ok(layer) = what.parse::<Digest>() {
            return Ok(Some(HashSet::from([layer])));
        }
        let reference: Reference = what.parse()?;
        let source = Source::open(&reference, &self.access.access()?).await?;
        let image = Image::resolve(&source, self.platform.as_ref()).await?;
        Ok(Some(
            image.layers.iter().map(|layer| layer.digest).collect(),
        ))
    }
}

fn status(reports: &[ScrubReport]) -> ExitCode {
    if reports.iter().any(|report| !report.wrong.is_empty()) {
        return crate::cli::exit::code(Kind::Corrupt);
    }
    match reports.iter().all(ScrubReport::is_sound) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(REPAIRED),
    }
}

fn print(report: &ScrubReport) -> Result<()> {
    let found = match (report.wrong.is_empty(), report.repaired.is_empty()) {
        (true, true) => "no damage",
        (true, false) => "repaired",
        (false, _) => "damaged",
    };
    let bytes = output::bytes(report.bytes);
    output::line(&format!("{}  {bytes} read  {found}", report.layer))?;
    for what in report.repaired.iter().chain(&report.wrong) {
        output::line(&format!("  {what}"))?;
    }
    Ok(())
}
