//! Locks of directories: a file in each that one process has locked.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use super::stored::directory::make_private;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    regular_file,
};

/// The lock of a directory. It lasts until all copies of its descriptor are closed, in any process.
#[derive(Debug)]
pub struct DirectoryLock {
    file: File,
    is_inherited: bool,
}

impl DirectoryLock {
    /// Takes the lock `<directory>/lock`, an error of kind `Busy` when another process has it. `inherited` is the descriptor of a process
    /// that had the lock before, and that may not have ended yet; it counts if it is of this file.
    pub fn take(directory: &Path, inherited: Option<OwnedFd>) -> Result<Self> {
        let path = directory.join("lock");
        let io = || format!("locking {}", path.display());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.mode(0o600);
        let opened = regular_file::open_or_replace(&path, &mut options).or_kind(Kind::Io, io)?;
        let inherited = inherited.map(File::from);
        let inherited = inherited.filter(|inherited| is_same(inherited, &opened));
        let is_inherited = inherited.is_some();
        let mut file = inherited.unwrap_or(opened);
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let _ = (&file).take(20).read_to_string(&mut owner); // only for the message
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "{} is in use by process {}; stop that process, or use another --root and --run-dir",
                        directory.display(),
                        owner.trim()
                    ),
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error).or_kind(Kind::Io, io),
        }
        // for the message of another process; the lock does not depend on it
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { file, is_inherited })
    }

    /// Whether it is the one of the inherited descriptor.
    pub fn is_inherited(&self) -> bool {
        self.is_inherited
    }
}

impl AsFd for DirectoryLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Takes the lock of a root, below which one process has the disks, as [`DirectoryLock::take`]. Makes their directory (0700) if missing.
pub fn lock_root(root: &Path, inherited: Option<OwnedFd>) -> Result<DirectoryLock> {
    let layers = root.join("layers");
    make_private(&layers)?;
    DirectoryLock::take(&layers, inherited)
}

fn is_same(one: &File, other: &File) -> bool {
    let id = |file: &File| Some((file.metadata().ok()?.dev(), file.metadata().ok()?.ino()));
    id(one).is_some_and(|one| Some(one) == id(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inherited_lock_counts_while_its_first_owner_has_it_too() {
        let folder = tempfile::tempdir().unwrap();
        let first = DirectoryLock::take(folder.path(), None).unwrap();
        let busy = |inherited| DirectoryLock::take(folder.path(), inherited).unwrap_err();
        let error = busy(None).report();
        assert!(error.contains("in use by process"), "{error}");
        let copy = || first.as_fd().try_clone_to_owned().unwrap();
        let second = DirectoryLock::take(folder.path(), Some(copy())).unwrap();
        assert!(second.is_inherited() && !first.is_inherited());
        // the lock of a directory that was removed is none of the one that is there now
        let other = copy();
        std::fs::remove_file(folder.path().join("lock")).unwrap();
        let third = DirectoryLock::take(folder.path(), Some(other)).unwrap();
        assert!(!third.is_inherited());
        drop((first, second));
        assert_eq!(busy(None).kind(), Kind::Busy);
        drop(third);
        DirectoryLock::take(folder.path(), None).unwrap();
    }
}
