//! What a process was given by what has started it: sd_listen_fds(3), sd_watchdog_enabled(3), `NOTIFY_SOCKET`.

use std::{
    env,
    ffi::OsString,
    fs,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::FIRST;

/// The variable of this program that says that a keeper runs it.
pub const KEEPER: &str = "SOCINBD_KEEPER";

/// The variables that are meant for one process, and not for the programs that it starts.
pub const VARIABLES: [&str; 8] = [
    KEEPER,
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "FDSTORE",
];

/// Descriptors are taken once: a second owner would close those of the first.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// A descriptor and its name.
pub type Inherited = (String, OwnedFd);

/// What this process was given.
#[derive(Debug, Default)]
pub struct Handed {
    /// Where notifications go.
    pub notify_socket: Option<OsString>,
    /// How often one that the process works has to come.
    pub watchdog: Option<Duration>,
    /// A keeper of this program runs it.
    pub is_kept_by_keeper: bool,
    /// Descriptors by their names, closed on exec.
    pub descriptors: Vec<Inherited>,
}

impl Handed {
    /// Takes it out of the environment, so that programs which this one starts do not get it. To be called before anything else: while
    /// there is one thread, and nothing has been opened.
    pub fn take() -> Self {
        let variable = |name: &str| env::var_os(name);
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let own = u64::from(std::process::id());
        let is_for = |name: &str| number(name) == Some(own);
        let count = number("LISTEN_FDS").filter(|_| is_for("LISTEN_PID"));
        let is_watched = variable("WATCHDOG_PID").is_none() || is_for("WATCHDOG_PID");
        let micros = number("WATCHDOG_USEC").filter(|micros| is_watched && *micros > 0);
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let handed = Self {
            notify_socket: variable("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
            watchdog: micros.map(Duration::from_micros),
            is_kept_by_keeper: variable(KEEPER).is_some(),
            descriptors: take_descriptors(count.unwrap_or(0), &names.to_string_lossy()),
        };
        let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        if threads == 1 {
            for name in VARIABLES {
                // SAFETY: no other thread can read the environment meanwhile, for there is none.
                unsafe { env::remove_var(name) };
            }
        }
        handed
    }
}

/// The descriptors that were inherited.
fn take_descriptors(count: u64, names: &str) -> Vec<Inherited> {
    if count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let numbers = FIRST..RawFd::try_from(count).map_or(RawFd::MAX, |it| FIRST.saturating_add(it));
    let names = names.split(':').chain(std::iter::repeat(""));
    let mut taken = Vec::new();
    for (number, name) in numbers.zip(names) {
        // SAFETY: the number is used for one system call that fails where nothing is open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        if fcntl_setfd(borrowed, FdFlags::CLOEXEC).is_err() {
            break;
        }
        // SAFETY: it is open, `LISTEN_PID` says that it was opened for this process, and nobody has taken it before.
        let descriptor = unsafe { OwnedFd::from_raw_fd(borrowed.as_raw_fd()) };
        taken.push((name.to_owned(), descriptor));
    }
    taken
}
