//! `socinbd config`.

use std::{ffi::OsString, fmt, path::PathBuf, process::ExitCode};

use clap::{ArgMatches, Args, Subcommand, parser::ValueSource};
use serde::Serialize;
use serde_json::Value;

use super::{
    ConfigFile, Settings, default_file,
    keys::{Change, KEYS, Key, TABLES, Type, rule_entries},
    source, verifiers,
};
use crate::{
    api::{client::Client, control::Reloaded},
    cli::{GlobalArgs, absolute, command, output},
    error::{Error, Kind, Result},
};

/// Check and show the configuration file, and reload the daemon
#[derive(Subcommand)]
#[command(after_help = "Examples:\n\
\x20 socinbd config check\n\
\x20 socinbd config show\n\
\x20 socinbd config reload")]
pub(in crate::cli) enum ConfigCommand {
    Check(CheckCommand),
    Show(ShowCommand),
    Reload(ReloadCommand),
}

/// Check a configuration file
///
/// All mistakes are printed, with their lines. Exit status 2: the file is wrong. Exit status 3: it does not exist.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd config check\n\
\x20 socinbd config check ./config.toml")]
pub(in crate::cli) struct CheckCommand {
    /// File [default: that of --config]
    file: Option<PathBuf>,
}

/// Show the configuration and where each value comes from
///
/// This is the configuration with which a command or a daemon starts now, with the environment of this command. The output is a
/// configuration file.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd config show\n\
\x20 socinbd config show --defaults")]
pub(in crate::cli) struct ShowCommand {
    /// Print a documented file with the defaults
    #[arg(long)]
    defaults: bool,
}

/// Make the running daemon read its configuration file again
///
/// SIGHUP to the daemon does the same. If the file is wrong, the daemon keeps its configuration, and the exit status is 2.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd config reload --json")]
pub(in crate::cli) struct ReloadCommand {}

impl ConfigCommand {
    /// Whether the command itself reads the file, and tells its mistakes.
    pub(in crate::cli) fn reports_on_file(&self) -> bool {
        matches!(self, Self::Check(_) | Self::Show(_))
    }

    pub(in crate::cli) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        match self {
            Self::Check(command) => command.run(global),
            Self::Show(command) => command.run(global),
            Self::Reload(_) => reload(global).await,
        }
    }
}

