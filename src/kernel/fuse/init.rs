//! INIT, the first request of a file system: what is agreed with the kernel.

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    protocol::{
        FUSE_ASYNC_DIO, FUSE_ASYNC_READ, FUSE_INIT, FUSE_INIT_EXT, FUSE_MAX_PAGES, InHeader,
        InitIn, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
    },
    reply::reply,
};
use crate::error::{Error, Kind, Result, ResultExt};

/// The largest read: the kernel's bound of 256 pages.
pub(super) const MAX_READ: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Reads that the kernel has open with us at a time. Many absent ones must not hold up a present one.
const MAX_BACKGROUND: u16 = 256;
/// Nothing is written; this is the least that the kernel takes.
const MAX_WRITE: u32 = 4096;
/// Room for any request: the kernel asks for it.
const REQUEST_BUFFER: usize = 16 << 10;
/// The kernel sends INIT while it makes the file system.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// The result of INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// The protocol's minor version.
    pub(super) minor: u32,
    /// The flags of what the kernel has.
    pub(super) offered: u64,
    /// Those of them that are in use.
    pub(super) used: u32,
    /// Bytes of the largest read.
    pub(super) max_read: u32,
}

/// Receives INIT and answers it.
pub(super) fn agree(device: &OwnedFd) -> Result<Agreed> {
    let failed = || "receiving the first FUSE request".to_owned();
    rustix::io::retry_on_intr(|| {
        let mut fds = [PollFd::new(device, PollFlags::IN)];
        poll(&mut fds, Some(&PATIENCE))
    })
    .or_kind(Kind::Kernel, failed)?;
    let mut buffer = vec![0; REQUEST_BUFFER];
    let count = rustix::io::retry_on_intr(|| rustix::io::read(device, &mut buffer[..]))
        .or_kind(Kind::Kernel, failed)?;
    let (header, body) = InHeader::read_from_prefix(&buffer[..count])
        .ok()
        .filter(|(header, _)| header.opcode == FUSE_INIT)
        .ok_or_else(|| Error::new(Kind::Kernel, "the first FUSE request is not INIT"))?;
    let init = InitIn::read_from_prefix(body).ok();
    let Some((init, rest)) =
        init.filter(|(init, _)| init.major == KERNEL_VERSION && init.minor >= KERNEL_MINOR_VERSION)
    else {
        reply(device, header.unique, Err(Errno::PROTO));
        let why = "the kernel's FUSE is older than version 7.31 (Linux 5.4)";
        return Err(Error::new(Kind::Unsupported, why));
    };
    let out = answer(&init);
    reply(device, header.unique, Ok(out.as_bytes()));
    Ok(Agreed {
        minor: out.minor,
        offered: u64::from(init.flags) | more_flags(&init, rest) << 32,
        used: out.flags,
        max_read: MAX_READ,
    })
}

/// Flags 32 to 63.
fn more_flags(init: &InitIn, rest: &[u8]) -> u64 {
    let word = u32::read_from_prefix(rest).ok();
    word.filter(|_| init.flags & FUSE_INIT_EXT != 0)
        .map_or(0, |(word, _)| u64::from(word))
}

fn answer(init: &InitIn) -> InitOut {
    InitOut {
        major: KERNEL_VERSION,
        minor: KERNEL_MINOR_VERSION,
        // no read-ahead: it is the layer's own affair
        max_readahead: 0,
        flags: init.flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES),
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..InitOut::default()
    }
}
