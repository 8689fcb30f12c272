//! A program in its own root: new PID, mount, UTS, IPC and cgroup namespaces, and the network of the host.
//!
//! A separate thread enters the namespaces, builds the root (`root`) and starts the first process (`init`), which starts the program.
//! Nothing is left when it ends: mounts end with their namespace, processes with theirs.

mod init;
mod root;

use std::{
    ffi::OsString,
    io::IsTerminal,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread::JoinHandle,
};

use rustix::{
    mount::{OpenTreeFlags, open_tree},
    process::{Pid, PidfdFlags, Signal, chdir, pidfd_open, pidfd_send_signal},
    thread::UnshareFlags,
};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{
        scratch::{self, Scratch},
        user::Credentials,
    },
    open_files,
};

/// The default search path for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The root of the program.
#[derive(Debug)]
pub enum Root {
    /// A detached mount, which is consumed. A read-only one need not have `/dev`, `/proc` and `/sys`.
    Mount(OwnedFd),
    /// A directory, with the mounts below it.
    Directory(PathBuf),
}

/// A program to run.
#[derive(Debug)]
pub struct ContainerSpec {
    /// Its root.
    pub root: Root,
    /// The root cannot be written to.
    pub read_only: bool,
    /// The program, looked for in `PATH` of its environment, and its arguments.
    pub args: Vec<OsString>,
    /// Its complete environment, `NAME=VALUE`; of equal names the last one is used.
    pub env: Vec<String>,
    /// Its working directory in the root; made if it is missing.
    pub cwd: PathBuf,
    /// The user and groups.
    pub user: Credentials,
    /// The host name that it sees; none leaves the host's.
    pub hostname: Option<String>,
}

impl ContainerSpec {
    /// Adds the variables that container runtimes set if the image does not: `PATH`, `HOME` of the user, and `TERM` for a terminal.
    #[must_use]
    pub fn with_usual_environment(mut self) -> Self {
        let home = self
            .user
            .home
            .as_deref()
            .map_or("/".into(), |home| home.to_string_lossy());
        let mut usual = vec![format!("PATH={PATH}"), format!("HOME={home}")];
        if std::io::stdout().is_terminal()
            && let Ok(term) = std::env::var("TERM")
        {
            usual.push(format!("TERM={term}"));
        }
        usual.append(&mut self.env);
        self.env = usual;
        self
    }
}

/// A running program. Dropping it kills the program.
#[derive(Debug)]
pub struct Container {
    init: OwnedFd,
    pid: u32,
    thread: Option<JoinHandle<Result<i32>>>,
}

impl Container {
    /// The number of the container's first process, outside.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A handle to send signals to the program while another thread waits for it.
    pub fn signals(&self) -> Result<Signals> {
        let init = self.init.try_clone();
        init.map(Signals)
            .or_kind(Kind::Io, || "duplicating a descriptor".into())
    }

    /// Waits for the program: its exit status, or 128 and the number of the signal that ended it.
    pub fn wait(mut self) -> Result<i32> {
        // taken here and in `drop` only
        match self.thread.take() {
            Some(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => Err(Error::new(
                Kind::InvalidArgument,
                "the program has been waited for already",
            )),
        }
    }
}

/// Sends signals to a program.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Sends a signal. Signals of a terminal (Ctrl-C) reach the program by themselves: a process that waits for it in the foreground
    /// ignores them.
    pub fn send(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.0, signal).or_kind(Kind::Kernel, || {
            format!("sending {signal:?} to the program")
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // it may have ended by itself
            let _ = pidfd_send_signal(&self.init, Signal::KILL);
            let _ = thread.join();
        }
    }
}

/// Runs a program to its end with this process's standard streams; see [`Container::wait`].
pub fn run(spec: ContainerSpec) -> Result<i32> {
    spawn(spec)?.wait()
}

