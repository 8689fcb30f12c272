//! `socinbd why`.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{
    layer_lines::{print_basis, print_devices, print_heading},
    snapshots,
};
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, attached::detach, output},
    engine::{
        AttachmentStatus, Explanation, FetchReport, LayerExplanation, LayerStatus, UsedIndex,
    },
    error::{Error, Kind, Result},
    layer::FetchReason,
    oci::Reference,
};

/// Files in the list of `--fetches`, at most.
const FILES: usize = 40;

/// Explain the state of an attached image and of its layers
///
/// Shows what is degraded and why, the device of each layer, and why a layer is not lazy. For a block device it shows the layer that the
/// device serves. For a snapshot of containerd it shows the layers of the snapshot and its parents; a snapshot is named by its number, its key,
/// its chain ID, or the path of a mount, e.g. the root of a container.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd why /mnt\n\
\x20 socinbd why /dev/nbd3\n\
\x20 socinbd why sha256:5f0c2a91d3b87e46a8d3c2f4e6b1907d5c3a2f1e0d9c8b7a6f5e4d3c2b1a0f9e\n\
\x20 socinbd why registry.example/app --fetches")]
pub(crate) struct WhyCommand {
    /// Mount point, ID, image, snapshot or device, e.g. dm-2
    #[arg(value_name = "MOUNTPOINT|IMAGE|SNAPSHOT|DEVICE")]
    what: String,
    /// Show which files have caused which fetches
    #[arg(long)]
    fetches: bool,
}

