//! The command line.

mod attach;
mod builder;
mod cat;
mod check;
mod convert;
mod copy;
mod daemon;
mod detach;
mod doctor;
mod index;
mod inspect;
mod list;
mod log;
mod making;
mod output;
mod prefetch;
mod progress;
mod record;
mod run;
mod serve;
mod signals;
mod start;
mod tables;
mod why;
mod ztoc;

use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    engine::open::soci_index::{IndexChoice, IndexPolicy},
    error::{Error, Kind, Result, ResultExt},
    kernel::memory,
    oci::{Digest, Platform, Reference},
    source::Access,
};

/// Starts containers before their image is pulled.
///
/// Each layer of an unmodified OCI image becomes a read-only block device with an ext4 file system on it. Its metadata comes from
/// the layer's SOCI index; its data is fetched from the registry, span by span, when the kernel reads it.
#[derive(Parser)]
#[command(name = "socinbd", version, after_help = EXAMPLES, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Images are named as elsewhere: nginx:1.27, registry.example/team/app@sha256:..., oci:DIR[:TAG], oci-archive:FILE[:TAG].

Examples:
  socinbd index create oci:./app:latest        make a SOCI index for an image in an OCI layout
  socinbd convert app:1 registry.example/app:1  make an image with its SOCI index in it
  socinbd attach registry.example/app /mnt     mount an image's root file system, fetched as it is read
  socinbd run registry.example/app -- sh       run a program in an image
  socinbd detach /mnt                          unmount it and give its devices back
  socinbd doctor                               what this machine offers, and what is missing

Exit status: 0 done; 1 failed; 2 wrong usage; 3 not found; 4 not allowed by the registry; 5 a registry or daemon does not answer;
6 in use; 7 corrupt data; 8 not supported; 9 a tag that its registry does not let be replaced;
10 `check` found damage and mended it. `run` exits with the status of the program.";

/// What every command takes.
#[derive(Args, Clone, Debug)]
struct Global {
    /// Folder of all that lasts: layers' disks and local indexes
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SOCINBD_ROOT",
        default_value = "/var/lib/socinbd"
    )]
    root: PathBuf,
    /// Folder of sockets and of the records of attached images
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SOCINBD_RUN_DIR",
        default_value = "/run/socinbd"
    )]
    run_dir: PathBuf,
    /// Print JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Log filter for standard error, e.g. `info`, `socinbd=debug`
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "SOCINBD_LOG",
        default_value = "warn"
    )]
    log: String,
}

#[derive(Subcommand)]
enum Command {
    Attach(attach::Attach),
    Detach(detach::Detach),
    List(list::List),
    Why(why::Why),
    Check(check::Check),
    Run(run::Run),
    Serve(serve::Serve),
    Inspect(inspect::Inspect),
    #[command(subcommand)]
    Index(index::Index),
    Convert(convert::Convert),
    Copy(copy::Copy),
    Cat(cat::Cat),
    #[command(subcommand)]
    Prefetch(prefetch::PrefetchCommand),
    Record(record::Record),
    Ztoc(ztoc::Args),
    Builder(builder::Builder),
    Doctor(doctor::Doctor),
    Daemon(daemon::Daemon),
}

impl Command {
    /// The file that the log goes to, instead of standard error.
    fn log_file(&self) -> Option<&Path> {
        match self {
            Self::Daemon(daemon) => daemon.log_file(),
            _ => None,
        }
    }

    /// Whether it works until it is ended.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Daemon(_) | Self::Serve(_) | Self::Builder(_) => true,
            Self::Attach(attach) => attach.is_lasting(),
            _ => false,
        }
    }
}

/// The exit status of a command whose folders or devices others use.
const BUSY: u8 = 6;
/// The exit status of a command that a signal has ended before it was done, as shells have it.
const INTERRUPTED: u8 = 130;

/// How the registry of an image is reached.
#[derive(Args, Clone, Debug)]
struct AccessArgs {
    /// Docker's configuration file with credentials or their helpers [default: $DOCKER_CONFIG/config.json, ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
    /// Speak plain HTTP to the registry (loopback addresses need no flag)
    #[arg(long)]
    plain_http: bool,
    /// Speak TLS to the registry also at a loopback address
    #[arg(long, conflicts_with = "plain_http")]
    tls: bool,
    /// Trust the certificates in this PEM file as well; may be repeated
    #[arg(long, value_name = "FILE")]
    ca_cert: Vec<PathBuf>,
}

