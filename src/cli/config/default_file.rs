//! The documented configuration file, and the table of `docs/configuration.md`.

use std::fmt::Write as _;

use clap::{Arg, Command};

use super::{
    keys::{KEYS, Key, TABLES},
    verifiers,
};

/// Characters of a line of the file, at most.
const WIDTH: usize = 100;

/// A file with all keys as comments: it sets nothing, and shows the defaults.
pub(super) fn text(program: &Command) -> String {
    let mut text = "\
# The configuration of socinbd. Each key has the name of an option of the command line, and is the default of that option.
# Order of precedence: command line, environment, this file, default. Without the first `#`, a line sets a key.
# `socinbd config check` checks this file, `systemctl reload socinbd` or SIGHUP makes the daemon read it again.
"
    .to_owned();
    for table in &TABLES {
        let _ = write!(text, "\n# {}\n[{}]\n", table.help, table.name);
        for key in KEYS.iter().filter(|key| key.table == table.name) {
            if let Some(option) = key.option(program) {
                text += &documented(key, option);
            }
        }
    }
    text + verifiers::DOCUMENTED
}

fn documented(key: &Key, option: &Arg) -> String {
    let mut text = "\n".to_owned();
    comment(&mut text, &format!("{}.", help(option)));
    for paragraph in more_help(option) {
        comment(&mut text, &paragraph);
    }
    let default = key.default(option);
    comment(
        &mut text,
        &format!(
            "{}{}A change counts {}.",
            default.as_ref().map_or("No default. ", |_| ""),
            variable(option).map_or(String::new(), |name| format!("Environment: {name}. ")),
            key.change.when()
        ),
    );
    let value = default.unwrap_or_else(|| key.example.to_owned());
    let _ = writeln!(text, "#{} = {value}", key.name);
    text
}

/// Writes a comment in lines of limited length.
fn comment(text: &mut String, words: &str) {
    let mut line = "#".to_owned();
    for word in words.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            "#".clone_into(&mut line);
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

/// The help of an option, in one line.
fn help(option: &Arg) -> String {
    let help = option.get_help().map(ToString::to_string);
    let help = help.unwrap_or_default();
    // the default is told apart
    let end = help.find(" [default").unwrap_or(help.len());
    let mut text = help[..end].to_owned();
    let values = option.get_value_parser().possible_values();
    let names: Vec<String> = values
        .into_iter()
        .flatten()
        .map(|value| value.get_name().to_owned())
        .collect();
    if !names.iter().all(|name| text.contains(name)) {
        let _ = write!(text, ": {}", names.join(", "));
    }
    text
}

/// The paragraphs of the long help after the first, without what the file tells in its own way.
fn more_help(option: &Arg) -> Vec<String> {
    let help = option.get_long_help().map(ToString::to_string);
    let help = help.unwrap_or_default();
    let told = |paragraph: &str| {
        let sentences = ["Environment variable:", "Default:"].map(|start| paragraph.find(start));
        let end = sentences.into_iter().flatten().min();
        let text = paragraph[..end.unwrap_or(paragraph.len())].trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    help.split("\n\n").skip(1).filter_map(told).collect()
}

fn variable(option: &Arg) -> Option<&str> {
    option.get_env()?.to_str()
}

/// The rows of the table in `docs/configuration.md`.
#[cfg(test)]
pub(super) fn rows(program: &Command) -> Vec<String> {
    let row = |key: &Key| {
        let option = key.option(program)?;
        let default = key.default(option);
        Some(format!(
            "| `{}` | {} | {} | {} | {} | {} |",
            key.path(),
            help(option),
            key.value.wanted(),
            default.map_or("none".to_owned(), |default| format!("`{default}`")),
            variable(option).map_or(String::new(), |name| format!("`{name}`")),
            key.change.when(),
        ))
    };
    KEYS.iter().filter_map(row).collect()
}
