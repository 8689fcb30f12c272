//! The exit statuses: one table for the help, the documents and the code.

use std::{fmt::Write as _, process::ExitCode};

use crate::error::Kind;

/// Exit status if directories or devices are in use by other processes.
pub(super) const BUSY: u8 = 6;
/// Exit status of `check` if damage was found and all of it was repaired.
pub(super) const REPAIRED: u8 = 10;
/// Exit status of a daemon that is to be started again: images may be mounted (EX_TEMPFAIL of sysexits.h).
pub(super) const AGAIN: u8 = 75;
/// Exit status of a command that a signal has interrupted, as in shells.
pub(super) const INTERRUPTED: u8 = 130;

/// All statuses, and what they say.
const STATUSES: [(u8, &str); 13] = [
    (0, "success"),
    (1, "failure of the kernel or of input or output"),
    (2, "wrong usage, or a wrong configuration file"),
    (3, "not found"),
    (4, "refused by the registry or a verifier"),
    (5, "registry or daemon unavailable"),
    (BUSY, "in use"),
    (7, "corrupt data"),
    (8, "not supported"),
    (9, "the registry does not allow the tag to be replaced"),
    (REPAIRED, "`check` found damage and repaired it"),
    (AGAIN, "a daemon ends, and the next one takes over"),
    (INTERRUPTED, "interrupted by a signal"),
];

/// The section of the help.
pub(super) fn help() -> String {
    let mut text = "Exit status:\n".to_owned();
    for (status, meaning) in STATUSES {
        let _ = writeln!(text, "  {status:<3} {meaning}");
    }
    text + "  `run` exits with the status of its program."
}

/// The exit status of a kind of error.
pub(super) fn code(kind: Kind) -> ExitCode {
    ExitCode::from(status(kind))
}

fn status(kind: Kind) -> u8 {
    match kind {
        Kind::Kernel | Kind::Io => 1,
        Kind::InvalidArgument => 2,
        Kind::NotFound => 3,
        Kind::Unauthorized => 4,
        Kind::Unavailable => 5,
        Kind::Busy => BUSY,
        Kind::Corrupt => 7,
        Kind::Unsupported => 8,
        Kind::Immutable => 9,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn each_kind_has_a_status_of_the_table() {
        for kind in [
            Kind::Kernel,
            Kind::Io,
            Kind::InvalidArgument,
            Kind::NotFound,
            Kind::Unauthorized,
            Kind::Unavailable,
            Kind::Busy,
            Kind::Corrupt,
            Kind::Unsupported,
            Kind::Immutable,
        ] {
            let row = STATUSES.iter().find(|row| row.0 == status(kind));
            assert!(row.is_some_and(|row| row.0 > 0), "{kind:?}");
        }
        assert!(STATUSES.is_sorted_by(|one, other| one.0 < other.0));
    }

    #[test]
    fn the_documents_have_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/service.md");
        let text = fs::read_to_string(path).unwrap();
        let section = text.split("\n## Exit statuses\n").nth(1).unwrap();
        let section = section.split("\n## ").next().unwrap();
        let rows: Vec<&str> = section
            .lines()
            .filter(|line| line.starts_with("| ") && !line.starts_with("| status"))
            .collect();
        let expected: Vec<String> = STATUSES
            .iter()
            .map(|(status, meaning)| format!("| {status} | {meaning} |"))
            .collect();
        assert_eq!(rows, expected);
    }
}
