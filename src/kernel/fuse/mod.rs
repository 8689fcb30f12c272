//! One FUSE file that is a disk, for kernels without nbd; a loop device uses it as its backing file.
//!
//! The file system consists of this file: its root is a regular file, it is not mounted anywhere, and it ends with the last user of the
//! file. The thread that takes a request answers it at once if the data is present. Otherwise the request is answered when the data has
//! been fetched, in any order, and the thread continues. The pages of the file are not cached (`FOPEN_DIRECT_IO`): the ext4 above caches
//! them, once.
//!
//! The file survives its server if another process has the descriptors of the device and of the `journal`: requests then wait, and a
//! successor ([`resume`]) answers also those that were received already.

mod abort;
mod init;
mod journal;
mod protocol;
mod pulse;
mod queue;
mod recovery;
mod reply;
mod requests;
mod server;
mod slots;
mod step;

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx},
    mount::MountAttrFlags,
};
use tokio::runtime::Handle;

pub use self::{
    abort::abort,
    journal::JOURNAL_VERSION,
    recovery::{Recovery, resume, resume_in_steps},
    server::Server,
    step::{AtStep, Step},
};
use self::{
    init::MAX_READ,
    journal::{Identity, Journal},
    requests::{MODE, Served},
};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::mount::FsContext,
    layer::ServedDisk,
};

/// A disk as a file. Dropping it ends the server; the file's other users (a loop device) get errors from then on, so their mounts are
/// taken down before.
pub struct FuseFile {
    file: OwnedFd,
    server: Server,
}

impl FuseFile {
    /// The file, open for reading.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// As [`Server::descriptors`].
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.server.descriptors()
    }

    /// The server alone, once something else has the file open. It ends by itself when the last user of the file is gone.
    pub fn into_server(self) -> Server {
        self.server
    }
}

/// Serves a disk as a file. `name` is shown in mount tables. Fetches run on `runtime`. `keep` gets the [`Server::descriptors`] before anything
/// waits for the file: a process that is killed while it waits for its own file ends only when a successor answers.
pub fn serve(
    disk: Arc<dyn ServedDisk>,
    name: &str,
    runtime: &Handle,
    keep: impl FnOnce(&[BorrowedFd<'_>]),
) -> Result<FuseFile> {
    let device = openat(
        CWD,
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(|errno| super::driver_error("/dev/fuse", "fuse", errno))?;
    let context = FsContext::open("fuse")?;
    context.string("source", name)?;
    context.string("fd", device.as_raw_fd().to_string())?;
    context.string("rootmode", format!("{MODE:o}"))?;
    context.string("user_id", "0")?;
    context.string("group_id", "0")?;
    context.string("max_read", MAX_READ.to_string())?;
    context.flag("ro")?;
    context.create()?;
    let agreed = init::agree(&device)?;
    let mount =
        context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    let journal = Journal::create(&Identity {
        size: disk.size(),
        connection: connection(&mount)?,
        agreed,
    })?;
    keep(&[device.as_fd(), journal.as_fd()]);
    // opening the file is a request to the threads
    let at_step: AtStep = Arc::new(|_| ());
    let server = Server::start(Served::new(device, journal, disk, runtime, at_step))?;
    let file = openat(
        CWD,
        format!("/proc/self/fd/{}", mount.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .or_kind(Kind::Kernel, || format!("opening the FUSE file of {name}"))?;
    // the kernel knows the attributes from now on: it does not ask for them while a loop device is locked
    rustix::fs::fstat(&file).or_kind(Kind::Kernel, || {
        format!("looking at the FUSE file of {name}")
    })?;
    Ok(FuseFile { file, server })
}

/// The kernel's number of a file system, without a request to its server.
fn connection(mount: &OwnedFd) -> Result<u32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(mount, "", flags, StatxFlags::empty())
        .or_kind(Kind::Kernel, || "looking at a FUSE file system".into())?;
    Ok(stat.stx_dev_minor)
}
