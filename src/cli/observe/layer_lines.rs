//! The lines about a layer that `why` prints of attachments, devices and snapshots.

use std::{fmt, path::PathBuf};

use crate::{cli::output, engine::DiskBasis, error::Result, oci::Digest};

/// Prints a layer with its state and its spans.
pub(super) fn print_heading(
    digest: &Digest,
    size: u64,
    state: &impl fmt::Display,
    spans: Option<(u32, u32)>,
) -> Result<()> {
    let spans = match spans {
        Some((present, all)) if all > 0 => format!(", {present} of {all} spans present"),
        _ => String::new(),
    };
    let size = output::bytes(size);
    output::line(&format!("layer {digest} ({size}): {state}{spans}"))
}

/// Prints the device that is mounted, and the one that its reads go to.
pub(super) fn print_devices(devices: &[PathBuf]) -> Result<()> {
    let names: Vec<_> = devices
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    match &names[..] {
        [] => Ok(()),
        [one] => output::line(&format!("  device {one}")),
        [mounted, rest @ ..] => output::line(&format!(
            "  device {mounted}, whose reads go to {}",
            rest.join(", ")
        )),
    }
}

/// Prints how the disk of a layer was made.
pub(super) fn print_basis(basis: &DiskBasis, table: &Digest) -> Result<()> {
    output::line(&match basis {
        DiskBasis::Compact => format!("  lazy, with compact table {table}"),
        DiskBasis::Ztoc => format!("  lazy, with zTOC {table}"),
        DiskBasis::Verified => "  complete, from an earlier attach".to_owned(),
        DiskBasis::Whole { why } => format!("  downloaded whole: {why}"),
    })
}
