//! Programs that outlive who started them.

use std::{os::unix::process::CommandExt, process::Command};

/// Starts the command in a session of its own (setsid(2)): it has no terminal, and neither a closed one nor Ctrl-C reaches it.
pub fn detach(command: &mut Command) {
    // SAFETY: the closure makes one system call.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}
