//! A FUSE file whose server has ended, and a successor with its descriptors.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use rustix::fs::{FileType, OFlags, makedev};
use tokio::runtime::Handle;

use super::{
    journal::{Identity, Journal, SLOTS, THREADS},
    protocol::FUSE_HAS_RESEND,
    reply::{ask_again, has_file_system},
    requests::Served,
    server::Server,
    step::{AtStep, Step},
};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::kept::corrupt,
    layer::ServedDisk,
};

/// The number of `/dev/fuse`.
const DEVICE: (u32, u32) = (10, 229);

/// Where a successor finds the requests that were not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// The kernel sends them again where it can; elsewhere they are in the journal.
    Either,
    /// The kernel sends them again (FUSE_NOTIFY_RESEND, Linux 6.9).
    Resend,
    /// They are in the journal.
    Journal,
}

/// Goes on with a file whose server has ended, from its [`Server::descriptors`]. Everything is checked before anything is received or
/// answered, so after an error a process that can use the descriptors finds them as they were.
pub fn resume(
    descriptors: Vec<OwnedFd>,
    disk: Arc<dyn ServedDisk>,
    runtime: &Handle,
) -> Result<Server> {
    let nothing: AtStep = Arc::new(|_| ());
    resume_in_steps(descriptors, disk, runtime, Recovery::Either, nothing)
}

/// As [`resume`], for tests: with one way of recovery only, and with `at_step` called at each step.
pub fn resume_in_steps(
    descriptors: Vec<OwnedFd>,
    disk: Arc<dyn ServedDisk>,
    runtime: &Handle,
    recovery: Recovery,
    at_step: AtStep,
) -> Result<Server> {
    let (device, journal) = sort(descriptors)?;
    let (journal, identity) = Journal::open(journal)?;
    check(&device, &identity, &*disk)?;
    let can_resend = identity.agreed.offered & FUSE_HAS_RESEND != 0;
    let is_coming = match recovery {
        Recovery::Journal => false,
        Recovery::Either if !can_resend => false,
        Recovery::Either => match ask_again(&device) {
            Ok(()) => true,
            Err(errno) => {
                tracing::warn!("FUSE requests are taken from the journal: {errno}");
                false
            }
        },
        Recovery::Resend => {
            ask_again(&device).or_kind(Kind::Kernel, || "asking for FUSE requests".into())?;
            true
        }
    };
    if is_coming {
        at_step(Step::AskedAgain);
        empty(&journal, &at_step);
    }
    Server::start(Served::new(device, journal, disk, runtime, at_step))
}

/// The device and the journal.
pub(super) fn sort(descriptors: Vec<OwnedFd>) -> Result<(OwnedFd, OwnedFd)> {
    let (mut devices, mut journals) = (Vec::new(), Vec::new());
    for descriptor in descriptors {
        let stat = rustix::fs::fstat(&descriptor)
            .or_kind(Kind::Io, || "looking at a kept descriptor".into())?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice if stat.st_rdev == makedev(DEVICE.0, DEVICE.1) => {
                devices.push(descriptor);
            }
            FileType::RegularFile => journals.push(descriptor),
            other => {
                return Err(corrupt(format!(
                    "a kept descriptor of a FUSE file is a {other:?}"
                )));
            }
        }
    }
    let journal = the_one(journals, "journal")?;
    Ok((the_one(devices, "device")?, journal))
}

fn check(device: &OwnedFd, identity: &Identity, disk: &dyn ServedDisk) -> Result<()> {
    if identity.size != disk.size() {
        return Err(corrupt(format!(
            "the kept FUSE file has {} bytes, and its disk {}",
            identity.size,
            disk.size()
        )));
    }
    let flags = rustix::fs::fcntl_getfl(device)
        .or_kind(Kind::Io, || "looking at a kept FUSE device".into())?;
    if !flags.contains(OFlags::RDWR | OFlags::NONBLOCK) {
        return Err(corrupt(
            "the kept FUSE device is not open as its server opened it",
        ));
    }
    if !has_file_system(device) {
        return Err(corrupt("the kept FUSE device has no file system"));
    }
    match connection(device)? {
        Some(number) if number != identity.connection => Err(corrupt(
            "the kept FUSE device and journal are of different files",
        )),
        _ => Ok(()),
    }
}

/// The number of a device's file system, where the kernel tells it (Linux 6.18 does).
fn connection(device: &OwnedFd) -> Result<Option<u32>> {
    let path = format!("/proc/self/fdinfo/{}", device.as_raw_fd());
    let text =
        std::fs::read_to_string(&path).or_kind(Kind::Kernel, || format!("reading {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("fuse_connection:"));
    Ok(line.and_then(|number| number.trim().parse().ok()))
}

/// Empties a journal whose requests come again with other identifiers.
fn empty(journal: &Journal, at_step: &AtStep) {
    for slot in (0..SLOTS).filter(|slot| journal.noted(*slot).is_some()) {
        journal.free(slot);
        at_step(Step::Emptied);
    }
    for thread in (0..THREADS).filter(|thread| journal.landed(*thread).is_some()) {
        journal.clear(thread);
        at_step(Step::Emptied);
    }
}

fn the_one(descriptors: Vec<OwnedFd>, what: &str) -> Result<OwnedFd> {
    let count = descriptors.len();
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| {
        corrupt(format!(
            "the kept descriptors of a FUSE file have {count} {what}s and not one"
        ))
    })?;
    Ok(descriptor)
}
