//! `socinbd install` and `socinbd uninstall`: containerd of a node uses the snapshotter, and back.

mod containerd;
mod distribution;
mod plan;
mod record;
mod root;
mod service;
mod settings;
mod steps;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use self::{
    containerd::{Containerd, Version},
    plan::{Plan, services_of},
    record::{RECORD, Record},
    root::Root,
    steps::{Report, Step},
};
use super::{GlobalArgs, absolute, output};
use crate::error::{Error, Kind, Result};

/// Make containerd use the snapshotter
///
/// Changes containerd's configuration (1.6 and later, before 3.0), writes units of systemd, restarts containerd, and checks that it has the
/// plugin `soci`. If the check fails, all is as before. Nothing else in the configuration changes; `uninstall` restores it. A second
/// installation changes what differs.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd install --dry-run\n\
\x20 socinbd install\n\
\x20 socinbd install --root-dir /mnt/image --containerd-version 2.3")]
pub(super) struct InstallCommand {
    /// Root directory of the node
    ///
    /// Other than /, e.g. that of an image, nothing is started or restarted, and this program is copied to /usr/local/bin if /usr/bin has
    /// none.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root_dir: PathBuf,
    /// Show what would change
    #[arg(long)]
    dry_run: bool,
    /// Restart neither the daemon nor containerd
    #[arg(long)]
    no_restart: bool,
    /// Replace another plugin `soci` or another snapshotter of CRI
    ///
    /// `uninstall` brings them back.
    #[arg(long)]
    replace: bool,
    /// Configuration file of containerd
    ///
    /// A path in the root directory. Default: that of its unit, or that of k3s or RKE2, or /etc/containerd/config.toml.
    #[arg(long, value_name = "FILE")]
    containerd_config: Option<PathBuf>,
    /// Version of containerd, if it cannot be asked
    #[arg(long, value_name = "VERSION")]
    containerd_version: Option<Version>,
}

/// Restore the configuration of containerd
///
/// Takes back what `install` has changed. What was changed by hand since then stays. Exit status 6: the snapshotter has snapshots: remove their
/// containers and images first.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd uninstall --dry-run\n\
\x20 socinbd uninstall")]
pub(super) struct UninstallCommand {
    /// Root directory of the node
    #[arg(long, value_name = "DIR", default_value = "/")]
    root_dir: PathBuf,
    /// Show what would change
    #[arg(long)]
    dry_run: bool,
    /// Restart neither the daemon nor containerd
    #[arg(long)]
    no_restart: bool,
    /// Uninstall although there are snapshots
    ///
    /// containerd does not find the layers of their images any more: pull these again.
    #[arg(long)]
    force: bool,
}

impl InstallCommand {
    pub(super) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let root = Root::open(&absolute(&self.root_dir)?)?;
        let old = Record::read(&root, Path::new(RECORD))?;
        let containerd = Containerd::find(&root, self.containerd_config.as_deref())?;
        let programs = containerd.programs(&root);
        let version = match self.containerd_version {
            Some(version) => version,
            None => installed_version(&root, programs.as_deref()).await?,
        };
        let version = version.check()?;
        let replaces = self.replace;
        let plan = Plan::new(global, &root, old.as_ref(), &containerd, version, replaces)?;
        let mut report = Report {
            dry_run: self.dry_run,
            program: plan.copied_program(&root),
            files: plan.steps(&root, old.as_ref())?,
            notes: plan.warnings.clone(),
        };
        let is_changed = !report.files.is_empty() || report.program.is_some();
        let restarts = root.is_host() && !self.no_restart && service::has_systemd();
        if !restarts && is_changed {
            report.notes.push(format!(
                "to do: `systemctl daemon-reload`, `systemctl restart socinbd`, {}, in this order",
                service::restarts(&plan.services())
            ));
        }
        if !self.dry_run {
            let daemon = match restarts {
                true => service::daemon().await?,
                false => None,
            };
            plan.write(&root, old.as_ref(), &report)?;
            if restarts {
                let ctr = programs.map(|folder| folder.join("ctr"));
                let ctr = ctr.filter(|ctr| root.exists(ctr)).unwrap_or("ctr".into());
                let is_current = daemon.is_some_and(|it| service::runs(it, &plan.own));
                let started = start(&plan, &ctr, is_changed, is_current).await;
                if let Err(error) = started {
                    let was = Before {
                        record: old.as_ref(),
                        daemon,
                    };
                    return Err(take_back(&root, was, &plan, &report, error).await);
                }
                if !is_changed && !is_current {
                    let note = "the daemon was started anew: it did not run this program";
                    report.notes.push(note.to_owned());
                }
                report
                    .notes
                    .push("containerd has the plugin soci".to_owned());
            }
        }
        output::report(global.json, &report)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What was there before an installation.
struct Before<'a> {
    record: Option<&'a Record>,
    /// The process of the daemon.
    daemon: Option<u32>,
}

