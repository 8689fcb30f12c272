//! Programs that outlive their parent or the terminal.

use std::{os::unix::process::CommandExt, process::Command};

use rustix::process::Signal;

/// Starts the command in a new session (setsid(2)): it has no terminal, and neither a hang-up nor Ctrl-C reaches it.
pub fn detach(command: &mut Command) {
    // SAFETY: the closure makes one system call.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

/// Resets SIGCHLD to its default and unblocks all signals. Some supervisors start programs with SIGCHLD ignored, and then the kernel keeps no
/// exit status to wait for; with SIGTERM blocked, a daemon could only be killed.
pub fn take_usual_signals() {
    // SAFETY: the set is initialized by the call before it is used; both system calls read it, and write nothing. No handler is installed.
    unsafe {
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

/// Whether this process was started to ignore this signal: SIGHUP by nohup(1), SIGINT and SIGQUIT by a shell that starts it in the background.
pub fn ignores(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // bit 0 is signal 1
    ignored.is_some_and(|mask| mask & 1 << (signal.as_raw() - 1) != 0)
}

/// Ends this process with the default action of the signal, so that its parent sees the signal.
pub fn end_by(signal: Signal) {
    // SAFETY: no handler is installed; the second call sends a signal to this thread.
    unsafe {
        libc::signal(signal.as_raw(), libc::SIG_DFL);
        libc::raise(signal.as_raw());
    }
}
