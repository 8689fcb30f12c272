//! Reads the configuration file. Each mistake is told with its place and with what is wanted.

use std::{fmt, path::Path};

use clap::{
    Arg, ArgAction, Command,
    error::{ContextKind, ContextValue},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    keys::{CHOICE, DIRECTORIES, KEYS, Key, TABLES, Type},
    verifiers,
};
use crate::{
    cli::pull_rule::CONDITIONS,
    engine::verifiers::Verifier,
    error::{Error, Kind, Result, ResultExt as _},
    regular_file,
    snapshotter::Pull,
};

/// Maximum size of the file in bytes.
pub(super) const MAX_BYTES: u64 = 256 << 10;
/// Mistakes that are told, at most.
const MAX_MISTAKES: usize = 20;
/// Characters of a value in a message, at most.
const SHOWN: usize = 60;
/// Similarity from which on a known name is suggested (Jaro, as for commands and options).
const SIMILAR: f64 = 0.7;

/// A key that the file has.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: &'static Key,
    /// As on a command line.
    pub(super) values: Vec<String>,
    pub(super) line: usize,
}

/// What a file says.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct ConfigFile {
    /// Its keys, in the order of the file.
    pub(super) entries: Vec<Entry>,
    /// Its verifiers, in the order of the file.
    pub(super) verifiers: Vec<Verifier>,
    /// Its text.
    pub(super) text: String,
}

/// Something that is wrong in a file.
#[derive(Debug, PartialEq, Eq)]
struct Mistake {
    line: usize,
    column: usize,
    what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.what)
    }
}

impl ConfigFile {
    /// Reads a file; `None` if it does not exist. It may be a symbolic link to a regular file.
    pub(super) fn read(path: &Path, program: fn() -> Command) -> Result<Option<Self>> {
        let Some(bytes) = Self::bytes(path)? else {
            return Ok(None);
        };
        Self::parse(&bytes, &path.display().to_string(), program).map(Some)
    }

    /// The directories that a file names, also if it has mistakes elsewhere; none if it is not TOML or cannot be read.
    pub(super) fn read_directories(path: &Path, program: fn() -> Command) -> Self {
        let bytes = Self::bytes(path).ok().flatten().unwrap_or_default();
        let (mut file, _) = Self::parse_all(&bytes, &path.display().to_string(), program);
        file.entries.retain(|entry| entry.key.table == DIRECTORIES);
        file
    }

    fn bytes(path: &Path) -> Result<Option<Vec<u8>>> {
        let reading = || format!("reading the configuration file {}", path.display());
        let target = match path.canonicalize() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            target => target.or_kind(Kind::InvalidArgument, reading)?,
        };
        let bytes = regular_file::read(&target, MAX_BYTES);
        bytes.or_kind(Kind::InvalidArgument, reading).map(Some)
    }

    /// Parses the bytes of a file, which has this name in messages. `program` makes the definition of the command line, whose options check
    /// the values.
    pub(super) fn parse(bytes: &[u8], name: &str, program: fn() -> Command) -> Result<Self> {
        match Self::parse_all(bytes, name, program) {
            (file, None) => Ok(file),
            (_, Some(mistakes)) => Err(mistakes),
        }
    }

    /// The keys that are right, and an error with the mistakes.
    fn parse_all(bytes: &[u8], name: &str, program: fn() -> Command) -> (Self, Option<Error>) {
        let mut reader = Reader {
            text: String::new(),
            program: &program(),
            entries: Vec::new(),
            verifiers: Vec::new(),
            mistakes: Vec::new(),
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                text.clone_into(&mut reader.text);
                reader.document();
            }
            Err(error) => {
                // the valid part has the place
                reader.text = String::from_utf8_lossy(&bytes[..error.valid_up_to()]).into_owned();
                reader.mistake(reader.text.len(), "this is not UTF-8".to_owned());
            }
        }
        let Reader {
            text,
            entries,
            verifiers,
            mut mistakes,
            ..
        } = reader;
        let file = Self {
            entries,
            verifiers,
            text,
        };
        if mistakes.is_empty() {
            return (file, None);
        }
        mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        let more = mistakes.len().saturating_sub(MAX_MISTAKES);
        mistakes.truncate(MAX_MISTAKES);
        let mut lines: Vec<String> = mistakes
            .iter()
            .map(|mistake| format!("{name}:{mistake}"))
            .collect();
        if more > 0 {
            lines.push(format!("{name}: and {more} more mistakes"));
        }
        let mistakes = Error::new(Kind::InvalidArgument, lines.join("\n"));
        (file, Some(mistakes))
    }

    pub(super) fn entry(&self, key: &Key) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key.name == key.name)
    }
}

struct Reader<'a> {
    text: String,
    program: &'a Command,
    entries: Vec<Entry>,
    verifiers: Vec<Verifier>,
    mistakes: Vec<Mistake>,
}

