//! `socinbd run`.

use std::{
    ffi::OsString,
    io::IsTerminal,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
};

use clap::Args;
use rustix::process::Signal;

use super::attach::{self, MountArgs};
use crate::{
    blocking::blocking,
    cli::{
        GlobalArgs, ImageArgs, IndexArgs, observe::report, require_root, signals::SignalReceiver,
    },
    engine::Attachment,
    error::{Error, Kind, Result, ResultExt as _},
    kernel::{
        namespace::{self, Container, ContainerSpec, Root},
        user,
    },
};

/// Run the program of an image, without containerd
///
/// The program has its own PID, mount, UTS and IPC namespaces, the network of the host, and a writable layer, which is removed when the
/// program exits. Environment, user, working directory and entrypoint are those of the image configuration.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd run nginx:1.27\n\
\x20 socinbd run --user nobody --env LANG=C registry.example/app -- sh -c id")]
pub(crate) struct RunCommand {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
    #[command(flatten)]
    options: MountArgs,
    #[command(flatten)]
    program: ProgramArgs,
    /// File for a page about what the program has waited for
    ///
    /// It is written when the program has exited, as by `socinbd report`.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// The program to run in the root of an image.
#[derive(Args, Clone, Debug)]
pub(crate) struct ProgramArgs {
    /// Environment variable to set (repeatable)
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// User and group [default: those of the image]
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory [default: that of the image]
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Entrypoint [default: that of the image]
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Command, instead of that of the image
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

impl RunCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("run")?;
        let request = attach::request(&self.image, &self.index, &self.options, true, None)?;
        let (client, offer) = attach::by_daemon(global, &request).await?;
        let attachment = &offer.attachment;
        let ended = async {
            let root = client.mount(&attachment.id).await?;
            client.mounted(&attachment.id).await?;
            // while it is open the daemon has the attachment
            let held = match &self.report {
                Some(_) => Some(root.try_clone().or_kind(Kind::Io, || {
                    "duplicating the descriptor of the mount".into()
                })?),
                None => None,
            };
            let status = self.program.run(root, attachment).await?;
            if let Some(path) = &self.report
                && let Err(error) = report::write_page(&client, &attachment.id, path).await
            {
                // the status is that of the program
                tracing::warn!("there is no report: {}", error.report());
            }
            drop(held);
            Ok(status)
        };
        let ended: Result<u8> = ended.await;
        let released = client.release(&attachment.id).await;
        let status = ended?;
        released?;
        Ok(ExitCode::from(status))
    }
}

impl ProgramArgs {
    /// Runs the program of the image, or that of the options, and returns its exit status. The root is closed when the program has exited.
    pub(crate) async fn run(self, root: OwnedFd, attachment: &Attachment) -> Result<u8> {
        let mut process = attachment.process.clone();
        if let Some(entrypoint) = self.entrypoint {
            process.entrypoint = vec![entrypoint];
            process.cmd.clear();
        }
        let command = process.command(&self.command)?;
        let user = self.user.unwrap_or(process.user);
        let env = process.env.into_iter().chain(self.env).collect();
        let cwd = self.workdir.unwrap_or(process.working_dir);
        let hostname = attachment.id[..12].to_owned();
        let start = move || {
            let spec = ContainerSpec {
                read_only: false,
                args: command.into_iter().map(OsString::from).collect(),
                user: user::resolve(&root, &user)?,
                env,
                cwd: Path::new("/").join(cwd),
                hostname: Some(hostname),
                root: Root::Mount(root),
            };
            namespace::spawn(spec.with_usual_environment())
        };
        // caught before the program starts, so that a signal during the start is passed on
        let signals = SignalReceiver::to_pass_on()?;
        let ended = async {
            let container = blocking(start).await?;
            wait(container, signals).await
        };
        ended.await.map_err(|error: Error| {
            error.context(format!("running the program of {}", attachment.reference))
        })
    }
}

/// Waits for the program, and passes on the signals that arrive meanwhile.
async fn wait(container: Container, mut signals: SignalReceiver) -> Result<u8> {
    // a terminal's Ctrl-C goes to the program as well as to us
    let is_terminal = std::io::stdin().is_terminal();
    let program = container.signals()?;
    let mut ended = pin!(blocking(move || container.wait()));
    loop {
        let signal = tokio::select! {
            ended = &mut ended => {
                return Ok(u8::try_from(ended?).unwrap_or(u8::MAX));
            }
            signal = signals.next() => signal,
        };
        let is_of_terminal = is_terminal && matches!(signal, Signal::INT | Signal::QUIT);
        if !is_of_terminal {
            // fails if the program has exited just now
            let _ = program.send(signal);
        }
    }
}
