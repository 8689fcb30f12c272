//! What is written to the FUSE device.

use std::{io::IoSlice, os::fd::OwnedFd};

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::protocol::{FUSE_NOTIFY_RESEND, OutHeader};

/// Answers a request. A reply is one write, whole or not at all.
pub(super) fn reply(device: &OwnedFd, unique: u64, result: Result<&[u8], Errno>) {
    let (error, data) = match result {
        Ok(data) => (0, data),
        Err(errno) => (-errno.raw_os_error(), &[][..]),
    };
    let header = OutHeader {
        // at most MAX_READ and a header
        len: u32::try_from(size_of::<OutHeader>() + data.len()).unwrap_or(u32::MAX),
        error,
        unique,
    };
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(data)];
    match rustix::io::retry_on_intr(|| rustix::io::writev(device, &parts)) {
        // ENOENT: the request was interrupted, or answered by a process before this one; ENODEV: all users are gone
        Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
        Err(errno) => tracing::error!("answering a FUSE request: {errno}"),
    }
}

/// Makes the kernel send all requests again that were received and not answered. They get other identifiers; an answer to an old one is
/// then without effect.
pub(super) fn ask_again(device: &OwnedFd) -> Result<(), Errno> {
    let header = OutHeader {
        len: size_of::<OutHeader>() as u32,
        error: FUSE_NOTIFY_RESEND,
        unique: 0,
    };
    rustix::io::retry_on_intr(|| rustix::io::write(device, header.as_bytes())).map(|_| ())
}

/// Whether a file system belongs to the descriptor of the device. A write that is too short for a reply tells.
pub(super) fn has_file_system(device: &OwnedFd) -> bool {
    rustix::io::write(device, &[0]) == Err(Errno::INVAL)
}
