//! A layer's tree on its mount, as far as stacking asks.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{Attributes, Found, LayerTree};
use crate::layer::StackingFacts;

/// A layer's tree on its mount.
pub(in crate::engine) struct MountedLayer<'a> {
    /// The root of the mount.
    pub root: BorrowedFd<'a>,
    /// See [`LayerTree::facts`].
    pub facts: StackingFacts,
}

impl LayerTree for MountedLayer<'_> {
    fn facts(&self) -> &StackingFacts {
        &self.facts
    }

    fn look(&self, path: &[u8]) -> io::Result<Option<Found>> {
        let name = if path.is_empty() {
            OsStr::new(".")
        } else {
            OsStr::from_bytes(path)
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat2(
            self.root,
            name,
            flags,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
        ) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let stat = rustix::fs::fstat(&fd)?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let xattrs = if directory { xattrs(&fd)? } else { Vec::new() };
        let (marks, xattrs): (Vec<_>, Vec<_>) = xattrs
            .into_iter()
            .partition(|(name, _)| name.starts_with(b"trusted.overlay."));
        Ok(Some(Found {
            directory,
            opaque: marks
                .iter()
                .any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y"),
            attributes: Attributes {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: (
                    stat.st_mtime,
                    i64::try_from(stat.st_mtime_nsec).unwrap_or_default(),
                ),
                xattrs,
            },
        }))
    }
}

/// The xattrs of what an O_PATH descriptor stands for, through its name in /proc (fgetxattr refuses such descriptors).
fn xattrs(fd: &OwnedFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let mut names = vec![0; 64 * 1024]; // XATTR_LIST_MAX
    let length = rustix::fs::listxattr(&path, &mut names[..])?;
    let mut value = vec![0; 64 * 1024]; // XATTR_SIZE_MAX
    names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let length = rustix::fs::getxattr(&path, name, &mut value[..])?;
            Ok((name.to_vec(), value[..length].to_vec()))
        })
        .collect()
}
