//! The end of mounted file systems: a file system has ended when it is not mounted anywhere and no file of it is in use, in any namespace.
//!
//! The kernel reports this with inotify(7) (`IN_UNMOUNT`). A watch does not keep the file system in use.

use std::{
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use crate::error::{Kind, Result, ResultExt};

/// Bytes of events that are read at a time; one without a name has 16.
const BUFFER: usize = 4096;

/// Tells which of the file systems that it watches have ended.
#[derive(Debug)]
pub struct MountEnds(AsyncFd<OwnedFd>);

/// A file system that is watched by a [`MountEnds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(i32);

impl MountEnds {
    /// Watches nothing yet. For use in a runtime of tokio's.
    pub fn new() -> Result<Self> {
        let context =
            || "starting inotify (is the limit fs.inotify.max_user_instances reached?)".into();
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        let inotify = inotify::init(flags).or_kind(Kind::Kernel, context)?;
        // SAFETY: the descriptor is in the `AsyncFd`, which nothing here replaces or takes apart, and so it is open as long as that.
        let registered = unsafe { AsyncFd::register(inotify) };
        registered.map(Self).or_kind(Kind::Kernel, context)
    }

    /// Watches the file system of a mount, detached or not.
    pub fn watch(&self, mount: BorrowedFd<'_>) -> Result<Watch> {
        // the requested event never occurs on the root of a mount; IN_UNMOUNT is sent without a request
        let flags = WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR;
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        inotify::add_watch(self.0.get_ref(), path, flags)
            .map(Watch)
            .or_kind(Kind::Kernel, || {
                "watching a mount (is the limit fs.inotify.max_user_watches reached?)".into()
            })
    }

    /// The file systems that have ended since the last call; waits until there may be one.
    pub async fn next(&self) -> Result<Vec<Watch>> {
        let context = || "reading inotify's events".into();
        let mut ready = self.0.readable().await.or_kind(Kind::Kernel, context)?;
        let ended = ended(ready.get_inner());
        ready.clear_ready();
        ended.or_kind(Kind::Kernel, context)
    }
}

/// Reads all events that are there.
fn ended(inotify: &OwnedFd) -> Result<Vec<Watch>, Errno> {
    let mut ended = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut events = Reader::new(inotify, &mut buffer);
    loop {
        match events.next() {
            Ok(event) if event.events().contains(ReadFlags::UNMOUNT) => {
                ended.push(Watch(event.wd()));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(ended),
            Err(errno) => return Err(errno),
        }
    }
}
