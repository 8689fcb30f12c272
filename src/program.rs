//! Runs outside programs: Docker's credential helpers, the kubelet's credential plugins, and verifiers of images.
//!
//! Their output and their time are limited. A program that takes too long, or that nobody waits for any more, is killed with its process
//! group.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    open_files,
};

/// Maximum number of bytes of standard output.
const MAX_OUTPUT: usize = 64 << 10;
/// Number of bytes of standard error, from its end, that are kept for an error.
const ERROR_BYTES: usize = 4 << 10;
/// Maximum length of a program's words in an error.
const MAX_SHOWN: usize = 300;
/// Maximum time for reading what is left after the program has exited. A process that it leaves in the background may keep the pipes open.
const REST_TIME: Duration = Duration::from_millis(500);
/// Shorter words of an answer are not secrets, and are not removed from an error.
const MIN_SECRET: usize = 6;

/// A program, and what it is given.
pub(crate) struct Program<'a> {
    /// Its name, for errors.
    pub(crate) name: &'a str,
    pub(crate) path: &'a Path,
    pub(crate) arguments: &'a [String],
    /// The whole environment.
    pub(crate) environment: &'a BTreeMap<String, String>,
    pub(crate) input: &'a [u8],
}

/// A program that has exited.
pub(crate) struct Exited {
    pub(crate) status: ExitStatus,
    pub(crate) output: Vec<u8>,
    /// The end of its standard error.
    error_output: Vec<u8>,
}

impl Exited {
    /// The words of its standard error, in brackets, for an error; empty if there are none. Words of the output and `secrets` are left out.
    pub(crate) fn words(&self, secrets: &[&str]) -> String {
        let output = String::from_utf8_lossy(&self.output);
        let is_part = |letter: char| letter.is_alphanumeric() || "+/=_-.".contains(letter);
        let told = output.split(|letter| !is_part(letter));
        let secrets: Vec<&str> = told
            .chain(secrets.iter().copied())
            .filter(|secret| secret.len() >= MIN_SECRET)
            .collect();
        let mut words = String::new();
        for word in String::from_utf8_lossy(&self.error_output).split_whitespace() {
            // the query of a URL may be signed
            let word = word.split('?').next().unwrap_or(word);
            let word = match secrets.iter().any(|secret| word.contains(secret)) {
                true => "...",
                false => word,
            };
            if words.len() + word.len() > MAX_SHOWN {
                words.push_str(" ...");
                break;
            }
            if !words.is_empty() {
                words.push(' ');
            }
            words.extend(word.chars().filter(|letter| !letter.is_control()));
        }
        match words.is_empty() {
            true => words,
            false => format!(" ({words})"),
        }
    }
}

impl Program<'_> {
    /// Runs the program. An error of kind `NotFound`: there is no such file. `Unavailable`: it did not exit in time, or has written too much.
    pub(crate) async fn run(&self, limit: Duration) -> Result<Exited> {
        let failed = || format!("running {}", self.name);
        let mut command = Command::new(self.path);
        command
            .args(self.arguments)
            .env_clear()
            .envs(self.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let child = match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(error).or_kind(Kind::NotFound, failed);
            }
            child => child.or_kind(Kind::Io, failed)?,
        };
        // it waits for its input until then
        open_files::give_back_to(child.id());
        match timeout(limit, Running(child).answer(self.input)).await {
            Ok(exited) => exited.or_kind(Kind::Unavailable, failed),
            Err(_) => Err(Error::new(
                Kind::Unavailable,
                format!(
                    "{} did not answer within {} s",
                    self.name,
                    limit.as_secs_f64()
                ),
            )),
        }
    }
}

/// A program that runs. It is killed with its group when this is dropped.
struct Running(Child);