impl AccessArgs {
    /// With what the caller's environment says of credentials, proxies and certificates.
    fn access(&self) -> Result<Access> {
        let mut access = Access::from_environment();
        if let Some(file) = &self.auth_file {
            access.docker_config = Some(absolute(file)?);
        }
        access.plain_http = self.plain_http;
        access.tls = self.tls;
        for file in &self.ca_cert {
            access.ca_certificates.push(absolute(file)?);
        }
        Ok(access)
    }
}

/// An image, and the choices that name one of its manifests and indexes.
#[derive(Args, Clone, Debug)]
struct ImageArgs {
    /// The image: NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    image: Reference,
    /// Platform of a multi-platform image, e.g. linux/arm64 [default: this machine's]
    #[arg(long, short, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    #[command(flatten)]
    access: AccessArgs,
}

/// The SOCI index to use.
#[derive(Args, Clone, Debug)]
struct IndexArgs {
    /// Use the SOCI index with this digest [default: the image's own, then the newest in the registry, then the local one]
    #[arg(long, value_name = "DIGEST")]
    index: Option<Digest>,
    /// Whose index counts: v2, the image's own, --index and the local root; any, also what is pushed to its repository; none
    #[arg(
        long,
        value_enum,
        value_name = "WHOSE",
        default_value_t,
        hide_possible_values = true
    )]
    index_policy: IndexPolicy,
    /// Fail rather than start without a SOCI index, or without the one of this digest
    #[arg(long, value_name = "DIGEST", num_args = 0..=1, require_equals = true, conflicts_with = "index")]
    require_index: Option<Option<Digest>>,
}

impl IndexArgs {
    fn choice(&self) -> IndexChoice {
        IndexChoice {
            digest: self.index.or(self.require_index.flatten()),
            policy: self.index_policy,
            is_required: self.require_index.is_some(),
        }
    }
}

/// Runs the program: the arguments, and the exit status.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    memory::keep_little();
    let matches = Cli::command().get_matches_from(arguments);
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&cli.global.log);
    let filter = match filter {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("socinbd: --log {}: {error}", cli.global.log);
            return ExitCode::from(2);
        }
    };
    if let Err(error) = log::start(filter, cli.command.log_file(), cli.command.is_lasting()) {
        eprintln!("socinbd: {}", error.report());
        return exit_code(error.kind());
    }
    let ended = run(cli);
    log::end();
    match ended {
        Ok(code) => code,
        Err(error) => {
            // a daemon may have lost who started it
            let _ = writeln!(std::io::stderr(), "socinbd: {}", error.report());
            exit_code(error.kind())
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .or_kind(Kind::Io, || "starting the worker threads".into())?;
    let Cli { global, command } = cli;
    let code = runtime.block_on(async move {
        signals::survive_large_files()?;
        tokio::spawn(log::keep_counting());
        match command {
            Command::Attach(command) => command.run(&global).await,
            Command::Detach(command) => command.run(&global).await,
            Command::List(command) => command.run(&global).await,
            Command::Why(command) => command.run(&global).await,
            Command::Check(command) => command.run(&global).await,
            Command::Run(command) => command.run(&global).await,
            Command::Serve(command) => command.run(&global).await,
            Command::Inspect(command) => command.run(&global).await,
            Command::Index(command) => command.run(&global).await,
            Command::Convert(command) => command.run(&global).await,
            Command::Copy(command) => command.run(&global).await,
            Command::Cat(command) => command.run(&global).await,
            Command::Record(command) => command.run(&global).await,
            Command::Prefetch(command) => command.run(&global).await,
            Command::Ztoc(command) => command.run(&global).await,
            Command::Builder(command) => command.run(&global).await,
            Command::Doctor(command) => command.run(&global).await,
            Command::Daemon(command) => command.run(&global).await,
        }
    });
    // a blocked read of standard input or of a mount must not hold the exit up
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

/// The exit status of a kind of error, as the help states it.
fn exit_code(kind: Kind) -> ExitCode {
    ExitCode::from(match kind {
        Kind::InvalidArgument => 2,
        Kind::NotFound => 3,
        Kind::Unauthorized => 4,
        Kind::Unavailable => 5,
        Kind::Busy => BUSY,
        Kind::Corrupt => 7,
        Kind::Unsupported => 8,
        Kind::Immutable => 9,
        Kind::Kernel | Kind::Io => 1,
    })
}

/// A path that still means the same in another working directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).or_kind(Kind::InvalidArgument, || {
        format!("the path {}", path.display())
    })
}

/// Refuses early what only root can do.
fn require_root(what: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(
        Kind::InvalidArgument,
        format!("{what} needs root: mounts and block devices are made; try again with sudo"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
