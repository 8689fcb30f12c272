//! Programs that outlive their parent or the terminal.

use std::{os::unix::process::CommandExt, process::Command};

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

/// Whether this process was started to live on when its terminal is closed, as nohup(1) does it: SIGHUP is ignored.
pub fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // bit 0 is signal 1
    ignored.is_some_and(|mask| mask & 1 << (libc::SIGHUP - 1) != 0)
}
