//! The output of commands on standard output. A reader that closes the pipe early is not an error.

use std::{
    borrow::Cow,
    io::{self, ErrorKind, Write},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};

use crate::{
    engine::Attachment,
    error::{Kind, Result, ResultExt},
};

/// Standard output, for content that is written in pieces.
#[derive(Default)]
pub(super) struct StdoutPipe {
    /// Whether the reader has closed it.
    is_closed: bool,
}

impl Write for StdoutPipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stdout().write(bytes);
        self.is_closed |= matches!(&written, Err(error) if error.kind() == ErrorKind::BrokenPipe);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = io::stdout().flush();
        self.is_closed |= matches!(&flushed, Err(error) if error.kind() == ErrorKind::BrokenPipe);
        flushed
    }
}

impl StdoutPipe {
    /// The result of writing to it. It is not an error that the reader has closed it.
    pub(super) fn end<T>(self, written: Result<T>) -> Result<()> {
        match self.is_closed {
            true => Ok(()),
            false => written.map(drop),
        }
    }
}

/// Prints one line.
pub(super) fn line(text: &str) -> Result<()> {
    print(format!("{}\n", plain(text)).as_bytes())
}

/// Escapes control characters: names and messages come from registries, images and directories, and a terminal must not interpret them.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    let is_plain = |letter: char| !letter.is_control() || matches!(letter, '\n' | '\t');
    match text.chars().all(is_plain) {
        true => Cow::Borrowed(text),
        false => {
            let escaped = |letter: char| match is_plain(letter) {
                true => letter.to_string(),
                false => letter.escape_default().to_string(),
            };
            Cow::Owned(text.chars().map(escaped).collect())
        }
    }
}

/// Prints a report, as lines or as JSON.
pub(super) fn report<T: serde::Serialize + std::fmt::Display>(
    as_json: bool,
    report: &T,
) -> Result<()> {
    match as_json {
        true => json(report),
        false => line(&report.to_string()),
    }
}

/// Prints a text as it is. Names in it are escaped already.
pub(super) fn text(text: &str) -> Result<()> {
    print(text.as_bytes())
}

/// Prints a value as indented JSON.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    text(&json_text(value)?)
}

/// A value as indented JSON, with a newline.
pub(super) fn json_text<T: serde::Serialize>(value: &T) -> Result<String> {
    let text = serde_json::to_string_pretty(value).or_kind(Kind::Io, || "writing JSON".into())?;
    Ok(text + "\n")
}

/// A value as one line of JSON, with a newline.
pub(super) fn json_line<T: serde::Serialize>(value: &T) -> Result<String> {
    let text = serde_json::to_string(value).or_kind(Kind::Io, || "writing JSON".into())?;
    Ok(text + "\n")
}

/// Whether the reader of standard output has gone, so that nothing needs to be printed any more.
pub(super) fn is_closed() -> bool {
    let out = io::stdout();
    let mut fds = [PollFd::new(&out, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // an error: it is not known, and a write tells
    let polled = poll(&mut fds, Some(&now));
    polled.is_ok() && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

/// Prints rows in columns, under a heading.
pub(super) fn table<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Result<()> {
    text(&table_text(heading, rows))
}

/// Rows in columns, under a heading.
pub(super) fn table_text<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let cell = |text: String| plain(&text).replace('\n', "\\n").replace('\t', "\\t");
    let rows: Vec<[String; N]> = std::iter::once(heading.map(str::to_owned))
        .chain(rows)
        .map(|row| row.map(cell))
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
    text
}

/// Formats a number of bytes with a binary unit, e.g. `3.2 MiB`.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Prints an attached image.
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
