//! The whole screen of a terminal, for commands that show what changes: `top`, `list --watch`.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Read as _, Write as _},
    time::Duration,
};

use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    cli::output,
    error::{Kind, Result, ResultExt as _},
};

/// Columns and rows where the terminal does not say.
const USUAL: (usize, usize) = (80, 24);

/// A colour. A text is never told by its colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Heading,
    Good,
    Busy,
    Bad,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Heading => "\x1b[1m",
            Self::Good => "\x1b[32m",
            Self::Busy => "\x1b[33m",
            Self::Bad => "\x1b[31m",
        }
    }
}

/// A line of parts with a style each.
pub(super) type Line = Vec<(Style, String)>;

/// A line of one part.
pub(super) fn line(style: Style, text: impl Into<String>) -> Line {
    vec![(style, text.into())]
}

/// Shows frames until the user quits with `q`, or the terminal ends. `frame` is asked for the lines of a terminal of so many columns and
/// rows, each time after `interval`, and when the terminal has another size. Signals end the command as any other one; in all cases the
/// terminal is as it was before.
pub(super) async fn show(
    interval: Duration,
    mut frame: impl AsyncFnMut((usize, usize)) -> Result<Vec<Line>>,
) -> Result<()> {
    let context = || "setting up the terminal".to_owned();
    let screen = Screen::open().or_kind(Kind::Io, context)?;
    let mut resized = signal(SignalKind::window_change()).or_kind(Kind::Io, context)?;
    let mut keys = keys().or_kind(Kind::Io, context)?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = resized.recv() => {}
            // Ctrl-D quits too; `None`: the terminal has ended
            key = keys.recv() => match key {
                None | Some(b'q' | b'Q' | 4) => return Ok(()),
                Some(_) => continue,
            },
        }
        let size = size();
        let lines = frame(size).await?;
        if screen.draw(&lines, size).is_err() {
            return Ok(()); // the terminal has ended
        }
    }
}

/// Whether both directions are a terminal.
pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

fn size() -> (usize, usize) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            (usize::from(size.ws_col), usize::from(size.ws_row))
        }
        _ => USUAL,
    }
}

/// The keys that are pressed. A thread reads them, because a read of a terminal blocks; it ends with the process.
fn keys() -> io::Result<mpsc::Receiver<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            let mut key = [0];
            while let Ok(1) = io::stdin().read(&mut key) {
                if sender.blocking_send(key[0]).is_err() {
                    return;
                }
            }
        })?;
    Ok(receiver)
}

/// The terminal, with another screen than that of the shell. When it is dropped, the terminal is as before.
struct Screen {
    before: Termios,
    has_colour: bool,
}

impl Screen {
    fn open() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut modes = before.clone();
        // keys come at once and are not shown; Ctrl-C is a signal still, and Ctrl-Z would leave this screen in the shell
        modes
            .local_modes
            .remove(LocalModes::ICANON | LocalModes::ECHO);
        modes.special_codes[SpecialCodeIndex::VSUSP] = 0;
        modes.special_codes[SpecialCodeIndex::VMIN] = 1;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(io::stdin(), OptionalActions::Now, &modes)?;
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let screen = Self {
            before,
            has_colour: !no_colour,
        };
        // another screen, without a cursor and without line wrap
        write("\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        Ok(screen)
    }

    fn draw(&self, lines: &[Line], (columns, rows): (usize, usize)) -> io::Result<()> {
        let mut text = String::from("\x1b[H");
        for (number, line) in lines.iter().take(rows).enumerate() {
            if number > 0 {
                text.push_str("\r\n");
            }
            text.push_str(&drawn(line, columns, self.has_colour));
            text.push_str("\x1b[K");
        }
        text.push_str("\x1b[J");
        write(&text)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // errors: the terminal has ended
        let _ = write("\x1b[?7h\x1b[?25h\x1b[?1049l");
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A line as it is written, of at most so many columns. Control characters of names are escaped.
fn drawn(line: &Line, columns: usize, has_colour: bool) -> String {
    let mut drawn = String::new();
    let mut left = columns;
    for (style, text) in line {
        let text = output::plain(text)
            .replace('\n', "\\n")
            .replace('\t', "\\t");
        let text: String = text.chars().take(left).collect();
        left -= text.chars().count(); // at most `left`
        match has_colour && *style != Style::Plain {
            true => write!(drawn, "{}{text}\x1b[0m", style.code()).unwrap_or_default(), // to a String
            false => drawn.push_str(&text),
        }
    }
    drawn
}

/// A text in exactly so many columns: cut with an ellipsis, or filled with spaces.
pub(super) fn fit(text: &str, columns: usize) -> String {
    let length = text.chars().count();
    if length <= columns {
        return format!("{text:columns$}");
    }
    let kept = columns.saturating_sub(1);
    let mut cut: String = text.chars().take(kept).collect();
    cut.extend((columns > 0).then_some('…'));
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut_at_the_width_and_has_no_control_characters() {
        let line = vec![
            (Style::Plain, "ab\x1b[2J\n".to_owned()),
            (Style::Bad, "c".repeat(100)),
        ];
        let plain = drawn(&line, 20, false);
        assert_eq!(plain.chars().count(), 20);
        assert!(!plain.chars().any(char::is_control), "{plain:?}");
        let coloured = drawn(&line, 20, true);
        assert_eq!(coloured.matches("\x1b[").count(), 2, "{coloured:?}");
        assert_eq!(drawn(&line, 1, true), "a\x1b[31m\x1b[0m");
    }

    #[test]
    fn a_text_fits_its_columns() {
        assert_eq!(fit("abc", 5), "abc  ");
        assert_eq!(fit("abc", 3), "abc");
        assert_eq!(fit("abc", 2), "a…");
        assert_eq!(fit("abc", 1), "…");
        assert_eq!(fit("abc", 0), "");
        assert_eq!(fit("äöü", 3), "äöü");
    }
}
