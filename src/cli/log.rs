//! The log: on standard error, or, for a daemon that was started by a command, in a file of limited size.
//!
//! A program that keeps reading an unreadable file makes the daemon log the same line over and over. So long-running processes count
//! repeated lines and write the count once a minute.
//!
//! The filter and the format can be changed while the process runs.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal as _, Write},
    num::NonZeroUsize,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    layer::{Layered, SubscriberExt as _},
    reload,
    util::SubscriberInitExt as _,
};

use crate::error::{Error, Kind, Result, ResultExt};

/// Time in which repeated lines are counted.
const REPEAT_TIME: Duration = Duration::from_secs(60);
/// Maximum number of lines in that time that differ only in numbers.
const BURST: u32 = 5;
/// Maximum number of different lines that are tracked.
const MAX_LINES: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Maximum size of the log file in bytes. One older file is kept. The directory may be in memory.
const FILE_BYTES: u64 = 1 << 20;
/// Interval in which counts are checked for their age.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum length of a filter in bytes.
const MAX_FILTER: usize = 4096;

/// The format of the log's lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object for each line.
    Json,
}

impl LogFormat {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }

    fn lines(self, is_colored: bool) -> Lines {
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(|| LogLines)
            .with_ansi(is_colored && self == Self::Text);
        match self {
            Self::Text => lines.boxed(),
            Self::Json => lines.json().flatten_event(true).boxed(),
        }
    }
}

type Filtered = Layered<reload::Layer<EnvFilter, Registry>, Registry>;
type Lines = Box<dyn Layer<Filtered> + Send + Sync>;

/// What can be changed while the process runs.
struct Changeable {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: reload::Handle<Lines, Filtered>,
    is_colored: bool,
}

static CHANGEABLE: OnceLock<Changeable> = OnceLock::new();

static LOG: Mutex<Option<Log>> = Mutex::new(None);

struct Log {
    sink: LogSink,
    /// `None` for a process that exits by itself.
    repeats: Option<RepeatedLines>,
}

enum LogSink {
    Stderr,
    File(BoundedFile),
    /// The file of another process, which bounds it and may put it aside at any moment.
    Shared(PathBuf),
}

/// Starts the log of this process. A process that lasts counts repeated lines. The file may be one that another process writes too.
pub(super) fn start(
    filter: &str,
    format: LogFormat,
    file: Option<&Path>,
    is_shared: bool,
    is_lasting: bool,
) -> Result<()> {
    let sink = match file {
        Some(path) => {
            let opened = BoundedFile::open(path.to_owned(), FILE_BYTES);
            let file =
                opened.or_kind(Kind::Io, || format!("opening the log {}", path.display()))?;
            // the standard error of a daemon is /dev/null once it is ready
            std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
            match is_shared {
                true => LogSink::Shared(file.path),
                false => LogSink::File(file),
            }
        }
        None => LogSink::Stderr,
    };
    let is_colored = matches!(sink, LogSink::Stderr) && io::stderr().is_terminal();
    with_log(|log| {
        *log = Some(Log {
            sink,
            repeats: is_lasting.then(RepeatedLines::default),
        });
    });
    let (filter, filter_handle) = reload::Layer::new(env_filter(filter)?);
    let (lines, lines_handle) = reload::Layer::new(format.lines(is_colored));
    let _ = CHANGEABLE.set(Changeable {
        filter: filter_handle,
        lines: lines_handle,
        is_colored,
    });
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    Ok(())
}

/// Checks a filter: the value parser of `--log`.
pub(super) fn filter(text: &str) -> Result<String, String> {
    match env_filter(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.report()),
    }
}

fn env_filter(text: &str) -> Result<EnvFilter> {
    if text.len() > MAX_FILTER {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("a log filter has at most {MAX_FILTER} bytes"),
        ));
    }
    EnvFilter::try_new(text).or_kind(Kind::InvalidArgument, || {
        "a log filter is a level (error, warn, info, debug, trace) or a list like socinbd=debug,warn"
            .into()
    })
}

/// Changes the filter and the format.
pub(super) fn change(filter: &str, format: LogFormat) -> Result<()> {
    change_filter(filter)?;
    let Some(changeable) = CHANGEABLE.get() else {
        return Ok(());
    };
    let lines = format.lines(changeable.is_colored);
    let changed = changeable.lines.reload(lines);
    changed.or_kind(Kind::Io, || "changing the format of the log".into())
}

/// Changes the filter.
pub(super) fn change_filter(text: &str) -> Result<()> {
    let filter = env_filter(text)?;
    let Some(changeable) = CHANGEABLE.get() else {
        return Ok(());
    };
    let changed = changeable.filter.reload(filter);
    changed.or_kind(Kind::Io, || "changing the filter of the log".into())
}

/// The filter that counts now.
pub(super) fn current_filter() -> String {
    let filter = CHANGEABLE
        .get()
        .and_then(|changeable| changeable.filter.with_current(ToString::to_string).ok());
    filter.unwrap_or_default()
}