impl Reader<'_> {
    fn mistake(&mut self, offset: usize, what: String) {
        let (line, column) = self.place(offset);
        self.mistakes.push(Mistake { line, column, what });
    }

    /// Line and column of an offset in the text, both from 1.
    fn place(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (
            before.matches('\n').count() + 1,
            before[line_start..].chars().count() + 1,
        )
    }

    fn document(&mut self) {
        let text = self.text.clone();
        let (document, errors) = DeTable::parse_recoverable(&text);
        for error in &errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            let what = match is_bare_word(&text, offset) {
                true => "a string needs quotes".to_owned(),
                false => error.message().replace('\n', "; "),
            };
            self.mistake(offset, format!("this is not TOML: {what}"));
        }
        if !errors.is_empty() {
            return;
        }
        for (name, value) in document.get_ref().iter() {
            let (name, offset) = (name.get_ref().as_ref(), name.span().start);
            let is_known = TABLES.iter().any(|table| table.name == name);
            match value.get_ref() {
                _ if name == verifiers::TABLE => self.verifiers(value),
                DeValue::Table(keys) if is_known => self.table(name, keys),
                _ if is_known => self.mistake(
                    offset,
                    format!("{name} is a table: write [{name}], and its keys below"),
                ),
                DeValue::Table(_) => {
                    let tables = TABLES.iter().map(|table| table.name);
                    let tables = tables.chain([verifiers::TABLE]);
                    let what = format!("unknown table [{}]", cut(name));
                    let hint = match nearest(name, tables.clone()) {
                        Some(known) => format!("did you mean [{known}]?"),
                        None => format!("the tables are {}", list(tables)),
                    };
                    self.mistake(offset, format!("{what}; {hint}"));
                }
                _ => self.unknown_key(None, name, offset),
            }
        }
        // in the order of the file
        self.entries.sort_by_key(|entry| entry.line);
        self.check_needs();
    }

    fn table(&mut self, table: &str, keys: &DeTable<'_>) {
        for (name, value) in keys.iter() {
            let (name, offset) = (name.get_ref().as_ref(), name.span().start);
            let known = KEYS
                .iter()
                .find(|key| key.table == table && key.name == name);
            match known {
                Some(key) => self.key(key, offset, value),
                None => self.unknown_key(Some(table), name, offset),
            }
        }
    }

    fn verifiers(&mut self, value: &Spanned<DeValue<'_>>) {
        let (read, mistakes) = verifiers::read(value);
        self.verifiers = read;
        for (offset, what) in mistakes {
            self.mistake(offset, what);
        }
    }

    fn unknown_key(&mut self, table: Option<&str>, name: &str, offset: usize) {
        let here = table.map_or(String::new(), |table| format!(" in [{table}]"));
        let what = format!("unknown key {:?}{here}", cut(name));
        let of_table = |key: &&Key| Some(key.table) == table;
        let elsewhere = KEYS.iter().find(|key| key.name == name);
        let near = || nearest(name, KEYS.iter().filter(of_table).map(|key| key.name));
        let near_elsewhere = || {
            let name = nearest(name, KEYS.iter().map(|key| key.name))?;
            KEYS.iter().find(|key| key.name == name)
        };
        let hint = if let Some(key) = elsewhere {
            format!("it belongs in [{}]", key.table)
        } else if let Some(known) = near() {
            format!("did you mean {known:?}?")
        } else if let Some(key) = near_elsewhere() {
            format!("did you mean {:?} in [{}]?", key.name, key.table)
        } else {
            match table {
                Some(_) => {
                    let known = KEYS.iter().filter(of_table).map(|key| key.name);
                    format!("the keys of this table are {}", list(known))
                }
                None => "`socinbd config show --defaults` prints all keys".to_owned(),
            }
        };
        self.mistake(offset, format!("{what}; {hint}"));
    }

    fn key(&mut self, key: &'static Key, offset: usize, value: &Spanned<DeValue<'_>>) {
        let found = self.mistakes.len();
        let mut values = Vec::new();
        match (key.value, value.get_ref()) {
            (Type::Paths | Type::Texts, DeValue::Array(items)) => {
                for item in items.iter() {
                    values.extend(self.value(key, item));
                }
            }
            (Type::Rules, DeValue::Array(items)) => {
                for item in items.iter() {
                    match item.get_ref() {
                        DeValue::Table(entries) => values.extend(self.rule(key, item, entries)),
                        _ => self.wrong_type(key, item),
                    }
                }
            }
            (Type::Paths | Type::Texts | Type::Rules, _) => self.wrong_type(key, value),
            _ => values.extend(self.value(key, value)),
        }
        if self.mistakes.len() == found && !values.is_empty() {
            let (line, _) = self.place(offset);
            self.entries.push(Entry { key, values, line });
        }
    }

    /// A rule as on a command line, if its option takes it.
    fn rule(
        &mut self,
        key: &Key,
        table: &Spanned<DeValue<'_>>,
        entries: &DeTable<'_>,
    ) -> Option<String> {
        let found = self.mistakes.len();
        let (mut choice, mut conditions) = (None, String::new());
        for (name, value) in entries.iter() {
            let (name, offset) = (name.get_ref().as_ref(), name.span().start);
            let known = [CHOICE].into_iter().chain(CONDITIONS);
            if !known.clone().any(|known| known == name) {
                let what = format!("unknown key {:?} in [[{}]]", cut(name), key.path());
                let hint = match nearest(name, known.clone()) {
                    Some(known) => format!("did you mean {known:?}?"),
                    None => format!("the keys of a rule are {}", list(known)),
                };
                self.mistake(offset, format!("{what}; {hint}"));
                continue;
            }
            let DeValue::String(text) = value.get_ref() else {
                self.wrong(key, value, &format!("{name} has to be a string"));
                continue;
            };
            let (rule, condition) = match name == CHOICE {
                true => (text.to_string(), String::new()),
                false => (
                    format!("{},{name}={text}", Pull::Lazy.name()),
                    format!(",{name}={text}"),
                ),
            };
            let refused = key
                .option(self.program)
                .and_then(|option| refusal(option, &rule));
            match refused {
                Some(reason) => self.wrong(key, value, &reason),
                None if name == CHOICE => choice = Some(rule),
                None => conditions += &condition,
            }
        }
        if self.mistakes.len() > found {
            return None;
        }
        if choice.is_none() {
            let what = format!(
                "a rule of {} needs {CHOICE}: lazy, disks or containerd",
                key.path()
            );
            self.mistake(table.span().start, what);
        }
        choice.map(|choice| choice + &conditions)
    }

    /// A value as on a command line, if its option takes it.
    fn value(&mut self, key: &Key, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let text = match (key.value, value.get_ref()) {
            (Type::Number, DeValue::Integer(number)) => {
                let digits = number.as_str().replace('_', "");
                match i128::from_str_radix(&digits, number.radix()) {
                    Ok(number) => number.to_string(),
                    Err(_) => digits,
                }
            }
            (Type::Text | Type::Texts | Type::Path | Type::Paths, DeValue::String(text)) => {
                text.to_string()
            }
            _ => {
                self.wrong_type(key, value);
                return None;
            }
        };
        if matches!(key.value, Type::Path | Type::Paths) && !Path::new(&text).is_absolute() {
            self.wrong_type(key, value);
            return None;
        }
        let refused = key
            .option(self.program)
            .and_then(|option| refusal(option, &text));
        if let Some(reason) = refused {
            self.wrong(key, value, &reason);
            return None;
        }
        Some(text)
    }

    fn wrong_type(&mut self, key: &Key, value: &Spanned<DeValue<'_>>) {
        self.wrong(key, value, &format!("{} is wanted", key.value.wanted()));
    }

    fn wrong(&mut self, key: &Key, value: &Spanned<DeValue<'_>>, reason: &str) {
        let span = value.span();
        let source = self.text.get(span.clone()).unwrap_or_default();
        let source = cut(source.lines().next().unwrap_or_default());
        let what = format!("{} = {source}: {reason}", key.path());
        self.mistake(span.start, what);
    }

    fn check_needs(&mut self) {
        let missing: Vec<(usize, String)> = self
            .entries
            .iter()
            .filter_map(|entry| {
                let needed = entry.key.needs?;
                let is_there = self.entries.iter().any(|other| other.key.name == needed);
                let what = format!("{} needs {needed} too", entry.key.path());
                (!is_there).then_some((entry.line, what))
            })
            .collect();
        for (line, what) in missing {
            self.mistakes.push(Mistake {
                line,
                column: 1,
                what,
            });
        }
    }
}