impl WhyCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let run_dir = absolute(&global.run_dir)?;
        let client = Client::new(&run_dir);
        let is_served = client.daemon().await?.is_some();
        let attached = detach::attached(global, &client).await?;
        if let Some(device) = device(&self.what) {
            let mut layers = match is_served {
                true => client.layers().await?,
                false => LayerStatus::without_daemon(&attached),
            };
            layers.retain(|layer| layer.devices.contains(&device));
            return match (&layers[..], global.json) {
                ([], _) => Err(Error::new(
                    Kind::NotFound,
                    format!(
                        "{} is not a device of the daemon of {}; see `socinbd list`",
                        device.display(),
                        run_dir.display()
                    ),
                )),
                (_, true) => output::json(&layers).map(|()| ExitCode::SUCCESS),
                (_, false) => layers
                    .iter()
                    .try_for_each(print_device)
                    .map(|()| ExitCode::SUCCESS),
            };
        }
        let named = Named::of(&self.what);
        let mut explanations = Vec::new();
        for status in attached.into_iter().filter(|status| named.means(status)) {
            explanations.push(match is_served {
                true => client.why(&status.attachment.id).await?,
                false => Explanation::without_daemon(status),
            });
        }
        if explanations.is_empty() {
            let all = snapshots::all(global, &client).await?;
            let named = snapshots::named(&all, &self.what)?;
            if !named.is_empty() && self.fetches {
                return Err(Error::new(
                    Kind::Unsupported,
                    "--fetches is for attached images; `socinbd why DEVICE` shows a layer of a snapshot",
                ));
            }
            if !named.is_empty() {
                match global.json {
                    true => output::json(&named)?,
                    false => named.iter().try_for_each(|chain| snapshots::print(chain))?,
                }
                return Ok(ExitCode::SUCCESS);
            }
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "{} is neither attached by the daemon of {} nor a snapshot; see `socinbd list` and `socinbd list --snapshots`, or `socinbd inspect` for an image that is not attached",
                    self.what,
                    run_dir.display()
                ),
            ));
        }
        if self.fetches {
            let mut reports = Vec::new();
            for explanation in &explanations {
                reports.push(client.fetches(&explanation.id).await?);
            }
            match global.json {
                true => output::json(&reports)?,
                false => reports.iter().try_for_each(print_fetches)?,
            }
        } else if global.json {
            output::json(&explanations)?;
        } else {
            explanations.iter().try_for_each(print)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints the layer of a device, and who uses it.
fn print_device(layer: &LayerStatus) -> Result<()> {
    print_heading(&layer.digest, layer.size, &layer.state, layer.spans)?;
    print_devices(&layer.devices)?;
    if let Some(why) = &layer.why {
        output::line(&format!("  {why}"))?;
    }
    for user in &layer.attachments {
        let place = user.mountpoint.as_ref();
        let place = place.map_or("no mount point".to_owned(), |path| {
            path.display().to_string()
        });
        output::line(&format!("  of {} on {place}", user.reference))?;
    }
    for path in &layer.mounts {
        output::line(&format!("  mounted alone at {}", path.display()))?;
    }
    Ok(())
}

/// The block device that a text names: a path, or the kernel's name.
fn device(text: &str) -> Option<PathBuf> {
    let is_kernel_name = |name: &str| {
        ["nbd", "loop", "dm-"].iter().any(|kind| {
            let number = name.strip_prefix(kind);
            number.is_some_and(|it| !it.is_empty() && it.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    if is_kernel_name(text) {
        return Some(Path::new("/dev").join(text));
    }
    let path = Path::new(text).strip_prefix("/dev").ok()?;
    let path = Path::new("/dev").join(path);
    // e.g. a link in /dev/mapper
    Some(path.canonicalize().unwrap_or(path))
}

/// The attachments that a text names: by mount point, ID or image.
pub(super) struct Named<'a>(&'a str);

impl<'a> Named<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        Self(text)
    }

    pub(super) fn means(&self, status: &AttachmentStatus) -> bool {
        let attachment = &status.attachment;
        let is_here = || {
            let place = Some(detach::place(&absolute(Path::new(self.0)).ok()?).ok()?);
            Some(attachment.mountpoint == place || status.attached_at == place)
        };
        let is_image = || {
            let reference: Reference = self.0.parse().ok()?;
            Some(reference == attachment.reference)
        };
        attachment.id == self.0 || is_here() == Some(true) || is_image() == Some(true)
    }
}

/// Prints the files whose reads have caused fetches, those that have waited longest first.
fn print_fetches(report: &FetchReport) -> Result<()> {
    /// Milliseconds of waits, fetches and their bytes.
    type Sums = (f64, u64, u64);
    const UNKNOWN: &str = "(not known)";
    let mut files: HashMap<&str, Sums> = HashMap::new();
    let mut others: Sums = (0.0, 0, 0);
    for layer in &report.layers {
        for wait in &layer.waits {
            let sums = files.entry(wait.path.as_deref().unwrap_or(UNKNOWN));
            sums.or_default().0 += wait.took_ms;
        }
        for fetch in &layer.fetches {
            let sums = match fetch.reason {
                FetchReason::Read => files
                    .entry(fetch.cause.as_deref().unwrap_or(UNKNOWN))
                    .or_default(),
                FetchReason::Ahead | FetchReason::Background => &mut others,
            };
            (sums.1, sums.2) = (sums.1 + 1, sums.2 + fetch.bytes);
        }
    }
    let mut files: Vec<(&str, Sums)> = files.into_iter().collect();
    files.sort_by(|(a, (waited_a, ..)), (b, (waited_b, ..))| {
        let order = waited_b.partial_cmp(waited_a);
        order.unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
    });
    output::line(&format!(
        "{}, in {:.1} s since the attach:",
        report.reference,
        report.age_ms as f64 / 1000.0
    ))?;
    let row = |file: &str, (waited, fetches, bytes): Sums| {
        [
            format!("{waited:.1}"),
            fetches.to_string(),
            output::bytes(bytes),
            file.to_owned(),
        ]
    };
    let shown = files
        .iter()
        .take(FILES)
        .map(|(file, sums)| row(file, *sums));
    let ahead = (others.1 > 0).then(|| row("(no read waited)", others));
    output::table(
        ["WAITED MS", "FETCHES", "FETCHED", "FILE"],
        shown.chain(ahead),
    )?;
    if let Some(more) = files.len().checked_sub(FILES).filter(|more| *more > 0) {
        output::line(&format!("and {more} more; see `socinbd report`"))?;
    }
    Ok(())
}

fn print(why: &Explanation) -> Result<()> {
    let place = why
        .mountpoint
        .as_ref()
        .map_or("no mount point".to_owned(), |path| {
            path.display().to_string()
        });
    output::line(&format!("{} on {place}: {}", why.reference, why.state))?;
    output::line(&format!("  manifest {}", why.manifest))?;
    if let Some(UsedIndex {
        digest,
        version,
        origin,
    }) = &why.index
    {
        output::line(&format!("  index {digest} (SOCI v{version}, {origin})"))?;
    }
    if let Some(compact) = &why.compact_index {
        output::line(&format!("  compact index {compact}"))?;
    }
    for warning in &why.warnings {
        output::line(&format!("  warning: {warning}"))?;
    }
    why.layers.iter().try_for_each(print_layer)
}

fn print_layer(why: &LayerExplanation) -> Result<()> {
    let layer = &why.layer;
    print_heading(&layer.digest, layer.size, &why.state, why.spans)?;
    output::line(&format!(
        "  {} {}: {}",
        layer.device,
        layer.device_path.display(),
        layer.why
    ))?;
    if why.devices.len() > 1 {
        print_devices(&why.devices)?;
    }
    print_basis(&layer.basis, &layer.table)?;
    match (why.verified, &why.check_error) {
        (Some(true), _) => output::line("  verified as a whole")?,
        (_, Some(error)) => output::line(&format!("  not verified as a whole: {error}"))?,
        (Some(false), None) => {
            output::line("  not verified as a whole yet: all spans must be present first")?;
        }
        (None, None) => {}
    }
    for reason in &why.reasons {
        output::line(&match reason.span {
            Some(span) => format!("  degraded, span {span}: {}", reason.message),
            None => format!("  degraded: {}", reason.message),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_kernel_does_or_by_their_path() {
        for (text, expected) in [
            ("nbd3", Some("/dev/nbd3")),
            ("dm-12", Some("/dev/dm-12")),
            ("/dev/loop7", Some("/dev/loop7")),
            ("/dev/nowhere/x", Some("/dev/nowhere/x")),
            ("loop", None),
            ("nbd3p1", None),
            ("dm-", None),
            ("/devices/nbd3", None),
            ("nginx:1.27", None),
        ] {
            assert_eq!(device(text), expected.map(PathBuf::from), "{text}");
        }
    }
}
