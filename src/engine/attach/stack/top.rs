//! Makes the top tree: the small directory tree that is stacked on top of the layers.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::Path,
};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};

use super::{StackPlan, layer_tree::DirectoryAttributes};
use crate::error::{Kind, Result, ResultExt};

/// Makes the top tree in `directory`, which does not exist yet.
pub(in crate::engine) fn make_top(directory: &Path, plan: &StackPlan) -> Result<()> {
    let make = || -> io::Result<()> {
        make_directory(directory)?;
        for path in plan.top.keys().filter(|path| !path.is_empty()) {
            make_directory(&directory.join(OsStr::from_bytes(path)))?;
        }
        // children first: making an entry changes the time of its parent
        for (path, attributes) in plan.top.iter().rev() {
            attributes.apply(&directory.join(OsStr::from_bytes(path)))?;
        }
        Ok(())
    };
    make().or_kind(Kind::Io, || {
        format!(
            "making the tree on top of the layers in {}",
            directory.display()
        )
    })
}

fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

impl DirectoryAttributes {
    /// Sets these attributes on the directory at `path`.
    pub(in crate::engine) fn apply(&self, path: &Path) -> io::Result<()> {
        let directory = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::fs::fchown(
            &directory,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(self.mode))?;
        for (name, value) in &self.xattrs {
            rustix::fs::fsetxattr(
                &directory,
                name.as_slice(),
                value,
                rustix::fs::XattrFlags::empty(),
            )?;
        }
        let time = Timespec {
            tv_sec: self.mtime.0,
            tv_nsec: self.mtime.1,
        };
        rustix::fs::utimensat(
            directory.as_fd(),
            c"",
            &Timestamps {
                last_access: time,
                last_modification: time,
            },
            AtFlags::EMPTY_PATH,
        )
        .or_else(|_| {
            rustix::fs::futimens(
                &directory,
                &Timestamps {
                    last_access: time,
                    last_modification: time,
                },
            )
        })?;
        Ok(())
    }
}
