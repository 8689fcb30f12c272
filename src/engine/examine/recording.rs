//! The temporary directory for the disks of a recording, removed when the recording ends.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use tempfile::TempDir;

use crate::{
    error::{Kind, Result, ResultExt},
    layer::make_private,
};

const PREFIX: &str = "recording.";

/// The directory of a recording's root and runtime directory, inside a root. It is removed when this is dropped. The directory of a killed
/// recording is removed by the next recording or daemon.
pub struct RecordingDirectory {
    directory: TempDir,
    /// Lock that shows that the process of the recording is alive.
    _lock: File,
}

impl RecordingDirectory {
    /// Creates the directory, and the root if it is missing.
    pub fn new(root: &Path) -> Result<Self> {
        make_private(root)?;
        remove_left_over(root)?;
        let make = || -> io::Result<Self> {
            loop {
                let directory = TempDir::with_prefix_in(PREFIX, root)?;
                let lock = File::open(directory.path())?;
                // another process may have removed the directory as a leftover before it was locked
                if lock.try_lock().is_ok() && directory.path().is_dir() {
                    return Ok(Self {
                        directory,
                        _lock: lock,
                    });
                }
            }
        };
        make().or_kind(Kind::Io, || {
            format!("making a directory in {}", root.display())
        })
    }

    /// Path of the directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes the directories of killed recordings.
pub(crate) fn remove_left_over(root: &Path) -> Result<()> {
    let context = || format!("listing {}", root.display());
    for entry in fs::read_dir(root).or_kind(Kind::Io, context)? {
        let entry = entry.or_kind(Kind::Io, context)?;
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        // the lock fails if the recording is running, if another process removes the directory, or if it is gone
        let lock = File::open(entry.path());
        if !lock.as_ref().is_ok_and(|lock| lock.try_lock().is_ok()) {
            continue;
        }
        let path = entry.path();
        tracing::info!(path = %path.display(), "removing the directory of a recording that was killed");
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove the directory of a recording that was killed");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_recording_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let there = || fs::read_dir(root.path()).unwrap().count();
        let running = RecordingDirectory::new(root.path()).unwrap();
        fs::create_dir_all(root.path().join("recording.killed/root/layers")).unwrap();
        fs::create_dir_all(root.path().join("layers")).unwrap();
        assert_eq!(there(), 3);
        let other = RecordingDirectory::new(root.path()).unwrap();
        assert!(running.path().is_dir() && other.path().is_dir());
        assert_eq!(there(), 3, "the killed one is gone");
        drop((running, other));
        assert_eq!(there(), 1);
    }
}
