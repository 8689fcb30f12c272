//! The limit of open files.
//!
//! A process that serves layers has several descriptors open for each. The usual soft limit of 1024 is there for programs that use
//! select(2), which this one does not; the hard limit is what the machine's owner allows. So the soft limit becomes the hard one, and the
//! programs that are started get back what this process was given: they may use select(2), or close all descriptors up to the limit.

use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// The limits that this process was given, once they have been raised.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of this process to its hard one. Without the right to do so it stays.
pub(crate) fn raise() {
    let given = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: given.maximum,
        maximum: given.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => drop(GIVEN.set(given)),
        Err(errno) => tracing::warn!("the limit of open files stays as it is: {errno}"),
    }
}

/// Gives a program that was just started, or this process (`None`) between fork and exec, the limits that this process was given. It
/// makes one system call.
pub(crate) fn give_back(program: Option<Pid>) {
    if let Some(given) = GIVEN.get() {
        // one that has ended already needs none
        let _ = prlimit(program, Resource::Nofile, *given);
    }
}

/// As [`give_back`], for a program that is known by its number.
pub(crate) fn give_back_to(program: Option<u32>) {
    let pid = program.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    if pid.is_some() {
        give_back(pid);
    }
}
