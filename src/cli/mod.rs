//! The command line.

mod arguments;
mod attached;
mod builder;
mod config;
mod exit;
mod images;
mod install;
mod log;
mod new_file;
mod observe;
mod output;
mod progress;
mod pull_rule;
mod quantity;
mod signals;
mod soci;
mod space;

use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use arguments::{AccessArgs, INDEX, ImageArgs, IndexArgs, REGISTRY};
use config::{ConfigFile, Settings};
use log::LogFormat;
use signals::SignalReceiver;

use crate::{
    error::{Error, Kind, Result, ResultExt},
    keeper::Service,
    kernel::{memory, session},
    layer::DiskLimits,
};

/// Start containers before their image is pulled
///
/// Each layer of an unmodified OCI image becomes a read-only block device with an ext4 file system. The metadata of the file system is
/// made from the SOCI index of the image. File data is fetched from the registry, span by span, when the kernel reads it.
#[derive(Parser)]
#[command(
    name = "socinbd",
    version,
    after_help = format!("{EXAMPLES}\n\n{}", exit::help()),
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
  nginx:1.27, registry.example/team/app@sha256:..., oci:DIR[:TAG], oci-archive:FILE[:TAG],
  containerd://NAMESPACE/NAME

Examples:
  socinbd index create oci:./app:latest
  socinbd convert oci:./app:latest registry.example/app:1
  socinbd attach registry.example/app:1 /mnt
  socinbd run registry.example/app:1 -- sh
  socinbd detach /mnt
  socinbd doctor";

/// The last section of the help of each command.
const GLOBAL: &str = "Global options";

/// The options of every command.
#[derive(Args, Clone, Debug)]
struct GlobalArgs {
    /// State directory: disks and local indexes
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
    /// Runtime directory: sockets and log
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
    /// Configuration file [default: /etc/socinbd/config.toml]
    ///
    /// The options of the command line and of the environment have precedence over it. `socinbd config show --defaults` prints a documented
    /// file. Environment variable: SOCINBD_CONFIG
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_name = "FILE",
        env = "SOCINBD_CONFIG",
        hide_env = true
    )]
    config: Option<PathBuf>,
    /// Print JSON on standard output
    #[arg(help_heading = GLOBAL, long, global = true)]
    json: bool,
    /// Log filter, e.g. info or socinbd=debug
    ///
    /// The default of the daemon is info. Environment variable: SOCINBD_LOG
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_name = "FILTER",
        env = "SOCINBD_LOG",
        hide_env = true,
        value_parser = log::filter,
        default_value = "warn"
    )]
    log: String,
    /// Log format
    ///
    /// Environment variable: SOCINBD_LOG_FORMAT
    #[arg(
        help_heading = GLOBAL,
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        env = "SOCINBD_LOG_FORMAT",
        hide_env = true,
        default_value_t
    )]
    log_format: LogFormat,
    /// Print help; -h is the short form
    #[arg(help_heading = GLOBAL, short, long, global = true, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version
    #[arg(help_heading = GLOBAL, short = 'V', long, global = true, action = ArgAction::Version)]
    version: Option<bool>,
    /// Where the options come from.
    #[arg(skip)]
    settings: Settings,
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
    Restore(attached::restore::RestoreCommand),
    List(observe::list::ListCommand),
    Top(observe::top::TopCommand),
    Why(observe::why::WhyCommand),
    Report(observe::report::ReportCommand),
    Check(attached::check::CheckCommand),
    Df(space::df::DfCommand),
    Prune(space::prune::PruneCommand),
    Pin(space::pin::PinCommand),
    Unpin(space::pin::UnpinCommand),
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
    #[command(subcommand)]
    Config(config::commands::ConfigCommand),
    LogLevel(attached::log_level::LogLevelCommand),
    Daemon(attached::daemon::DaemonCommand),
    Snapshotter(attached::snapshotter::SnapshotterCommand),
    Install(install::InstallCommand),
    Uninstall(install::UninstallCommand),
}

impl Command {
    /// Path of the log file, if the log does not go to standard error.
    fn log_file(&self) -> Option<&Path> {
        match self {
            Self::Daemon(daemon) => daemon.log_file(),
            Self::Snapshotter(snapshotter) => snapshotter.log_file(),
            _ => None,
        }
    }

    /// Whether the command is the daemon, or its keeper.
    fn is_daemon(&self) -> bool {
        let is_one = matches!(self, Self::Daemon(daemon) if !daemon.is_replacement());
        is_one || matches!(self, Self::Snapshotter(_))
    }

    /// Whether the command uses the configuration file beyond its directories. The others look at what a daemon has, or take it down, which
    /// must be possible although the file is wrong.
    fn needs_configuration(&self) -> bool {
        !matches!(
            self,
            Self::Detach(_)
                | Self::List(_)
                | Self::Top(_)
                | Self::Why(_)
                | Self::Report(_)
                | Self::Df(_)
                | Self::Doctor(_)
                | Self::LogLevel(_)
                | Self::Uninstall(_)
        )
    }

    /// The limits of the local disk of a daemon.
    fn disk_limits(&self) -> DiskLimits {
        match self {
            Self::Daemon(daemon) => daemon.disk_limits(),
            Self::Snapshotter(snapshotter) => snapshotter.disk_limits(),
            _ => DiskLimits::default(),
        }
    }