impl CheckCommand {
    fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let given = self.file.as_deref().or(global.settings.given_path());
        let settings = Settings::new(Vec::new(), given.map(absolute).transpose()?, true);
        let file = settings.read(command)?;
        let path = settings.path();
        match file.text.is_empty() && !path.exists() {
            true => output::line(&format!(
                "{} does not exist: the defaults are used",
                path.display()
            ))?,
            false => output::line(&format!("{} is correct", path.display()))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A value and where it comes from.
#[derive(Serialize)]
struct Shown {
    key: String,
    /// A string, a number, a list, or null.
    value: Value,
    source: &'static str,
    /// The variable of the environment, or the line of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
    /// When a change counts.
    change: &'static str,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Configuration(Vec<Shown>);

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_table = |table: &str| {
            let prefix = format!("{table}.");
            self.0
                .iter()
                .filter_map(move |shown| Some((shown, shown.key.strip_prefix(&prefix)?.to_owned())))
        };
        let all = self.0.iter().find(|shown| shown.key == verifiers::TABLE);
        for (number, table) in TABLES.iter().enumerate() {
            let gap = if number == 0 { "" } else { "\n\n" };
            write!(f, "{gap}[{}]", table.name)?;
            for (shown, name) in of_table(table.name) {
                let place = shown.place.as_deref().map(|place| format!(" ({place})"));
                let source = format!("{}{}", shown.source, place.unwrap_or_default());
                match &shown.value {
                    Value::Null => write!(f, "\n# {name} has no value")?,
                    value => {
                        let value = toml::Value::try_from(value).map_err(|_| fmt::Error)?;
                        write!(f, "\n{name} = {value}  # {source}")?;
                    }
                }
            }
        }
        let verifiers = all.and_then(|shown| shown.value.as_array());
        for verifier in verifiers.into_iter().flatten() {
            let table = toml::Value::try_from(verifier).map_err(|_| fmt::Error)?;
            let text = toml::to_string(&table).map_err(|_| fmt::Error)?;
            write!(f, "\n\n[[{}]]\n{}", verifiers::TABLE, text.trim_end())?;
        }
        Ok(())
    }
}

impl ShowCommand {
    fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        if self.defaults {
            let text = default_file::text(&command());
            output::line(text.trim_end())?;
            return Ok(ExitCode::SUCCESS);
        }
        output::report(global.json, &Configuration(shown(&global.settings)?))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// All keys, as a daemon, or else an attach or a snapshotter, would have them.
fn shown(settings: &Settings) -> Result<Vec<Shown>> {
    let file = settings.read(command)?;
    let of = |arguments: &[&str], is_daemon| {
        let mut line: Vec<OsString> = vec!["socinbd".into()];
        for name in settings.names_on_command_line() {
            for value in settings.values_of(name) {
                let mut option = OsString::from(format!("--{name}="));
                option.push(value);
                line.push(option);
            }
        }
        line.extend(arguments.iter().map(OsString::from));
        let mut settings = Settings::new(line, None, is_daemon);
        settings
            .matches(file.clone(), command, None)
            .map_err(|error| Error::with_source(Kind::InvalidArgument, "the options", error))
    };
    let programs = [
        of(&["daemon"], true)?,
        of(&["attach", "image", "/"], false)?,
        of(&["snapshotter"], true)?,
    ];
    let commands: Vec<&ArgMatches> = programs
        .iter()
        .filter_map(|matches| Some(matches.subcommand()?.1))
        .collect();
    let show = |key: &'static Key| {
        let command = commands.iter().find(|command| has_value(command, key));
        shown_key(key, command.copied(), &file, settings)
    };
    let mut all: Vec<Shown> = KEYS.iter().map(show).collect();
    all.extend(shown_verifiers(&file));
    Ok(all)
}

/// The verifiers, if there are any.
fn shown_verifiers(file: &ConfigFile) -> Option<Shown> {
    let value = serde_json::to_value(&file.verifiers).ok()?;
    (!file.verifiers.is_empty()).then(|| Shown {
        key: verifiers::TABLE.to_owned(),
        value,
        source: "file",
        place: None,
        change: Change::Reload.when(),
    })
}

fn has_value(command: &ArgMatches, key: &Key) -> bool {
    matches!(command.try_get_raw(&key.id()), Ok(Some(_)))
}

fn shown_key(
    key: &'static Key,
    of: Option<&ArgMatches>,
    file: &ConfigFile,
    settings: &Settings,
) -> Shown {
    let raw = of.and_then(|command| command.try_get_raw(&key.id()).ok().flatten());
    let values: Vec<String> = raw
        .into_iter()
        .flatten()
        .map(|value| value.to_string_lossy().into_owned())
        .collect();
    let value = match (key.value, values.as_slice()) {
        (_, []) => Value::Null,
        (Type::Paths | Type::Texts, values) => values.into(),
        (Type::Rules, rules) => {
            let rule = |rule: &String| -> Value { rule_entries(rule).into_iter().collect() };
            rules.iter().map(rule).collect()
        }
        (Type::Number, [value, ..]) => value.parse::<u64>().map_or(Value::Null, Value::from),
        (_, [value, ..]) => value.as_str().into(),
    };
    let (source, place) = match of.and_then(|command| source(command, key)) {
        Some(ValueSource::CommandLine) => ("command line", None),
        Some(ValueSource::EnvVariable) => {
            let program = command();
            let variable = key.option(&program).and_then(|option| option.get_env());
            let variable = variable.map(|name| name.to_string_lossy().into_owned());
            ("environment", variable)
        }
        _ => match file.entry(key) {
            Some(entry) => (
                "file",
                Some(format!("{}:{}", settings.path().display(), entry.line)),
            ),
            None => ("default", None),
        },
    };
    Shown {
        key: key.path(),
        value,
        source,
        place,
        change: key.change.when(),
    }
}

async fn reload(global: &GlobalArgs) -> Result<ExitCode> {
    let client = Client::new(&absolute(&global.run_dir)?);
    client.running_daemon().await?;
    let reloaded: Reloaded = client.reload().await?;
    output::report(global.json, &reloaded)?;
    Ok(ExitCode::SUCCESS)
}
