//! A file of a disk's directory that is open while there are descriptors to spare.
//!
//! A lazy layer has several such files, and they are read or written once per fetched span, not once per read of the device. So the process
//! keeps open those that were used last, up to a quarter of its limit of open files (`RLIMIT_NOFILE`); the others are opened again
//! when they are used. A file that took the place of the first one meanwhile is not used.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use lru::LruCache;
use rustix::{
    fs::OFlags,
    io::Errno,
    process::{Resource, getrlimit},
};

/// Files that are kept open although the limit is very low.
const MIN_OPEN: usize = 16;

/// A file that can be closed and opened again.
pub(crate) struct StoredFile {
    path: PathBuf,
    identity: FileIdentity,
    key: Key,
}

/// The number of a [`StoredFile`], unique in this process.
type Key = u64;

/// What tells a file from another one of the same name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl StoredFile {
    /// The file at `path`, which is open as `file` for reading and writing.
    pub(crate) fn new(path: PathBuf, file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self::with_metadata(path, file, &metadata))
    }

    /// As [`StoredFile::new`], of a file with this metadata.
    pub(crate) fn with_metadata(path: PathBuf, file: File, metadata: &fs::Metadata) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let stored = Self {
            path,
            identity: FileIdentity::of(metadata),
            key: NEXT.fetch_add(1, Ordering::Relaxed),
        };
        keep(stored.key, &Arc::new(file), most_open());
        stored
    }

    /// A file of a test, with this content, that is removed already.
    #[cfg(test)]
    pub(crate) fn of_test(content: &[u8]) -> (Self, Arc<File>) {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, content).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let stored = Self::new(PathBuf::from("removed"), file).unwrap();
        let file = stored.get().unwrap();
        (stored, file)
    }

    /// The open file.
    pub(crate) fn get(&self) -> io::Result<Arc<File>> {
        if let Some(file) = open_files().get(&self.key) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(opened(|| self.open(), close_spare_files)?);
        keep(self.key, &file, most_open());
        Ok(file)
    }

    fn open(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&self.path)?;
        match FileIdentity::of(&file.metadata()?) == self.identity {
            true => Ok(file),
            false => Err(io::Error::other(format!(
                "{} was replaced while its layer was in use; detach the image and attach it again",
                self.path.display()
            ))),
        }
    }
}

impl Drop for StoredFile {
    fn drop(&mut self) {
        let file = open_files().pop(&self.key);
        drop(file); // not under the lock
    }
}

/// Calls `open`. If no descriptor is free, calls `make_room`, and `open` once more.
fn opened<T>(open: impl Fn() -> io::Result<T>, make_room: impl FnOnce()) -> io::Result<T> {
    match open() {
        Err(error) if is_shortage(&error) => {
            make_room();
            open()
        }
        opened => opened,
    }
}

/// Closes the least recently used half of the files that disks keep open and can open again. For a shortage of descriptors.
pub fn close_spare_files() {
    let closed = {
        let mut files = open_files();
        let most = files.len() / 2;
        shrink(&mut files, most)
    };
    drop(closed); // not under the lock
}

fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}

/// Files that may be open. The daemon raises its limit before it opens a layer.
fn most_open() -> usize {
    static MOST: LazyLock<usize> =
        LazyLock::new(|| most_of(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)));
    *MOST
}

/// As [`most_open`], of a limit.
fn most_of(limit: u64) -> usize {
    usize::try_from(limit / 4)
        .unwrap_or(usize::MAX)
        .max(MIN_OPEN)
}

fn keep(key: Key, file: &Arc<File>, most: usize) {
    let closed = {
        let mut files = open_files();
        files.put(key, Arc::clone(file));
        shrink(&mut files, most)
    };
    drop(closed); // not under the lock: closing a file may wait
}

/// Takes out what was used least recently until no more than `most` files are left.
fn shrink(files: &mut LruCache<Key, Arc<File>>, most: usize) -> Vec<Arc<File>> {
    let excess = files.len().saturating_sub(most);
    let oldest = std::iter::from_fn(|| files.pop_lru());
    oldest.take(excess).map(|(_, file)| file).collect()
}