/// Whether a value begins there that would be a string if it had quotes.
fn is_bare_word(text: &str, offset: usize) -> bool {
    let is_value = text
        .get(..offset)
        .is_some_and(|before| before.trim_end_matches([' ', '\t']).ends_with('='));
    let first = text.get(offset..).and_then(|rest| rest.chars().next());
    is_value && first.is_some_and(|first| first.is_alphabetic() || first == '/')
}

/// Why an option does not take a value, if it does not.
fn refusal(option: &Arg, value: &str) -> Option<String> {
    let alone = Arg::new("value")
        .long("value")
        .action(ArgAction::Set)
        .value_parser(option.get_value_parser().clone());
    let parsed = Command::new("value")
        .no_binary_name(true)
        .arg(alone)
        .try_get_matches_from([format!("--value={value}")]);
    let error = parsed.err()?;
    if let Some(ContextValue::Strings(known)) = error.get(ContextKind::ValidValue)
        && !known.is_empty()
    {
        let known = list(known.iter().map(String::as_str));
        return Some(format!("one of {known} is wanted"));
    }
    if value.is_empty() {
        return Some("a value that is not empty is wanted".to_owned());
    }
    if value.starts_with('-') && value.parse::<i128>().is_ok() {
        return Some("a number of at least 0 is wanted".to_owned());
    }
    let source = std::error::Error::source(&error).map(ToString::to_string);
    Some(source.unwrap_or_else(|| error.kind().to_string()))
}

/// The known name that a name was meant to be, if one is similar.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = cut(name).to_lowercase().replace('_', "-");
    let similar = known.map(|known| (strsim::jaro(&name, known), known));
    let best = similar.max_by(|one, other| one.0.total_cmp(&other.0))?;
    (best.0 > SIMILAR).then_some(best.1)
}

/// The start of a text, for a message.
fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
