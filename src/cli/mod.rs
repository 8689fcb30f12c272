//! The command line.

mod attached;
mod builder;
mod images;
mod log;
mod new_file;
mod output;
mod progress;
mod signals;

use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use signals::SignalReceiver;

use crate::{
    engine::open::policy::{IndexChoice, IndexPolicy},
    error::{Error, Kind, Result, ResultExt},
    keeper::Service,
    kernel::{memory, session},
    oci::{Digest, Platform, Reference},
    source::Access,
};

/// Start containers before their image is pulled
///
/// Each layer of an unmodified OCI image becomes a read-only block device with an ext4 file system. The metadata of the file system is
/// made from the SOCI index of the image. File data is fetched from the registry, span by span, when the kernel reads it.
#[derive(Parser)]
#[command(
    name = "socinbd",
    version,
    after_help = EXAMPLES,
    propagate_version = true,
    disable_help_flag = true,
    disable_help_subcommand = true,
    disable_version_flag = true
)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Image references:
  nginx:1.27, registry.example/team/app@sha256:..., oci:DIR[:TAG], oci-archive:FILE[:TAG]

Examples:
  socinbd index create oci:./app:latest
  socinbd convert oci:./app:latest registry.example/app:1
  socinbd attach registry.example/app:1 /mnt
  socinbd run registry.example/app:1 -- sh
  socinbd detach /mnt
  socinbd doctor

Exit status:
  0   success
  1   failure of the kernel or of input or output
  2   wrong usage
  3   not found
  4   refused by the registry
  5   registry or daemon unavailable
  6   in use
  7   corrupt data
  8   not supported
  9   the registry does not allow the tag to be replaced
  10  `check` found damage and repaired it
  `run` exits with the status of its program.";

/// The sections of the help after the command's own options.
const INDEX: &str = "Index options";
const REGISTRY: &str = "Registry options";
const GLOBAL: &str = "Global options";

/// The options of every command.
#[derive(Args, Clone, Debug)]
struct GlobalArgs {
    /// State directory: layer disks and local indexes
    ///
    /// Environment variable: SOCINBD_ROOT
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_name = "DIR",
        env = "SOCINBD_ROOT",
        hide_env = true,
        default_value = "/var/lib/socinbd"
    )]
    root: PathBuf,
    /// Runtime directory: sockets and log of the daemon
    ///
    /// Environment variable: SOCINBD_RUN_DIR
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_name = "DIR",
        env = "SOCINBD_RUN_DIR",
        hide_env = true,
        default_value = "/run/socinbd"
    )]
    run_dir: PathBuf,
    /// Print JSON on standard output
    #[arg(help_heading = GLOBAL, long, global = true)]
    json: bool,
    /// Log filter, e.g. info or socinbd=debug
    ///
    /// Environment variable: SOCINBD_LOG
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_name = "FILTER",
        env = "SOCINBD_LOG",
        hide_env = true,
        default_value = "warn"
    )]
    log: String,
    /// Print help; -h is the short form
    #[arg(help_heading = GLOBAL, short, long, global = true, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version
    #[arg(help_heading = GLOBAL, short = 'V', long, global = true, action = ArgAction::Version)]
    version: Option<bool>,
}

impl GlobalArgs {
    /// The API and the records are JSON, so paths must be UTF-8.
    fn check(&self) -> Result<()> {
        for (flag, directory) in [("--root", &self.root), ("--run-dir", &self.run_dir)] {
            if absolute(directory).is_ok_and(|path| path.to_str().is_none()) {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("{flag} {}: the path must be UTF-8", directory.display()),
                ));
            }
        }
        Ok(())
    }
}

#[derive(Subcommand)]
enum Command {
    Attach(attached::attach::AttachCommand),
    Detach(attached::detach::DetachCommand),
    List(attached::list::ListCommand),
    Why(attached::why::WhyCommand),
    Check(attached::check::CheckCommand),
    Run(attached::run::RunCommand),
    Serve(images::serve::ServeCommand),
    Inspect(images::inspect::InspectCommand),
    #[command(subcommand)]
    Index(images::index::IndexCommand),
    Convert(images::convert::ConvertCommand),
    Copy(images::copy::CopyCommand),
    Cat(images::cat::CatCommand),
    #[command(subcommand)]
    Prefetch(images::prefetch::PrefetchCommand),
    Record(images::record::RecordCommand),
    Ztoc(images::ztoc::ZtocCommand),
    Builder(builder::BuilderCommand),
    Doctor(attached::doctor::DoctorCommand),
    Daemon(attached::daemon::DaemonCommand),
}

impl Command {
    /// Path of the log file, if the log does not go to standard error.
    fn log_file(&self) -> Option<&Path> {
        match self {
            Self::Daemon(daemon) => daemon.log_file(),
            _ => None,
        }
    }

    /// Whether the command handles signals itself.
    fn has_signals(&self) -> bool {
        match self {
            Self::Run(_) | Self::Record(_) => true,
            other => other.is_lasting(),
        }
    }

    /// Whether the command runs until a signal ends it.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Daemon(_) | Self::Serve(_) | Self::Builder(_) => true,
            Self::Attach(attach) => attach.is_lasting(),
            _ => false,
        }
    }
}

/// Exit status if directories or devices are in use by other processes.
const BUSY: u8 = 6;
/// Exit status of a daemon that is to be started again: images may be mounted (EX_TEMPFAIL of sysexits.h).
const AGAIN: u8 = 75;
/// Exit status of a command that a signal has interrupted, as in shells.
const INTERRUPTED: u8 = 130;

