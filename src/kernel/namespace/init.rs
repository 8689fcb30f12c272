//! The first process of the PID namespace of a container, and its child until that executes the program.
//!
//! All of it runs between fork and exec, in a single-threaded copy of a process with many threads: see the note at the caller.

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    mem::MaybeUninit,
    ptr,
};

use rustix::{
    fs::Mode,
    io::Errno,
    process::{Signal, WaitOptions, WaitStatus, set_parent_process_death_signal, wait},
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use crate::{
    error::{Kind, Result, ResultExt},
    kernel::user::Credentials,
};

/// The default capabilities of containers, without MKNOD: there is no device cgroup here that would prevent a node of the host's disk from
/// being opened.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// The reading end of a [`Report`].
pub(super) struct Progress(PipeReader);

/// Tells the parent at which step its child failed: exec's own way back carries an error number only.
pub(super) struct Report(PipeWriter);

impl Progress {
    pub(super) fn new() -> Result<(Self, Report)> {
        let (reader, writer) = io::pipe().or_kind(Kind::Io, || "making a pipe".into())?;
        Ok((Self(reader), Report(writer)))
    }

    /// Reports the step that failed. The child is gone, and the writing end of this process is closed with the command that holds it; what
    /// was written is in the pipe.
    pub(super) fn reached(mut self) -> Option<String> {
        rustix::io::ioctl_fionbio(&self.0, true).ok()?;
        let mut text = [0; 1024];
        let count = self.0.read(&mut text).ok()?;
        let text = String::from_utf8_lossy(text.get(..count)?).into_owned();
        (!text.is_empty()).then_some(text)
    }
}

impl Report {
    fn failed(&self, step: &str, error: &dyn std::fmt::Display) {
        let _ = (&self.0).write_all(format!("{step}: {error}").as_bytes());
    }

    fn at<T>(&self, step: &str, result: Result<T, Errno>) -> io::Result<T> {
        result.map_err(|errno| {
            self.failed(step, &errno);
            errno.into()
        })
    }
}

/// Runs in the first process of the new PID namespace: prepares `/proc`, forks the process that returns from here and becomes the program,
/// and remains as its init.
pub(super) fn become_container(user: &Credentials, report: &Report) -> io::Result<()> {
    report.at(
        "tying the container to this process",
        set_parent_process_death_signal(Some(Signal::KILL)),
    )?;
    super::root::proc().map_err(|error| {
        report.failed("setting up /proc", &error.report());
        io::Error::from(Errno::IO)
    })?;
    drop_bounding(report)?;

    let all = block_all_signals();
    // SAFETY: this process has one thread, and both sides go on as that thread.
    match unsafe { libc::fork() } {
        -1 => {
            let error = io::Error::last_os_error();
            report.failed("starting a process", &error);
            Err(error)
        }
        0 => {
            unblock(&all);
            become_user(user, report)
        }
        program => run_init(program, &all),
    }
}

fn drop_bounding(report: &Report) -> io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if CAPABILITIES.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // past the last one that this kernel knows
            Err(Errno::INVAL) => break,
            result => report.at("dropping capabilities", result)?,
        }
    }
    Ok(())
}

/// Each call works on this thread alone, which is the process.
fn become_user(user: &Credentials, report: &Report) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<_> = user.groups.iter().copied().map(Gid::from_raw).collect();
    report.at("setting the groups", set_thread_groups(&groups))?;
    report.at("setting the group", set_thread_res_gid(gid, gid, gid))?;
    // this takes the capabilities of all but root
    report.at("setting the user", set_thread_res_uid(uid, uid, uid))?;
    // a kernel before 4.3 has no ambient set
    let _ = clear_ambient_capability_set();
    if user.uid == 0 {
        let sets = CapabilitySets {
            effective: CAPABILITIES,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        };
        report.at("dropping capabilities", set_capabilities(None, sets))?;
    }
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    Ok(())
}

/// Waits for all processes that end (every orphan of the namespace becomes a child of this one), and passes signals on. Ends with the
/// status of the program; the kernel then ends the other processes of the namespace.
fn run_init(program: libc::pid_t, all: &libc::sigset_t) -> ! {
    // Among the rest, the end of exec's pipe: the parent waits until the program alone has it.
    close_all();
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid.as_raw_pid() == program {
                exit(exit_code(status));
            }
        }
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: both point to values of the types that the call wants; `info` is written by it, or stays zero.
        let (signal, code) = unsafe {
            let signal = libc::sigwaitinfo(ptr::from_ref(all), info.as_mut_ptr());
            (signal, info.assume_init().si_code)
        };
        // a terminal sends its signals (SI_KERNEL) to the program, too
        if signal > 0 && signal != libc::SIGCHLD && code != libc::SI_KERNEL {
            // SAFETY: a plain system call; the program is a child that has not been waited for, so its number is its own.
            unsafe { libc::kill(program, signal) };
        }
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
        .unwrap_or(255)
}

fn exit(code: i32) -> ! {
    // SAFETY: ends the process at once; nothing of the copied one is to be run.
    unsafe { libc::_exit(code) }
}

/// The mask as it was is empty: the standard library clears it after fork.
fn block_all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` fills the set, and cannot fail for a valid pointer; `sigprocmask` reads it.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut());
        all.assume_init()
    }
}

fn unblock(set: &libc::sigset_t) {
    // SAFETY: `sigprocmask` reads the set.
    unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, ptr::from_ref(set), ptr::null_mut()) };
}

/// Nothing of this process uses a descriptor afterwards.
fn close_all() {
    // SAFETY: no code that owns one of the descriptors runs again in this process.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    if closed != 0 {
        // before Linux 5.9
        for fd in 0..4096 {
            // SAFETY: as above.
            unsafe { libc::close(fd) };
        }
    }
}
