//! The configuration file: the options of a node, below those of the command line and of the environment.
//!
//! A key sets the default of the option of its name before the command line is parsed. So a value of the file is parsed and checked by its
//! option, and the command line and the environment have precedence.

pub(super) mod commands;
mod default_file;
mod file;
mod kept;
mod keys;
#[cfg(test)]
mod tests;
mod verifiers;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Command, parser::ValueSource};

pub(super) use file::ConfigFile;
pub(super) use kept::{keep, kept};
pub(super) use keys::Key;

use crate::{
    engine::verifiers::Verifier,
    error::{Error, Kind, Result},
};
use keys::{Change, DAEMON_LOG, KEYS, Scope};

/// The file that is read if no other one is given and it exists.
pub(super) const PATH: &str = "/etc/socinbd/config.toml";

/// The options of this process and where they come from.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    /// The command line.
    arguments: Vec<OsString>,
    /// Whether this process is a daemon or its keeper.
    is_daemon: bool,
    /// The file that was given; else [`PATH`] is used if it exists.
    given: Option<PathBuf>,
    file: ConfigFile,
    /// Names of the options that the command line has.
    on_command_line: BTreeSet<&'static str>,
    /// Names of the options that the environment has.
    in_environment: BTreeSet<&'static str>,
    /// The values of the daemon's keys.
    values: BTreeMap<&'static str, Vec<OsString>>,
}

/// What a reload changes.
#[derive(Default)]
pub(super) struct Changes {
    /// `KEY = VALUE` of what counts from now on.
    pub(super) applied: Vec<String>,
    /// The same of what counts after a restart.
    pub(super) needs_restart: Vec<String>,
}

impl Settings {
    /// The settings of a command line; `given` is the file of `--config`.
    pub(super) fn new(arguments: Vec<OsString>, given: Option<PathBuf>, is_daemon: bool) -> Self {
        Self {
            arguments,
            given,
            is_daemon,
            ..Self::default()
        }
    }

    /// The path of the file.
    pub(super) fn path(&self) -> &Path {
        self.given.as_deref().unwrap_or(Path::new(PATH))
    }

    /// The path of `--config`.
    pub(super) fn given_path(&self) -> Option<&Path> {
        self.given.as_deref()
    }

    /// The text of the file; empty if there is none.
    pub(super) fn text(&self) -> &str {
        &self.file.text
    }

    /// The verifiers of the file.
    pub(super) fn verifiers(&self) -> &[Verifier] {
        &self.file.verifiers
    }

    /// Reads the file.
    pub(super) fn read(&self, program: fn() -> Command) -> Result<ConfigFile> {
        match ConfigFile::read(self.path(), program)? {
            Some(file) => Ok(file),
            None if self.given.is_none() => Ok(ConfigFile::default()),
            None => Err(Error::new(
                Kind::NotFound,
                format!(
                    "the configuration file {} does not exist (--config, SOCINBD_CONFIG)",
                    self.path().display()
                ),
            )),
        }
    }

    /// The directories that a file with mistakes names.
    pub(super) fn read_directories(&self, program: fn() -> Command) -> ConfigFile {
        ConfigFile::read_directories(self.path(), program)
    }

    /// Parses the text of a file that another process of this daemon has read.
    pub(super) fn parse(&self, text: &[u8], program: fn() -> Command) -> Result<ConfigFile> {
        ConfigFile::parse(text, &self.path().display().to_string(), program)
    }

    /// Parses the command line above this file. `without_file` is what it is without one, if that is known.
    pub(super) fn matches(
        &mut self,
        file: ConfigFile,
        program: fn() -> Command,
        without_file: Option<ArgMatches>,
    ) -> Result<ArgMatches, clap::Error> {
        let matches = match without_file {
            Some(matches) if file.entries.is_empty() && !self.is_daemon => matches,
            _ => with_defaults(program(), &file, self.is_daemon)
                .try_get_matches_from(&self.arguments)?,
        };
        if let Some((_, command)) = matches.subcommand() {
            self.on_command_line = of_source(command, ValueSource::CommandLine);
            self.in_environment = of_source(command, ValueSource::EnvVariable);
            self.values = values(command);
        }
        self.file = file;
        Ok(matches)
    }

    /// Whether the command line or the environment has this option.
    pub(super) fn is_explicit(&self, name: &str) -> bool {
        self.on_command_line.contains(name) || self.in_environment.contains(name)
    }

    /// Names of the keys that the command line has.
    fn names_on_command_line(&self) -> impl Iterator<Item = &'static str> {
        self.on_command_line.iter().copied()
    }

    /// The values of a key's option.
    fn values_of(&self, name: &str) -> &[OsString] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    /// Whether the file has this key.
    pub(super) fn is_in_file(&self, name: &str) -> bool {
        self.file.entries.iter().any(|entry| entry.key.name == name)
    }

    /// What differs from the settings before. What needs a restart keeps its old value here, so that the next reload tells it again.
    pub(super) fn changes_since(&mut self, before: &Self) -> Changes {
        let mut changes = Changes::default();
        if before.verifiers() != self.verifiers() {
            let count = self.verifiers().len();
            let told = format!("{} has {count} entries", verifiers::TABLE);
            changes.applied.push(told);
        }
        for key in &KEYS {
            let (old, new) = (before.values.get(key.name), self.values.get(key.name));
            if old == new {
                continue;
            }
            let told = match new {
                Some(values) => {
                    let values: Vec<String> = values
                        .iter()
                        .map(|value| value.to_string_lossy().into_owned())
                        .collect();
                    format!("{} = {}", key.path(), key.toml(&values))
                }
                None => format!("{} has no value", key.path()),
            };
            match key.change {
                Change::Reload => changes.applied.push(told),
                Change::Restart | Change::Command => {
                    changes.needs_restart.push(told);
                    match old.cloned() {
                        Some(old) => self.values.insert(key.name, old),
                        None => self.values.remove(key.name),
                    };
                }
            }
        }
        changes
    }
}

/// Makes the values of a file the defaults of their options.
fn with_defaults(mut program: Command, file: &ConfigFile, is_daemon: bool) -> Command {
    if is_daemon {
        program = with_default(program, "log", &[DAEMON_LOG.to_owned()]);
    }
    for entry in &file.entries {
        if is_daemon || entry.key.scope == Scope::Commands {
            program = with_default(program, entry.key.name, &entry.values);
        }
    }
    program
}

fn with_default(command: Command, name: &str, values: &[String]) -> Command {
    command
        .mut_args(|option| match option.get_long() == Some(name) {
            true => option.default_values(values),
            false => option,
        })
        .mut_subcommands(|command| with_default(command, name, values))
}

/// Where the value of a key's option comes from; `None` if the command does not have the option, or it has no value.
fn source(command: &ArgMatches, key: &Key) -> Option<ValueSource> {
    let id = key.id();
    command.try_contains_id(&id).ok()?;
    command.value_source(&id)
}

fn of_source(command: &ArgMatches, wanted: ValueSource) -> BTreeSet<&'static str> {
    let is_of_it = |key: &&Key| source(command, key) == Some(wanted);
    KEYS.iter().filter(is_of_it).map(|key| key.name).collect()
}

fn values(command: &ArgMatches) -> BTreeMap<&'static str, Vec<OsString>> {
    let value = |key: &'static Key| {
        let raw = command.try_get_raw(&key.id()).ok()??;
        Some((key.name, raw.map(OsString::from).collect()))
    };
    KEYS.iter().filter_map(value).collect()
}