/// Access to the registry of an image.
#[derive(Args, Clone, Debug)]
struct AccessArgs {
    /// Docker configuration file with credentials or credential helpers
    ///
    /// Default: $DOCKER_CONFIG/config.json, else ~/.docker/config.json.
    #[arg(help_heading = REGISTRY, long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
    /// Use HTTP without TLS (the default for a loopback address)
    #[arg(help_heading = REGISTRY, long)]
    plain_http: bool,
    /// Use TLS for a loopback address too
    #[arg(help_heading = REGISTRY, long, conflicts_with = "plain_http")]
    tls: bool,
    /// PEM file with additional trusted CA certificates (repeatable)
    #[arg(help_heading = REGISTRY, long, value_name = "FILE")]
    ca_cert: Vec<PathBuf>,
}

impl AccessArgs {
    /// The access, with the credentials, proxies and certificates of the caller's environment.
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

/// An image and one of its platforms.
#[derive(Args, Clone, Debug)]
struct ImageArgs {
    /// Image: NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    image: Reference,
    /// Platform, e.g. linux/arm64 [default: the host's]
    #[arg(long, short, value_name = "PLATFORM")]
    platform: Option<Platform>,
    #[command(flatten)]
    access: AccessArgs,
}

/// The SOCI index to use.
#[derive(Args, Clone, Debug)]
struct IndexArgs {
    /// Digest of the SOCI index to use
    ///
    /// Default: the index that the image names (v2), else the newest that refers to it in the registry (v1), else the newest in the state
    /// directory.
    #[arg(help_heading = INDEX, long, value_name = "DIGEST")]
    index: Option<Digest>,
    /// SOCI indexes to trust: v2, any or none
    ///
    /// v2: the index that the image names, the one given with --index, and those in the state directory. any: also the indexes that refer to
    /// the image in its repository (v1). none: no index; each layer is downloaded whole and checked against the image.
    #[arg(
        help_heading = INDEX,
        long,
        value_enum,
        value_name = "POLICY",
        default_value_t,
        hide_possible_values = true
    )]
    index_policy: IndexPolicy,
    /// Fail if no SOCI index, or not this one, can be used
    #[arg(help_heading = INDEX, long, value_name = "DIGEST", num_args = 0..=1, require_equals = true, conflicts_with = "index")]
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

/// The definition of the command line: for manual pages, completions and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program with these arguments, and returns its exit status.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    memory::keep_little();
    session::take_usual_signals();
    let cli = Cli::command()
        .try_get_matches_from(arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match cli {
        Ok(cli) => cli,
        Err(told) => return tell(&told),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&cli.global.log);
    let filter = match filter {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("socinbd: --log {}: {error}", cli.global.log);
            return ExitCode::from(2);
        }
    };
    // while there is one thread
    let service = match cli.command {
        Command::Daemon(_) => Service::take(),
        _ => Ok(None),
    };
    let service = match service {
        Ok(service) => service,
        Err(error) => {
            eprintln!("socinbd: {}", error.report());
            return ExitCode::from(AGAIN);
        }
    };
    let command = &cli.command;
    let log = log::start(
        filter,
        command.log_file(),
        service.is_none(),
        command.is_lasting(),
    );
    if let Err(error) = log {
        eprintln!("socinbd: {}", error.report());
        return exit_code(error.kind());
    }
    let ended = run(cli, service);
    log::end();
    match ended {
        Ok(code) => code,
        Err(error) => {
            // the standard error of a daemon may be closed
            let report = error.report();
            let _ = writeln!(std::io::stderr(), "socinbd: {}", output::plain(&report));
            exit_code(error.kind())
        }
    }
}

/// Prints the help, the version, or an error in the arguments.
fn tell(told: &clap::Error) -> ExitCode {
    match told.print() {
        Err(error) if !told.use_stderr() && error.kind() != std::io::ErrorKind::BrokenPipe => {
            let _ = writeln!(
                std::io::stderr(),
                "socinbd: writing to standard output: {error}"
            );
            exit_code(Kind::Io)
        }
        // 0 or 2
        _ => u8::try_from(told.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

fn run(cli: Cli, service: Option<Service>) -> Result<ExitCode> {
    let Cli { global, command } = cli;
    global.check()?;
    let service = match (&command, service) {
        // nobody runs it
        (Command::Daemon(daemon), None) => return daemon.keep(&global),
        (_, service) => service,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .or_kind(Kind::Io, || "starting the worker threads".into())?;
    let has_signals = command.has_signals();
    let work = async move {
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
            Command::Daemon(command) => command.run(&global, service).await,
        }
    };
    let mut interrupted = None;
    let code = runtime.block_on(async {
        signals::survive_large_files()?;
        tokio::spawn(log::keep_counting());
        if has_signals {
            return work.await;
        }
        let mut ends = SignalReceiver::that_interrupt()?;
        // dropping the work removes its temporary files
        tokio::select! {
            code = work => code,
            signal = ends.next() => {
                interrupted = Some(signal);
                Ok(ExitCode::from(INTERRUPTED))
            }
        }
    });
    // a blocked read of standard input or of a mount must not hold the exit up
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    if let Some(signal) = interrupted {
        log::end();
        session::end_by(signal);
    }
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

/// The absolute path, which does not depend on the working directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).or_kind(Kind::InvalidArgument, || format!("path {}", path.display()))
}

/// Returns an early error for a command that needs root.
fn require_root(what: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(
        Kind::InvalidArgument,
        format!(
            "{what} needs root, because it makes mounts and block devices; try again with sudo"
        ),
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
