//! The verifiers of the configuration file: `[[verifiers]]`. They are no options, because each has several values.

use std::path::{Path, PathBuf};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::engine::verifiers::{OnFailure, TIME_LIMIT, Verifier};

/// The name of the tables.
pub(super) const TABLE: &str = "verifiers";
/// Maximum number of verifiers.
const MAX_VERIFIERS: usize = 64;
/// The longest time of a verifier, in seconds.
const MAX_TIME_LIMIT: u64 = 300;

/// The part of the documented file.
pub(super) const DOCUMENTED: &str = "
# Programs that verify images before their first mount, with the protocol of containerd's image
# verifiers. One table for each; all whose pattern matches must accept an image. The pattern is for
# references without tag and digest: * is any text, ? one character. args: the program's own
# arguments. time-limit: in seconds. on-failure: refuse, or warn. A change counts after a reload.
#[[verifiers]]
#pattern = \"registry.example/team/*\"
#program = \"/usr/local/bin/verify-signature\"
#args = [\"-key\", \"/etc/socinbd/cosign.pub\"]
#time-limit = 10
#on-failure = \"refuse\"
";

/// A mistake: its offset in the file, and what is wrong.
type Mistakes = Vec<(usize, String)>;

/// Reads the verifiers, and what is wrong with them.
pub(super) fn read(value: &Spanned<DeValue<'_>>) -> (Vec<Verifier>, Mistakes) {
    let (mut found, mut mistakes) = (Vec::new(), Vec::new());
    let offset = value.span().start;
    let DeValue::Array(items) = value.get_ref() else {
        mistakes.push((offset, format!("write [[{TABLE}]], one for each verifier")));
        return (found, mistakes);
    };
    if items.len() > MAX_VERIFIERS {
        let what = format!("there are more than {MAX_VERIFIERS} verifiers");
        mistakes.push((offset, what));
        return (found, mistakes);
    }
    for item in items.iter() {
        let offset = item.span().start;
        match item.get_ref() {
            DeValue::Table(keys) => found.extend(verifier(keys, offset, &mut mistakes)),
            _ => mistakes.push((offset, format!("{TABLE}: a table is wanted"))),
        }
    }
    (found, mistakes)
}

fn verifier(keys: &DeTable<'_>, offset: usize, mistakes: &mut Mistakes) -> Option<Verifier> {
    let before = mistakes.len();
    let (mut pattern, mut program) = (None, None);
    let mut verifier = Verifier {
        pattern: String::new(),
        program: PathBuf::new(),
        args: Vec::new(),
        time_limit: TIME_LIMIT,
        on_failure: OnFailure::default(),
    };
    for (name, value) in keys.iter() {
        let wanted = match (name.get_ref().as_ref(), value.get_ref()) {
            ("pattern", DeValue::String(text)) if !text.is_empty() => {
                pattern = Some(text.to_string());
                continue;
            }
            ("pattern", _) => "a string that is not empty",
            ("program", DeValue::String(text)) if Path::new(&**text).is_absolute() => {
                program = Some(PathBuf::from(&**text));
                continue;
            }
            ("program", _) => "an absolute path as a string",
            ("args", DeValue::Array(items)) => {
                let texts = items.iter().map(|item| match item.get_ref() {
                    DeValue::String(text) => Some(text.to_string()),
                    _ => None,
                });
                if let Some(args) = texts.collect() {
                    verifier.args = args;
                    continue;
                }
                "a list of strings"
            }
            ("args", _) => "a list of strings",
            ("time-limit", DeValue::Integer(number)) => {
                let seconds = number.as_str().parse().unwrap_or(0);
                if (1..=MAX_TIME_LIMIT).contains(&seconds) {
                    verifier.time_limit = seconds;
                    continue;
                }
                "a whole number of seconds from 1 to 300"
            }
            ("time-limit", _) => "a whole number of seconds from 1 to 300",
            ("on-failure", DeValue::String(text)) if text == "refuse" => {
                verifier.on_failure = OnFailure::Refuse;
                continue;
            }
            ("on-failure", DeValue::String(text)) if text == "warn" => {
                verifier.on_failure = OnFailure::Warn;
                continue;
            }
            ("on-failure", _) => "one of refuse, warn",
            (other, _) => {
                let other: String = other.chars().take(60).collect();
                let what = format!(
                    "unknown key {other:?} in [[{TABLE}]]; the keys of this table are pattern, program, args, time-limit, on-failure"
                );
                mistakes.push((name.span().start, what));
                continue;
            }
        };
        let what = format!("{TABLE}.{}: {wanted} is wanted", name.get_ref());
        mistakes.push((value.span().start, what));
    }
    for (name, is_there) in [
        ("pattern", pattern.is_some() || keys.contains_key("pattern")),
        ("program", program.is_some() || keys.contains_key("program")),
    ] {
        if !is_there {
            mistakes.push((offset, format!("a verifier needs {name}")));
        }
    }
    (mistakes.len() == before).then(|| Verifier {
        pattern: pattern.unwrap_or_default(),
        program: program.unwrap_or_default(),
        ..verifier
    })
}
