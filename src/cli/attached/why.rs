//! `socinbd why`.

use std::{path::Path, process::ExitCode};

use clap::Args;

use super::detach;
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, output},
    engine::{AttachmentStatus, DiskBasis, Explanation, LayerExplanation, UsedIndex},
    error::{Error, Kind, Result},
    oci::Reference,
};

/// Explain the state of an attached image and of its layers
///
/// Shows what is degraded and why, the device of each layer, and why a layer is not lazy.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd why /mnt\n\
\x20 socinbd why registry.example/app --json")]
pub(crate) struct WhyCommand {
    /// Mount point, ID of the attachment, or image reference
    #[arg(value_name = "MOUNTPOINT|IMAGE")]
    what: String,
}

impl WhyCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let run_dir = absolute(&global.run_dir)?;
        let client = Client::new(&run_dir);
        let is_served = client.daemon().await?.is_some();
        let attached = detach::attached(global, &client).await?;
        let mut explanations = Vec::new();
        for AttachmentStatus { attachment, .. } in attached.into_iter().filter(|it| self.means(it))
        {
            explanations.push(if is_served {
                client.why(&attachment.id).await?
            } else {
                Explanation::dead(attachment)
            });
        }
        if explanations.is_empty() {
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "{} is not attached by the daemon of {}; see `socinbd list`, or `socinbd inspect` for an image that is not attached",
                    self.what,
                    run_dir.display()
                ),
            ));
        }
        if global.json {
            output::json(&explanations)?;
        } else {
            explanations.iter().try_for_each(print)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn means(&self, status: &AttachmentStatus) -> bool {
        let attachment = &status.attachment;
        let is_here = || {
            let place = Some(detach::place(&absolute(Path::new(&self.what)).ok()?).ok()?);
            Some(attachment.mountpoint == place || status.attached_at == place)
        };
        let is_image = || {
            let reference: Reference = self.what.parse().ok()?;
            Some(reference == attachment.reference)
        };
        attachment.id == self.what || is_here() == Some(true) || is_image() == Some(true)
    }
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
    let spans = match why.spans {
        Some((present, all)) if all > 0 => format!(", {present} of {all} spans present"),
        _ => String::new(),
    };
    output::line(&format!(
        "layer {} ({}): {}{spans}",
        layer.digest,
        output::bytes(layer.size),
        why.state
    ))?;
    output::line(&format!(
        "  {} {}: {}",
        layer.device,
        layer.device_path.display(),
        layer.why
    ))?;
    output::line(&match &layer.basis {
        DiskBasis::Compact => format!("  lazy, with compact table {}", layer.table),
        DiskBasis::Ztoc => format!("  lazy, with zTOC {}", layer.table),
        DiskBasis::Verified => "  complete, from an earlier attach".to_owned(),
        DiskBasis::Whole { why } => format!("  downloaded whole: {why}"),
    })?;
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