impl Running {
    async fn answer(mut self, input: &[u8]) -> std::io::Result<Exited> {
        let (stdin, stdout, stderr) = (
            self.0.stdin.take(),
            self.0.stdout.take(),
            self.0.stderr.take(),
        );
        let (mut output, mut error_output) = (Vec::new(), Vec::new());
        let status = {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // a program that does not read its input reports this in its status
                    let _ = stdin.write_all(input).await;
                }
            };
            let talk = async {
                let read = read_all(stdout, &mut output);
                let ((), read, ()) = tokio::join!(write, read, read_end(stderr, &mut error_output));
                read
            };
            tokio::pin!(talk);
            tokio::select! {
                read = &mut talk => {
                    read?;
                    self.0.wait().await?
                }
                status = self.0.wait() => {
                    if let Ok(read) = timeout(REST_TIME, &mut talk).await {
                        read?;
                    }
                    status?
                }
            }
        };
        Ok(Exited {
            status,
            output,
            error_output,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // `None`: it has exited, and the number may be that of another process
        let group = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(group) = group.and_then(Pid::from_raw) {
            // an error: no process is left
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn read_all(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) -> std::io::Result<()> {
    let Some(pipe) = pipe else {
        return Ok(());
    };
    pipe.take(MAX_OUTPUT as u64 + 1).read_to_end(into).await?;
    match into.len() > MAX_OUTPUT {
        true => Err(std::io::Error::other(format!(
            "its answer has more than {MAX_OUTPUT} bytes"
        ))),
        false => Ok(()),
    }
}

/// Reads a pipe to its end, and keeps the last bytes.
async fn read_end(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else {
        return;
    };
    let mut piece = [0; 4 << 10];
    while let Ok(length @ 1..) = pipe.read(&mut piece).await {
        into.extend_from_slice(&piece[..length]);
        let spare = into.len().saturating_sub(ERROR_BYTES);
        into.drain(..spare);
    }
}

/// The program of this name in the directories of a `PATH`.
pub(crate) fn in_path(name: &str, path: Option<&str>) -> Option<std::path::PathBuf> {
    std::env::split_paths(OsStr::new(path.unwrap_or("/usr/local/bin:/usr/bin:/bin")))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn exited(output: &str, error_output: &str) -> Exited {
        Exited {
            status: ExitStatus::default(),
            output: output.into(),
            error_output: error_output.into(),
        }
    }

    async fn shell(script: &str, limit: Duration) -> Result<Exited> {
        let arguments = ["-c".to_owned(), script.to_owned()];
        let environment = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into();
        let program = Program {
            name: "a shell",
            path: Path::new("/bin/sh"),
            arguments: &arguments,
            environment: &environment,
            input: b"the input",
        };
        program.run(limit).await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_program_gets_its_input_and_its_environment_alone() {
        let exited = shell("cat; env >&2; exit 3", LONG).await.unwrap();
        assert_eq!(exited.status.code(), Some(3));
        assert_eq!(exited.output, b"the input");
        let words = exited.words(&[]);
        assert!(words.contains("PATH=/usr/bin:/bin"), "{words}");
        assert!(!words.contains("HOME="), "{words}");
    }

    #[tokio::test]
    async fn a_program_that_takes_too_long_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", file.display());
        let limit = Duration::from_millis(300);
        let error = shell(&script, limit).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.report().contains("did not answer within 0.3 s"));
        let pid = std::fs::read_to_string(file).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let is_gone = || {
            let stat = std::fs::read_to_string(&stat).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let begun = Instant::now();
        while !is_gone() {
            assert!(begun.elapsed() < LONG, "it still runs");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_process_in_the_background_that_keeps_the_pipes_is_not_waited_for() {
        let begun = Instant::now();
        let script = "sleep 20 & echo answer";
        let exited = shell(script, LONG).await.unwrap();
        assert_eq!(exited.output, b"answer\n");
        assert!(begun.elapsed() < Duration::from_secs(15));
    }

    #[tokio::test]
    async fn output_is_bounded_and_of_standard_error_the_end_is_kept() {
        let error = shell("head -c 70000 /dev/zero", LONG).await.err().unwrap();
        assert!(error.report().contains("more than 65536 bytes"));
        let exited = shell("head -c 1000000 /dev/zero >&2; echo the end >&2", LONG);
        let exited = exited.await.unwrap();
        assert!(exited.error_output.ends_with(b"the end\n"));
        assert!(exited.error_output.len() <= ERROR_BYTES);
    }

    #[test]
    fn words_of_a_program_have_no_secrets() {
        let answer = r#"{"username":"AWS","password":"c2VjcmV0+/="}"#;
        let said = "cannot use c2VjcmV0+/= at https://host/x?signature=abc\u{7} with key:hunter22";
        assert_eq!(
            exited(answer, said).words(&["hunter22"]),
            " (cannot use ... at https://host/x with ...)"
        );
        assert_eq!(exited("", "  \n").words(&[]), "");
        let long = exited("", &"word ".repeat(1000)).words(&[]);
        assert!(long.len() < MAX_SHOWN + 10, "{}", long.len());
    }
}
