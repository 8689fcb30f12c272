//! The command lines of AWS's `soci` and `soci-snapshotter-grpc`: if the program is started under one of these names, they become command
//! lines of this program.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

mod command;
mod config;
mod daemon;
mod keys;
mod version;

/// The command line of this program that an AWS tool's one stands for. Others are returned as they are. `own` is the definition of the command
/// line of this program.
pub(super) fn translated(
    arguments: Vec<OsString>,
    own: impl FnOnce() -> clap::Command,
) -> Result<Vec<OsString>, clap::Error> {
    let name = arguments.first().map(|name| Path::new(name).file_name());
    match name.flatten().and_then(OsStr::to_str) {
        Some("soci") => command::translated(arguments, own()),
        Some("soci-snapshotter-grpc") => daemon::translated(arguments),
        _ => Ok(arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn line(words: &str) -> Result<String, String> {
        let words = words.split(' ').map(OsString::from).collect();
        let line = translated(words, crate::cli::command).map_err(|error| error.to_string())?;
        let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        Ok(line.join(" "))
    }

    /// Each command line becomes the other one, which this program knows.
    pub(super) fn all_become(lines: &[(&str, &str)]) {
        for (given, expected) in lines {
            assert_eq!(line(given).as_deref(), Ok(*expected));
            let parsed = crate::cli::command().try_get_matches_from(expected.split(' '));
            assert!(parsed.is_ok(), "{expected}: {:?}", parsed.err());
        }
    }

    #[test]
    fn other_names_are_not_translated() {
        all_become(&[("socinbd list --json", "socinbd list --json")]);
        let version = line("soci --version").unwrap_err();
        let expected = "soci version v0.16.1 (socinbd ";
        assert!(version.starts_with(expected), "{version}");
    }
}