/// Starts a program with the standard streams of this process. If the program does not exist, the error is of kind `NotFound`.
pub fn spawn(spec: ContainerSpec) -> Result<Container> {
    let (started, starts) = mpsc::sync_channel(1);
    // The first process dies with the thread that started it (PDEATHSIG), so the thread stays until it ends.
    let thread = std::thread::Builder::new()
        .name("container".into())
        .spawn(move || {
            let (mut child, _scratch) = match start(spec) {
                Ok((child, init, scratch)) => {
                    // the receiver waits for it
                    let _ = started.send(Ok((child.id(), init)));
                    (child, scratch)
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    return Ok(0);
                }
            };
            let status = child
                .wait()
                .or_kind(Kind::Kernel, || "waiting for the container".into())?;
            Ok(exit_code(status))
        })
        .or_kind(Kind::Io, || "starting a thread".into())?;
    match starts.recv() {
        Ok(Ok((pid, init))) => Ok(Container {
            init,
            pid,
            thread: Some(thread),
        }),
        Ok(Err(error)) => Err(error),
        Err(_) => match thread.join() {
            Ok(_) => Err(Error::new(
                Kind::Kernel,
                "the container's thread ended early",
            )),
            Err(panic) => std::panic::resume_unwind(panic),
        },
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// On the container's own thread.
fn start(spec: ContainerSpec) -> Result<(std::process::Child, OwnedFd, Scratch)> {
    let Some((program, args)) = spec.args.split_first() else {
        return Err(Error::new(Kind::InvalidArgument, "no program to run"));
    };
    let root = match spec.root {
        Root::Mount(mount) => root::with_mount_points(mount)?,
        Root::Directory(path) => open_tree(
            rustix::fs::CWD,
            &path,
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .or_kind(Kind::Kernel, || {
            format!("opening the root {}", path.display())
        })?,
    };
    let resolv_conf = root::host_file("/etc/resolv.conf");
    let scratch = scratch::enter_at_top(namespaces())?;
    root::enter(root.as_fd())?;
    root::furnish(resolv_conf)?;
    if let Some(hostname) = &spec.hostname {
        rustix::system::sethostname(hostname.as_bytes()).or_kind(Kind::Kernel, || {
            format!("setting the host name {hostname:?}")
        })?;
    }
    if !spec.cwd.is_dir() {
        // on a read-only root, the next step reports what is missing
        let _ = std::fs::create_dir_all(&spec.cwd);
    }
    chdir(&spec.cwd).or_kind(Kind::NotFound, || {
        format!("entering the working directory {}", spec.cwd.display())
    })?;
    if spec.read_only {
        root::make_read_only()?;
    }

    let mut command = Command::new(program);
    command.args(args).env_clear();
    command.envs(
        spec.env
            .iter()
            .map(|entry| entry.split_once('=').unwrap_or((entry, ""))),
    );
    let (progress, report) = init::Progress::new()?;
    let user = spec.user;
    // SAFETY: the closure runs between fork and exec. It makes system calls, allocates (glibc's fork keeps its allocator usable) and
    // touches no lock that another thread may have held: no logging, no standard streams.
    unsafe {
        command.pre_exec(move || {
            open_files::give_back(None);
            init::become_container(&user, &report)
        });
    }
    let child = command.spawn().map_err(|error| {
        let (kind, what) = match progress.reached() {
            Some(step) => (Kind::Kernel, step.to_owned()),
            None if error.kind() == std::io::ErrorKind::NotFound => (
                Kind::NotFound,
                format!("there is no program {program:?} in the image"),
            ),
            None => (Kind::Kernel, format!("starting {program:?}")),
        };
        Error::with_source(kind, what, error)
    })?;
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| Error::new(Kind::Kernel, "a process without an ID"))?;
    let init = pidfd_open(pid, PidfdFlags::empty())
        .or_kind(Kind::Kernel, || "opening the container's process".into())?;
    Ok((child, init, scratch))
}

fn namespaces() -> UnshareFlags {
    let mut flags = UnshareFlags::NEWPID | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC;
    // a kernel without cgroups has none
    flags.set(
        UnshareFlags::NEWCGROUP,
        std::path::Path::new("/proc/self/ns/cgroup").exists(),
    );
    flags
}
