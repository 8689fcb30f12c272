//! Programs that outlive their parent or the terminal.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{fd::FromRawFd as _, unix::process::CommandExt},
    process::Command,
};

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
    unblock_signals();
    // SAFETY: no handler is installed.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

/// Unblocks all signals in this thread. It may be called between fork and exec.
pub fn unblock_signals() {
    // SAFETY: the set is initialized by the call before it is used; the system call reads it, and writes nothing.
    unsafe {
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Blocks all signals in this thread but those of the terminal's job control, and gives a descriptor that some of them come from: see
/// [`next_signal`]. The others wait for ever.
pub fn receive_signals(signals: &[Signal]) -> io::Result<File> {
    // SAFETY: each set is initialized by a call before it is used; the system calls read them, and write nothing. No handler is installed.
    // The descriptor was made by the last call, and nobody else has it.
    unsafe {
        let mut blocked = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut blocked);
        for signal in [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
            libc::sigdelset(&raw mut blocked, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut());
        let mut received = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut received);
        for signal in signals {
            libc::sigaddset(&raw mut received, signal.as_raw());
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        match libc::signalfd(-1, &raw const received, flags) {
            -1 => Err(io::Error::last_os_error()),
            number => Ok(File::from_raw_fd(number)),
        }
    }
}

/// The next signal that a descriptor of [`receive_signals`] has, if one has come: its number.
pub fn next_signal(mut signals: &File) -> io::Result<Option<i32>> {
    let mut told = [0; size_of::<libc::signalfd_siginfo>()];
    match signals.read_exact(&mut told) {
        Ok(()) => Ok(told.first_chunk().map(|number| i32::from_ne_bytes(*number))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
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

/// Gives signals their default action.
pub fn take_default(signals: &[Signal]) {
    for signal in signals {
        // SAFETY: no handler is installed.
        unsafe {
            libc::signal(signal.as_raw(), libc::SIG_DFL);
        }
    }
}

/// Ends this process with the default action of the signal, so that its parent sees the signal.
pub fn end_by(signal: Signal) {
    // SAFETY: no handler is installed; the second call sends a signal to this thread.
    unsafe {
        libc::signal(signal.as_raw(), libc::SIG_DFL);
        libc::raise(signal.as_raw());
    }
}
