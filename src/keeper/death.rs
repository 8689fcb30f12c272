//! The death of a process that the kernel cannot end yet.
//!
//! A thread in uninterruptible sleep does not end when its process is killed. A daemon has one when it mounts, or suspends a mapped device,
//! on a device that it serves itself: the thread waits for an answer that only the next daemon can give. So the next daemon starts as soon as
//! such threads are all that is left.

use std::{fs, process::Child};

use crate::kernel::kept::SERVES;

/// Flags of a thread in `/proc` that has left all system calls: it is exiting, or is part of a core dump.
const EXITING: u32 = PF_EXITING | PF_POSTCOREDUMP | PF_DUMPCORE;
// include/linux/sched.h
const PF_EXITING: u32 = 0x4;
const PF_POSTCOREDUMP: u32 = 0x8;
const PF_DUMPCORE: u32 = 0x200;

/// Processes that are dead and cannot be reaped yet.
#[derive(Debug, Default)]
pub(super) struct Unreaped(Vec<Child>);

impl Unreaped {
    pub(super) fn add(&mut self, process: Child) {
        self.0.push(process);
    }

    /// Reaps those that have ended.
    pub(super) fn reap(&mut self) {
        self.0.retain_mut(|process| match process.try_wait() {
            Ok(None) => true,
            Ok(Some(_)) => {
                tracing::info!("the dead daemon, process {}, has ended", process.id());
                false
            }
            Err(_) => false,
        });
    }
}

/// Whether a process is dead except for threads in uninterruptible sleep that serve no device: those could still send.
pub(super) fn is_dead_but_sleeps(pid: u32) -> bool {
    let is_over = |thread: &Thread| thread.is_dead || thread.is_exiting;
    if !Thread::read(pid, pid).is_some_and(|first| is_over(&first)) {
        return false;
    }
    let threads = threads(pid);
    let mut rest = threads.iter().filter(|thread| !is_over(thread));
    rest.all(|thread| thread.sleeps && !thread.serves)
}

/// Whether a thread of a process is in uninterruptible sleep.
pub(super) fn has_sleeping_thread(pid: u32) -> bool {
    threads(pid).iter().any(|thread| thread.sleeps)
}

fn threads(pid: u32) -> Vec<Thread> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"));
    let entries = entries.into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Thread::read(pid, entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Thread {
    is_dead: bool,
    is_exiting: bool,
    /// It is in uninterruptible sleep.
    sleeps: bool,
    /// It answers requests of the kernel.
    serves: bool,
}

impl Thread {
    fn read(pid: u32, thread: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?)
    }

    /// Reads a line of proc_pid_stat(5).
    fn parse(stat: &str) -> Option<Self> {
        let (start, rest) = stat.rsplit_once(") ")?;
        let (_, name) = start.split_once('(')?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        let flags: u32 = fields.nth(5)?.parse().ok()?;
        Some(Self {
            is_dead: matches!(state, "Z" | "X"),
            is_exiting: flags & EXITING != 0,
            sleeps: state == "D",
            serves: name.starts_with(SERVES),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_read_as_the_kernel_writes_them() {
        let thread = |stat: &str| Thread::parse(stat).unwrap();
        let sleeping = thread("7 (a) b) D 1 7 7 0 -1 4194368 0 0");
        assert!(sleeping.sleeps && !sleeping.is_dead && !sleeping.is_exiting && !sleeping.serves);
        assert!(thread("7 (serve-nbd) D 1 7 7 0 -1 64 0").serves);
        assert!(thread("7 (x) Z 1 7 7 0 -1 4194372 0").is_dead);
        for exiting in ["4", "8", "512"] {
            assert!(thread(&format!("7 (x) D 1 7 7 0 -1 {exiting} 0")).is_exiting);
        }
        assert_eq!(Thread::parse("7 (x D 1"), None);
        assert_eq!(Thread::parse("7 (x) S 1 7"), None);
    }

    #[test]
    fn a_process_that_lives_is_not_dead() {
        assert!(!is_dead_but_sleeps(std::process::id()));
        assert!(!is_dead_but_sleeps(u32::MAX));
        assert!(!threads(std::process::id()).is_empty());
    }
}