/// Writes counts when they are old enough, as long as the process runs.
pub(super) async fn keep_counting() {
    loop {
        tokio::time::sleep(EXPIRE_INTERVAL).await;
        with_log(|log| {
            log.iter_mut()
                .for_each(|log| log.expire(Some(Instant::now())))
        });
    }
}

/// Writes the counts when the process exits.
pub(super) fn end() {
    with_log(|log| log.iter_mut().for_each(|log| log.expire(None)));
}

/// Detaches from the standard error of the parent, if there is a log file: the parent has been told everything it needs.
pub(super) fn detach_from_stderr() -> Result<()> {
    if !with_log(|log| {
        matches!(
            log,
            Some(Log {
                sink: LogSink::File(_) | LogSink::Shared(_),
                ..
            })
        )
    }) {
        return Ok(());
    }
    let nowhere = OpenOptions::new().write(true).open("/dev/null");
    nowhere
        .and_then(|nowhere| Ok(rustix::stdio::dup2_stderr(nowhere)?))
        .or_kind(Kind::Io, || "opening /dev/null".into())
}

fn with_log<T>(work: impl FnOnce(&mut Option<Log>) -> T) -> T {
    work(&mut LOG.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Log {
    fn line(&mut self, line: &str) {
        match &mut self.repeats {
            Some(repeats) => {
                let lines = repeats.line(line, Instant::now());
                lines.iter().for_each(|line| self.sink.write(line));
            }
            None => self.sink.write(line),
        }
    }

    fn expire(&mut self, now: Option<Instant>) {
        let lines = self.repeats.as_mut().map(|repeats| repeats.expire(now));
        lines
            .iter()
            .flatten()
            .for_each(|line| self.sink.write(line));
    }
}

impl LogSink {
    /// Lines that cannot be written are lost: the log never ends the process.
    fn write(&mut self, line: &str) {
        let _ = match self {
            Self::Stderr => io::stderr().write_all(line.as_bytes()),
            Self::File(file) => file.write(line.as_bytes()),
            Self::Shared(path) => {
                BoundedFile::append_to(path).and_then(|mut file| file.write_all(line.as_bytes()))
            }
        };
    }
}

/// Takes the lines of `tracing_subscriber`, each in one write.
struct LogLines;

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        with_log(|log| log.iter_mut().for_each(|log| log.line(&line)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines of the last minute.
struct RepeatedLines(LruCache<String, RepeatedLine>);

struct RepeatedLine {
    since: Instant,
    written: u32,
    /// The last written line, without its time.
    last: String,
    /// Number of lines that were not written, and the last of them.
    counted: u32,
    held: String,
}

impl Default for RepeatedLines {
    fn default() -> Self {
        Self(LruCache::new(MAX_LINES))
    }
}

impl RepeatedLines {
    /// The lines to write for a new line.
    fn line(&mut self, line: &str, now: Instant) -> Vec<String> {
        let text = without_time(line);
        let key = without_numbers(text);
        let mut lines = Vec::new();
        if let Some(said) = self.0.get_mut(&key)
            && now.saturating_duration_since(said.since) < REPEAT_TIME
        {
            if said.last == text || said.written >= BURST {
                said.counted = said.counted.saturating_add(1);
                line.clone_into(&mut said.held);
                return lines;
            }
            said.written += 1;
            text.clone_into(&mut said.last);
            lines.push(line.to_owned());
            return lines;
        }
        let said = RepeatedLine {
            since: now,
            written: 1,
            last: text.to_owned(),
            counted: 0,
            held: String::new(),
        };
        // the count of the line that is evicted, or of this line in an earlier minute
        let before = self.0.push(key, said);
        lines.extend(before.and_then(|(_, said)| said.counted()));
        lines.push(line.to_owned());
        lines
    }

    /// The lines to write for counts that are old enough, or for all.
    fn expire(&mut self, now: Option<Instant>) -> Vec<String> {
        let is_over = |said: &RepeatedLine| {
            now.is_none_or(|now| now.saturating_duration_since(said.since) >= REPEAT_TIME)
        };
        let over = self.0.iter().filter(|(_, said)| is_over(said));
        let keys: Vec<String> = over.map(|(key, _)| key.clone()).collect();
        let said = keys.iter().filter_map(|key| self.0.pop(key)?.counted());
        said.collect()
    }
}

impl RepeatedLine {
    fn counted(&self) -> Option<String> {
        (self.counted > 0).then(|| {
            let held = self.held.trim_end();
            let counted = self.counted;
            match held.strip_prefix('{').and_then(|it| it.strip_suffix('}')) {
                Some(json) => format!("{{{json},\"counted\":{counted}}}\n"),
                None => format!(
                    "{held} [the last of {counted} such lines that were counted, not written]\n"
                ),
            }
        })
    }
}

/// A line without its time, which is its first word, or its first member in JSON.
fn without_time(line: &str) -> &str {
    let end = if line.starts_with('{') { ',' } else { ' ' };
    line.split_once(end).map_or(line, |(_time, text)| text)
}

/// A line's text with one mark in place of each number.
fn without_numbers(text: &str) -> String {
    let mut key = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_ascii_digit() {
            false => key.push(character),
            true if key.ends_with('#') => {}
            true => key.push('#'),
        }
    }
    key
}

/// A log file that is rotated at its limit; one older file is kept.
struct BoundedFile {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl BoundedFile {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = Self::append_to(&path)?;
        Ok(Self {
            length: file.metadata()?.len(),
            path,
            file,
            limit,
        })
    }

    fn append_to(path: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600).open(path)
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let bytes = line.len() as u64;
        if self.length > 0 && self.length.saturating_add(bytes) > self.limit {
            self.put_aside()?;
        }
        self.length = self.length.saturating_add(bytes);
        self.file.write_all(line)
    }

    fn put_aside(&mut self) -> io::Result<()> {
        let aside = self.path.with_added_extension("1");
        let next = std::fs::rename(&self.path, aside).and_then(|()| Self::append_to(&self.path));
        match next {
            Ok(next) => self.file = next,
            // e.g. the directory is gone: truncate the open file, so that it stays within its limit
            Err(_) => self.file.set_len(0)?,
        }
        self.length = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seconds: u64, text: &str) -> String {
        format!("2026-01-01T00:00:{seconds:02}Z {text}\n")
    }

    #[test]
    fn what_is_repeated_is_counted() {
        let (mut repeats, start) = (RepeatedLines::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let (a, b) = ("WARN span 1 of layer a: 404", "WARN other");
        assert_eq!(repeats.line(&line(0, a), at(0)), [line(0, a)]);
        for second in 1..30 {
            assert_eq!(repeats.line(&line(second, a), at(second)), [""; 0]);
        }
        assert_eq!(repeats.line(&line(30, b), at(30)), [line(30, b)]);
        assert_eq!(repeats.expire(Some(at(59))), [""; 0]);
        let told = repeats.expire(Some(at(60)));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with(line(29, a).trim_end()) && told[0].contains("last of 29 "),
            "{told:?}"
        );
        assert_eq!(
            repeats.line(&line(59, a), at(61)),
            [line(59, a)],
            "it is new again"
        );
    }

    #[test]
    fn what_is_counted_of_json_is_json() {
        let (mut repeats, now) = (RepeatedLines::default(), Instant::now());
        let json = |second: u64| {
            format!(
                "{{\"timestamp\":\"2026-01-01T00:00:{second:02}Z\",\"level\":\"WARN\",\"message\":\"span 1\"}}\n"
            )
        };
        let written: usize = (0..9)
            .map(|second| repeats.line(&json(second), now).len())
            .sum();
        assert_eq!(written, 1);
        let told = repeats.expire(None);
        let told: serde_json::Value = serde_json::from_str(&told[0]).unwrap();
        assert_eq!(told["counted"], 8);
        assert_eq!(told["timestamp"], "2026-01-01T00:00:08Z");
    }

    #[test]
    fn lines_with_other_numbers_are_written_a_few_times() {
        let (mut repeats, now) = (RepeatedLines::default(), Instant::now());
        let text = |span: u64| line(span % 60, &format!("WARN span {span} of layer a"));
        let written: usize = (0..100)
            .map(|span| repeats.line(&text(span), now).len())
            .sum();
        assert_eq!(written, BURST as usize);
        let told = repeats.expire(None);
        assert!(
            told[0].contains("span 99 ") && told[0].contains("last of 95 "),
            "{told:?}"
        );
        assert_eq!(repeats.expire(None), [""; 0]);
    }

    #[test]
    fn what_was_counted_is_told_when_it_is_said_again_or_forgotten() {
        let (mut repeats, start) = (RepeatedLines::default(), Instant::now());
        for _ in 0..3 {
            repeats.line(&line(0, "WARN a"), start);
        }
        let lines = repeats.line(&line(1, "WARN a"), start + REPEAT_TIME);
        assert!(
            lines.len() == 2 && lines[0].contains("last of 2 "),
            "{lines:?}"
        );
        repeats.line(&line(1, "WARN a"), start + REPEAT_TIME);
        let others = (0..MAX_LINES.get()).flat_map(|n| {
            let name: String = format!("{n:b}").replace('0', "x").replace('1', "y");
            repeats.line(&line(1, &name), start + REPEAT_TIME)
        });
        assert_eq!(others.filter(|line| line.contains("last of 1 ")).count(), 1);
    }

    #[test]
    fn the_file_has_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.log");
        let mut file = BoundedFile::open(path.clone(), 100).unwrap();
        for number in 0..100 {
            file.write(format!("line {number:04}\n").as_bytes())
                .unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(
            (read("daemon.log").len(), read("daemon.log.1").len()),
            (100, 100)
        );
        assert!(read("daemon.log").ends_with("line 0099\n"));
        assert!(read("daemon.log.1").starts_with("line 0080\n"));
        // opened again it counts what is there
        let mut file = BoundedFile::open(path, 100).unwrap();
        file.write(b"line 0100\n").unwrap();
        assert_eq!(read("daemon.log"), "line 0100\n");
        drop(directory);
        for _ in 0..100 {
            file.write(b"line more\n").unwrap();
        }
        assert!(file.file.metadata().unwrap().len() <= 100);
    }
}