fn open_files() -> MutexGuard<'static, LruCache<Key, Arc<File>>> {
    static OPEN: LazyLock<Mutex<LruCache<Key, Arc<File>>>> =
        LazyLock::new(|| Mutex::new(LruCache::unbounded()));
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn stored(name: &str) -> (tempfile::TempDir, StoredFile) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all_at(b"content", 0).unwrap();
        let stored = StoredFile::new(path, file).unwrap();
        (directory, stored)
    }

    fn content(stored: &StoredFile) -> io::Result<[u8; 7]> {
        let mut bytes = [0; 7];
        stored.get()?.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn close(stored: &StoredFile) {
        open_files().pop(&stored.key);
    }

    #[test]
    fn a_closed_file_is_opened_again() {
        let (_directory, stored) = stored("file");
        close(&stored);
        assert_eq!(&content(&stored).unwrap(), b"content");
        assert!(open_files().contains(&stored.key));
    }

    #[test]
    fn a_file_in_its_place_is_not_used() {
        let (_directory, stored) = stored("file");
        let next = stored.path.with_extension("next");
        fs::write(&next, b"another").unwrap();
        fs::rename(&next, &stored.path).unwrap();
        assert_eq!(&content(&stored).unwrap(), b"content", "it is still open");
        close(&stored);
        let error = content(&stored).unwrap_err().to_string();
        assert!(error.contains("was replaced"), "{error}");
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let (_directory, stored) = stored("file");
        let moved = stored.path.with_extension("moved");
        fs::rename(&stored.path, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &stored.path).unwrap();
        close(&stored);
        content(&stored).unwrap_err();
    }

    #[test]
    fn room_is_made_once_where_no_descriptor_is_free() {
        let made = std::cell::Cell::new(0);
        let make_room = || made.set(made.get() + 1);
        for shortage in [Errno::MFILE, Errno::NFILE] {
            let before = made.get();
            let free = || match made.get() > before {
                true => Ok(7),
                false => Err(io::Error::from(shortage)),
            };
            assert_eq!(opened(free, make_room).unwrap(), 7);
            assert_eq!(made.get(), before + 1);
        }
        let none = || -> io::Result<()> { Err(Errno::MFILE.into()) };
        assert!(is_shortage(&opened(none, make_room).unwrap_err()));
        assert_eq!(made.get(), 3);
        let gone = || -> io::Result<()> { Err(Errno::NOENT.into()) };
        opened(gone, || unreachable!("it is not a shortage")).unwrap_err();
    }

    #[test]
    fn a_quarter_of_the_limit_and_a_few_are_kept_open() {
        let most = [0, 60, 64, 68, 4096].map(most_of);
        assert_eq!(most, [16, 16, 16, 17, 1024]);
    }

    #[test]
    fn what_is_used_is_kept_for_longer() {
        let ((_first, older), (_second, newer)) = (stored("file"), stored("file"));
        let is_before = || {
            let files = open_files();
            let mut keys = files.iter().map(|(key, _)| *key);
            keys.find(|key| [older.key, newer.key].contains(key))
        };
        assert_eq!(is_before(), Some(newer.key));
        older.get().unwrap();
        assert_eq!(is_before(), Some(older.key));
    }

    #[test]
    fn those_used_least_recently_are_closed_first() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut files = LruCache::unbounded();
        for key in 0..4 {
            files.put(key, Arc::clone(&file));
        }
        files.get(&0);
        assert_eq!(shrink(&mut files, 2).len(), 2);
        assert!(files.contains(&0) && files.contains(&3));
        assert_eq!(shrink(&mut files, 2).len(), 0);
    }

    #[test]
    fn a_dropped_file_is_not_kept_open() {
        let (_directory, stored) = stored("file");
        let key = stored.key;
        drop(stored);
        assert!(!open_files().contains(&key));
    }
}