/// Starts the daemon and containerd anew if something has changed, and checks that they know each other. A daemon that does not run this
/// program, but e.g. one that was replaced since, is started anew in any case.
async fn start(plan: &Plan, ctr: &Path, is_changed: bool, is_current: bool) -> Result<()> {
    if is_changed || !is_current {
        service::restart_daemon().await?;
        service::answers(Path::new(&plan.socket)).await?;
    }
    if is_changed {
        service::restart_containerd(&plan.services()).await?;
    }
    service::check(ctr, &plan.address).await
}

/// Restores everything after a start that has failed, and returns the error with what was done about it.
async fn take_back(
    root: &Root,
    was: Before<'_>,
    plan: &Plan,
    report: &Report,
    error: Error,
) -> Error {
    let restore = async || {
        let mut daemon = Ok(());
        if was.daemon.is_none() {
            // while its unit is there
            daemon = service::forget_daemon().await;
        }
        plan.take_back(root, was.record, &report.files)?;
        if was.daemon.is_some() {
            daemon = service::restart_daemon().await;
        }
        service::restart_containerd(&plan.services()).await?;
        daemon
    };
    match restore().await {
        Ok(()) => error.context("containerd does not use the snapshotter; its configuration was restored"),
        Err(other) => error.context(format!(
            "containerd does not use the snapshotter, and its configuration was not restored ({}): run `socinbd uninstall`",
            other.report()
        )),
    }
}

impl UninstallCommand {
    pub(super) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let root = Root::open(&absolute(&self.root_dir)?)?;
        let mut report = Report {
            dry_run: self.dry_run,
            ..Report::default()
        };
        let Some(record) = Record::read(&root, Path::new(RECORD))? else {
            output::report(global.json, &report)?;
            return Ok(ExitCode::SUCCESS);
        };
        let snapshots = count_snapshots(&root, &absolute(&global.root)?);
        if snapshots > 0 && !self.force {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{snapshots} snapshots of containerd: remove their containers and images first (`ctr --namespace k8s.io images ls`), or give --force"
                ),
            ));
        }
        report.files = removal(&root, &record)?;
        let restarts = root.is_host() && !self.no_restart && service::has_systemd();
        let services = services_of(&record.files);
        if !restarts {
            report.notes.push(format!(
                "to do: `systemctl daemon-reload`, {}, `systemctl stop socinbd`, in this order",
                service::restarts(&services)
            ));
        }
        if !self.dry_run {
            for edited in record.files.iter().filter(|file| file.settings.is_empty()) {
                let now = root.read(&edited.path)?;
                if edited.is_edited(now.as_deref()) {
                    let saved = PathBuf::from(format!("{}.saved", edited.path.display()));
                    root.write(&saved, now.unwrap_or_default().as_bytes(), 0o644)?;
                    report
                        .notes
                        .push(format!("changes by hand: {}", saved.display()));
                }
            }
            for step in &report.files {
                step.run(&root)?;
            }
            if restarts {
                service::restart_containerd(&services).await?;
                service::stop_daemon().await?;
            }
            if let Some(program) = &record.program {
                root.remove(program)?;
            }
            root.remove(Path::new(RECORD))?;
            for directory in record.directories.iter().rev() {
                // it may be in use by now
                let _ = root.remove(directory);
            }
        }
        output::report(global.json, &report)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The steps that take an installation back: containerd's configuration first.
fn removal(root: &Root, record: &Record) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for file in record.files.iter().rev() {
        let now = root.read(&file.path)?;
        steps.push(Step {
            path: file.path.clone(),
            wanted: record.without(&file.path, now.clone())?,
            now,
        });
    }
    steps.retain(Step::is_change);
    Ok(steps)
}

/// The snapshots of containerd below a state directory.
fn count_snapshots(root: &Root, state: &Path) -> usize {
    let sets = state.join("snapshots");
    let of_set = |set: String| {
        let names = root.names(&sets.join(set));
        names
            .iter()
            .filter(|name| name.parse::<u64>().is_ok())
            .count()
    };
    root.names(&sets).into_iter().map(of_set).sum()
}

/// Asks the containerd of the root directory for its version.
async fn installed_version(root: &Root, programs: Option<&Path>) -> Result<Version> {
    let Some(program) = programs.map(|folder| folder.join("containerd")) else {
        let what = format!(
            "{}: containerd is not installed: install it first, or give --containerd-version",
            root.path().display()
        );
        return Err(Error::new(Kind::NotFound, what));
    };
    let output = match root.is_host() {
        true => service::output(&program, &["--version"]).await?,
        false => {
            let folder = root.path().display().to_string();
            let program = program.display().to_string();
            service::output(Path::new("chroot"), &[&folder, &program, "--version"]).await?
        }
    };
    let said = String::from_utf8_lossy(&output.stdout);
    Version::of_output(&said).ok_or_else(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        let what = format!(
            "{} --version: {}: give --containerd-version",
            program.display(),
            [said.trim(), error.trim()].join(" ").trim()
        );
        Error::new(Kind::Unsupported, what)
    })
}
