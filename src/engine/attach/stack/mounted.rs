//! Reads a layer's tree from its mount, for stacking.

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

use super::layer_tree::{DirectoryAttributes, LayerNode, LayerNodeKind, LayerTree};
use crate::{buffer::Buffer, layer::StackingFacts};

/// The tree of a mounted layer.
pub(in crate::engine) struct MountedLayer<'a> {
    /// The root of the mount.
    pub root: BorrowedFd<'a>,
    /// See [`LayerTree::facts`].
    pub facts: StackingFacts,
}

impl MountedLayer<'_> {
    /// Opens the node at `path` with O_PATH; `None` if there is none, or if the path leaves the layer.
    fn open(&self, path: &[u8], resolve: ResolveFlags) -> io::Result<Option<OwnedFd>> {
        let name = if path.is_empty() {
            OsStr::new(".")
        } else {
            OsStr::from_bytes(path)
        };
        match rustix::fs::openat2(
            self.root,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            resolve | ResolveFlags::BENEATH,
        ) {
            Ok(fd) => Ok(Some(fd)),
            // the target of a symlink can be a name that no file system accepts
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl LayerTree for MountedLayer<'_> {
    fn facts(&self) -> &StackingFacts {
        &self.facts
    }

    fn look(&self, path: &[u8]) -> io::Result<Option<LayerNode>> {
        let Some(fd) = self.open(path, ResolveFlags::NO_SYMLINKS)? else {
            return Ok(None);
        };
        let stat = rustix::fs::fstat(&fd)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => LayerNodeKind::Directory,
            FileType::Symlink => LayerNodeKind::Symlink(text_of(&fd)?),
            _ => LayerNodeKind::Other,
        };
        let xattrs = match kind {
            LayerNodeKind::Directory => xattrs(&fd)?,
            _ => Vec::new(),
        };
        let (marks, xattrs): (Vec<_>, Vec<_>) = xattrs
            .into_iter()
            .partition(|(name, _)| name.starts_with(b"trusted.overlay."));
        Ok(Some(LayerNode {
            kind,
            opaque: marks
                .iter()
                .any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y"),
            attributes: DirectoryAttributes {
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

    fn link_text(&self, path: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Some(fd) = self.open(path, ResolveFlags::NO_MAGICLINKS)? else {
            return Ok(None);
        };
        let stat = rustix::fs::fstat(&fd)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => text_of(&fd).map(Some),
            _ => Ok(None),
        }
    }
}

/// The target of the symlink of an O_PATH descriptor.
fn text_of(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(fd, c"", Vec::new())?.into_bytes())
}

/// The xattrs of the node of an O_PATH descriptor, read through /proc (fgetxattr refuses such descriptors).
fn xattrs(fd: &OwnedFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let mut names = Buffer::lend();
    let names = names.of_length(64 << 10); // XATTR_LIST_MAX
    let length = rustix::fs::listxattr(&path, &mut *names)?;
    let mut value = Buffer::lend();
    names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let value = value.of_length(64 << 10); // XATTR_SIZE_MAX
            let length = rustix::fs::getxattr(&path, name, &mut *value)?;
            Ok((name.to_vec(), value[..length].to_vec()))
        })
        .collect()
}