    /// Time without attachments or requests until a daemon exits.
    fn idle_exit(&self) -> Option<Duration> {
        match self {
            Self::Daemon(daemon) => daemon.idle_exit(),
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
            Self::Daemon(_) | Self::Snapshotter(_) | Self::Serve(_) | Self::Builder(_) => true,
            Self::Attach(attach) => attach.is_lasting(),
            _ => false,
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
    let arguments = match soci::translated(arguments.into_iter().collect(), command) {
        Ok(arguments) => arguments,
        Err(told) => return tell(&told),
    };
    let first = command().try_get_matches_from(&arguments);
    let (first, matches) = match first.and_then(|matches| Ok((parsed(&matches)?, matches))) {
        Ok(first) => first,
        Err(told) => return tell(&told),
    };
    // while there is one thread
    let is_daemon = first.command.is_daemon();
    let service = is_daemon.then(Service::take);
    let mut service = match service.unwrap_or(Ok(None)) {
        Ok(service) => service,
        Err(error) => {
            eprintln!("socinbd: {}", error.report());
            return ExitCode::from(exit::AGAIN);
        }
    };
    let mut settings = Settings::new(arguments, first.global.config.clone(), is_daemon);
    // these commands report on the file themselves
    let file = match &first.command {
        Command::Config(command) if command.reports_on_file() => Ok((ConfigFile::default(), None)),
        command => read_configuration(command, &settings, service.as_mut()),
    };
    let (file, problem) = match file {
        Ok(file) => file,
        Err(error) => {
            eprintln!("socinbd: {}", output::plain(&error.report()));
            return exit::code(error.kind());
        }
    };
    let cli = settings.matches(file, self::command, Some(matches));
    let mut cli = match cli.and_then(|matches| parsed(&matches)) {
        Ok(cli) => cli,
        Err(told) => return tell(&told),
    };
    cli.global.settings = settings;
    let command = &cli.command;
    let log = log::start(
        &cli.global.log,
        cli.global.log_format,
        command.log_file(),
        service.is_none(),
        command.is_lasting(),
    );
    if let Err(error) = log {
        eprintln!("socinbd: {}", error.report());
        return exit::code(error.kind());
    }
    if let Some(problem) = problem {
        tracing::error!("{problem}");
    }
    let ended = run(cli, service);
    log::end();
    match ended {
        Ok(code) => code,
        Err(error) => {
            // the standard error of a daemon may be closed
            let report = error.report();
            let _ = writeln!(std::io::stderr(), "socinbd: {}", output::plain(&report));
            exit::code(error.kind())
        }
    }
}

fn parsed(matches: &ArgMatches) -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(matches)
}

/// Reads the configuration file. A daemon that follows another one must serve what that one has served: if the file is wrong by now, the file
/// that the daemon before had is used. Of a wrong file, a command that needs no more gets the directories. In both cases the problem is
/// returned too.
fn read_configuration(
    command: &Command,
    settings: &Settings,
    service: Option<&mut Service>,
) -> Result<(ConfigFile, Option<String>)> {
    let needs_all = command.needs_configuration();
    let is_successor = service.as_ref().is_some_and(|it| it.is_successor());
    let kept = service.and_then(config::kept);
    match settings.read(self::command) {
        Ok(file) => Ok((file, None)),
        Err(error) if is_successor => {
            let file = settings.parse(&kept.unwrap_or_default(), self::command)?;
            let what = "the configuration of the daemon before is used, because the file is wrong";
            Ok((file, Some(format!("{what}: {}", error.report()))))
        }
        Err(error) if !needs_all && error.kind() == Kind::InvalidArgument => {
            let file = settings.read_directories(self::command);
            let what = "the configuration file is wrong, and only its directories are used";
            Ok((file, Some(format!("{what}: {}", error.report()))))
        }
        Err(error) => Err(error),
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
            exit::code(Kind::Io)
        }
        // 0 or 2
        _ => u8::try_from(told.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

fn run(cli: Cli, service: Option<Service>) -> Result<ExitCode> {
    let Cli { global, command } = cli;
    global.check()?;
    // nobody runs it
    if command.is_daemon() && service.is_none() {
        return attached::daemon::keep(&global);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .or_kind(Kind::Io, || "starting the worker threads".into())?;
    let has_signals = command.has_signals();
    let work = async move {
        match command {
            Command::Attach(command) => command.run(&global).await,
            Command::Detach(command) => command.run(&global).await,
            Command::Restore(command) => command.run(&global).await,
            Command::List(command) => command.run(&global).await,
            Command::Top(command) => command.run(&global).await,
            Command::Why(command) => command.run(&global).await,
            Command::Report(command) => command.run(&global).await,
            Command::Check(command) => command.run(&global).await,
            Command::Df(command) => command.run(&global).await,
            Command::Prune(command) => command.run(&global).await,
            Command::Pin(command) => command.run(&global).await,
            Command::Unpin(command) => command.run(&global).await,
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
            Command::Config(command) => command.run(&global).await,
            Command::LogLevel(command) => command.run(&global).await,
            Command::Daemon(command) => command.run(&global, service).await,
            Command::Snapshotter(command) => command.run(&global, service).await,
            Command::Install(command) => command.run(&global).await,
            Command::Uninstall(command) => command.run(&global).await,
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
                Ok(ExitCode::from(exit::INTERRUPTED))
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
