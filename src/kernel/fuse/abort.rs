//! The end of a file that nobody will serve any more, although a process that is dying still has its descriptors.

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, openat},
    io::Errno,
    mount::MountAttrFlags,
};

use super::{journal::Journal, recovery::sort};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::mount::FsContext,
};

/// Makes the kernel fail all requests of a file, those that wait too, from the [`super::Server::descriptors`] of its last server. If the file
/// has ended already, this succeeds.
pub fn abort(descriptors: Vec<OwnedFd>) -> Result<()> {
    let (device, journal) = sort(descriptors)?;
    let (_, identity) = Journal::open(journal)?;
    let path = format!("{}/abort", identity.connection);
    let context = FsContext::open("fusectl")?;
    context.create()?;
    let control = context.mount(MountAttrFlags::empty())?;
    let failed = || format!("aborting the FUSE file {}", identity.connection);
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = match openat(&control, path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.or_kind(Kind::Kernel, failed)?,
    };
    // Another file gets the number of one that has ended. If this one goes on now, the control file was opened by its own number, and without
    // effect if it ends from now on.
    if has_ended(&device).or_kind(Kind::Kernel, failed)? {
        return Ok(());
    }
    rustix::io::write(&file, b"1")
        .map(drop)
        .or_kind(Kind::Kernel, failed)
}

/// Whether the file of a device has ended: it is not used any more, or was aborted.
fn has_ended(device: &OwnedFd) -> Result<bool, Errno> {
    let mut ends = [PollFd::new(device, PollFlags::empty())];
    rustix::io::retry_on_intr(|| poll(&mut ends, Some(&Timespec::default())))?;
    Ok(ends[0].revents().contains(PollFlags::ERR))
}
