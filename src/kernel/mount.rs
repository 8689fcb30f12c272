//! Mounts through descriptors (fsopen(2), fsmount(2), move_mount(2)): made detached, attached at the end.

pub mod end;
pub mod idmap;
pub mod info;
pub mod overlay;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    },
};

use super::busy;
use crate::error::{Error, Kind, Result, ResultExt};

/// Mounts the ext4 file system of a block device, read-only and `nodev`, detached: the mount lives as long as the descriptor or
/// anything made from it. Mounting a device a second time gives another mount of the same file system, with one page cache.
pub fn ext4(device: &Path) -> Result<OwnedFd> {
    let describe = || format!("mounting ext4 of {}", device.display());
    let context = FsContext::open("ext4").map_err(|error| error.context(describe()))?;
    context
        .string("source", device)
        .and_then(|()| context.flag("ro"))
        // an error is returned to the reader; a superblock cannot make the host panic
        .and_then(|()| context.string("errors", "continue"))
        .and_then(|()| context.create())
        .and_then(|()| {
            context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV)
        })
        .map_err(|error| error.context(describe()))
}

/// Attaches a detached mount at a path of this thread's mount namespace. The descriptor remains valid for the mount.
pub fn attach(mount: BorrowedFd<'_>, path: &Path) -> Result<()> {
    move_mount(
        mount,
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|errno| {
        let kind = match errno {
            Errno::NOENT | Errno::NOTDIR => Kind::NotFound,
            _ => Kind::Kernel,
        };
        Error::with_source(kind, format!("mounting at {}", path.display()), errno)
    })
}

/// Unmounts the topmost mount at a path. A mount in use is an error of kind `Busy` that names the processes.
pub fn detach(path: &Path) -> Result<()> {
    match unmount(path, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(busy_error(path)),
        Err(errno @ (Errno::INVAL | Errno::NOENT)) => Err(Error::with_source(
            Kind::NotFound,
            format!("nothing is mounted at {}", path.display()),
            errno,
        )),
        Err(errno) => Err(Error::with_source(
            Kind::Kernel,
            format!("unmounting {}", path.display()),
            errno,
        )),
    }
}

/// Unmounts at once, for cleaning up; users of the mount keep using it, and the last one ends it.
pub fn detach_lazily(path: &Path) -> Result<()> {
    unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
        .or_kind(Kind::Kernel, || format!("unmounting {}", path.display()))
}

fn busy_error(path: &Path) -> Error {
    let below: Vec<_> = info::own()
        .unwrap_or_default()
        .into_iter()
        .map(|mount| mount.mount_point)
        .filter(|point| point.starts_with(path) && point != path)
        .map(|point| point.display().to_string())
        .collect();
    let users = busy::users(path).unwrap_or_default();
    let users: Vec<_> = users.into_iter().filter(busy::User::holds_mount).collect();
    let mut who = Vec::new();
    if !users.is_empty() {
        who.push(busy::names(&users));
    }
    who.extend(below.into_iter().map(|point| format!("a mount at {point}")));
    let who = if who.is_empty() {
        "a process that cannot be seen from here".to_owned()
    } else {
        who.join(", ")
    };
    Error::with_source(
        Kind::Busy,
        format!("{} is in use by {who}", path.display()),
        Errno::BUSY,
    )
}

/// Unmounts all mounts below a directory at once, as [`detach_lazily`].
pub fn detach_below(directory: &Path) -> Result<()> {
    let mut mounts = info::own()?;
    mounts.retain(|mount| mount.is_below(directory) && mount.mount_point != directory);
    // what is mounted in a mount, or over it, first
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.mount_point.as_os_str().len()));
    mounts
        .iter()
        .try_for_each(|mount| detach_lazily(&mount.mount_point))
}

/// Whether something is mounted at exactly this path.
pub fn is_mount(path: &Path) -> Result<bool> {
    Ok(info::at(path)?.is_some())
}

/// A file system context (fsopen(2)). Its errors include the kernel's messages from the log of the context.
pub(super) struct FsContext {
    fd: OwnedFd,
    fs_type: &'static str,
}

impl FsContext {
    pub(super) fn open(fs_type: &'static str) -> Result<Self> {
        let fd = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
            Errno::NODEV => Error::with_source(
                Kind::Unsupported,
                format!("this kernel does not support {fs_type} (try `modprobe {fs_type}`)"),
                errno,
            ),
            Errno::PERM => Error::with_source(
                Kind::Unauthorized,
                "mounting needs root (CAP_SYS_ADMIN)",
                errno,
            ),
            _ => Error::with_source(Kind::Kernel, format!("fsopen of {fs_type}"), errno),
        })?;
        Ok(Self { fd, fs_type })
    }

    pub(super) fn string(&self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Result<()> {
        let value = value.as_ref();
        fsconfig_set_string(&self.fd, key, value)
            .map_err(|errno| self.error(&format!("option {key}={}", value.display()), errno))
    }

    pub(super) fn flag(&self, key: &str) -> Result<()> {
        fsconfig_set_flag(&self.fd, key)
            .map_err(|errno| self.error(&format!("option {key}"), errno))
    }

    pub(super) fn create(&self) -> Result<()> {
        fsconfig_create(&self.fd)
            .map_err(|errno| self.error("creating the file system context", errno))
    }

    pub(super) fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd> {
        fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error("fsmount", errno))
    }

    fn error(&self, what: &str, errno: Errno) -> Error {
        let mut context = format!("{}: {what}", self.fs_type);
        let mut line = [0; 1024];
        // each read gives one message, `e text` for an error; at the end ENODATA
        while let Ok(count @ 1..) = rustix::io::read(self.fd.as_fd(), &mut line) {
            let text = String::from_utf8_lossy(&line[..count]);
            context.push_str(&format!(" (kernel: {})", text.trim_end()));
        }
        Error::with_source(Kind::Kernel, context, errno)
    }
}
