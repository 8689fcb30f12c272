//! The program of an image, from its configuration (OCI image specification, "config").

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// An image's program and its surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Process {
    /// Comes before the arguments.
    pub entrypoint: Vec<String>,
    /// The arguments when none are given.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `user[:group]`, names or numbers; empty: root.
    pub user: String,
    /// Empty: `/`.
    pub working_dir: String,
    /// e.g. `SIGTERM`; empty: the runtime's choice.
    pub stop_signal: String,
}

impl Process {
    /// The command: the entrypoint, followed by `given`, or by the arguments of the image if `given` is empty.
    pub fn command(&self, given: &[String]) -> Result<Vec<String>> {
        let rest = if given.is_empty() { &self.cmd } else { given };
        let command: Vec<String> = self.entrypoint.iter().chain(rest).cloned().collect();
        if command.is_empty() {
            return Err(Error::new(
                Kind::InvalidArgument,
                "the image has no entrypoint and no command; give one after `--`",
            ));
        }
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_arguments_replace_the_command_and_not_the_entrypoint() {
        let process = Process {
            entrypoint: vec!["e".into()],
            cmd: vec!["c".into()],
            ..Process::default()
        };
        assert_eq!(process.command(&[]).unwrap(), ["e", "c"]);
        assert_eq!(
            process.command(&["x".into(), "y".into()]).unwrap(),
            ["e", "x", "y"]
        );
        assert!(Process::default().command(&[]).is_err());
    }
}
