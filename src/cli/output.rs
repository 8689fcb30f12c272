//! The output of commands on standard output. A reader that closes the pipe early is not an error.

use std::io::{self, ErrorKind, Write};

use crate::{
    engine::Attachment,
    error::{Kind, Result, ResultExt},
};

/// One line.
pub(super) fn line(text: &str) -> Result<()> {
    print(format!("{text}\n").as_bytes())
}

/// A report, as lines or as JSON.
pub(super) fn report<T: serde::Serialize + std::fmt::Display>(
    as_json: bool,
    report: &T,
) -> Result<()> {
    match as_json {
        true => json(report),
        false => line(&report.to_string()),
    }
}

/// A value as indented JSON.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).or_kind(Kind::Io, || "writing JSON".into())?;
    bytes.push(b'\n');
    print(&bytes)
}

/// Rows under a heading, in columns.
pub(super) fn table<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Result<()> {
    let rows: Vec<[String; N]> = std::iter::once(heading.map(str::to_owned))
        .chain(rows)
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    print(text.as_bytes())
}

/// Bytes with a binary unit, e.g. `3.2 MiB`.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// An attached image.
pub(super) fn attached(as_json: bool, attachment: &Attachment) -> Result<()> {
    for warning in &attachment.warnings {
        tracing::warn!("{warning}");
    }
    if as_json {
        return json(attachment);
    }
    let mountpoint = attachment
        .mountpoint
        .as_ref()
        .map_or("-".to_owned(), |path| path.display().to_string());
    line(&format!(
        "{} is mounted on {mountpoint}",
        attachment.reference
    ))
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).or_kind(Kind::Io, || "writing to standard output".into())
        }
        _ => Ok(()),
    }
}
