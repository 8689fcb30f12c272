//! An unpack by plain system calls onto a file system of mke2fs: what a layer's disk must equal.
//!
//! It is simpler than the tree under test: entries come in an order in which each is possible, no path leads through a symlink, and
//! whiteouts come where a real unpack of this layer alone makes them.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, Permissions},
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, makedev, mknodat, utimensat};
use socinbd::tar::{EntryKind, Timestamp};

use super::fixture::{Layer, Mount};

/// A mounted file system with a layer unpacked on it.
pub struct Reference {
    mount: Mount,
    _disk: tempfile::NamedTempFile,
}

impl Reference {
    pub fn unpack(layer: &Layer) -> Self {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(256 << 20).unwrap();
        let status = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256"])
            .args(["-N", "20000", "-O", "^has_journal", "-m", "0"])
            .arg(disk.path())
            .status()
            .expect("this test needs mke2fs (e2fsprogs)");
        assert!(status.success(), "mke2fs: {status}");
        let mount = Mount::new(disk.path(), "loop,user_xattr,acl");
        fs::remove_dir(mount.path().join("lost+found")).unwrap();
        let mut unpack = Unpack {
            root: mount.path(),
            layer,
            directories: BTreeMap::from([(PathBuf::new(), None)]),
        };
        for index in 0..layer.entries.len() {
            unpack.add(index);
        }
        unpack.set_directory_times();
        Self { mount, _disk: disk }
    }

    pub fn path(&self) -> &Path {
        self.mount.path()
    }
}

struct Unpack<'a> {
    root: &'a Path,
    layer: &'a Layer,
    /// Times of directories, which the names made in them change; `None` for those that no entry names.
    directories: BTreeMap<PathBuf, Option<Timestamp>>,
}

impl Unpack<'_> {
    fn add(&mut self, index: usize) {
        let entry = &self.layer.entries[index];
        let relative = clean(&entry.name);
        let path = self.place(&relative);
        if let Some(parent) = relative.parent() {
            self.make_parents(parent);
        }
        let name = relative.file_name().map_or(&b""[..], OsStrExt::as_bytes);
        if name == b".wh..wh..opq" {
            let parent = path.parent().unwrap();
            xattr::set(parent, "trusted.overlay.opaque", b"y").unwrap();
            return;
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            let path = path.with_file_name(OsStr::from_bytes(hidden));
            mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
            let epoch = Timestamp::default();
            set_time(&path, epoch);
            return;
        }
        self.remove_old(&relative, &path, entry.kind);
        let device = |kind, device| mknodat(CWD, &path, kind, Mode::empty(), device).unwrap();
        let number = || makedev(entry.devmajor as u32, entry.devminor as u32);
        match entry.kind {
            EntryKind::Regular => self.write(&path, index),
            EntryKind::Directory => {
                if !path.exists() {
                    fs::create_dir(&path).unwrap();
                }
                let time = entry.mtime.unwrap();
                self.directories.insert(relative.clone(), Some(time));
            }
            EntryKind::Symlink => symlink(OsStr::from_bytes(&entry.linkname), &path).unwrap(),
            EntryKind::Hardlink => {
                let target = self.place(&clean(&entry.linkname));
                fs::hard_link(target, &path).unwrap();
                return;
            }
            EntryKind::Char => device(FileType::CharacterDevice, number()),
            EntryKind::Block => device(FileType::BlockDevice, number()),
            EntryKind::Fifo => device(FileType::Fifo, 0),
        }
        lchown(&path, Some(entry.uid), Some(entry.gid)).unwrap();
        for (key, value) in &entry.pax {
            let name = key.strip_prefix(b"SCHILY.xattr.").unwrap();
            xattr::set(&path, OsStr::from_bytes(name), value).unwrap();
        }
        if entry.kind != EntryKind::Symlink {
            let mode = Permissions::from_mode(entry.mode as u32 & 0o7777);
            fs::set_permissions(&path, mode).unwrap();
        }
        set_time(&path, entry.mtime.unwrap());
    }

    fn place(&self, relative: &Path) -> PathBuf {
        if relative.as_os_str().is_empty() {
            self.root.to_owned()
        } else {
            self.root.join(relative)
        }
    }

    fn make_parents(&mut self, parent: &Path) {
        let place = self.place(parent);
        if !place.exists() {
            self.make_parents(parent.parent().unwrap());
            fs::create_dir(&place).unwrap();
            // a parent with setgid would give it its group and that bit
            lchown(&place, Some(0), Some(0)).unwrap();
            fs::set_permissions(&place, Permissions::from_mode(0o755)).unwrap();
            self.directories.insert(parent.to_owned(), None);
        }
    }

    fn remove_old(&mut self, relative: &Path, path: &Path, kind: EntryKind) {
        let Ok(old) = fs::symlink_metadata(path) else {
            return;
        };
        if !old.is_dir() {
            fs::remove_file(path).unwrap();
        } else if kind != EntryKind::Directory {
            fs::remove_dir_all(path).unwrap();
            self.directories
                .retain(|other, _| !other.starts_with(relative));
        } else {
            // its attributes are those of the new entry alone
            for name in xattr::list(path).unwrap() {
                xattr::remove(path, name).unwrap();
            }
        }
    }

    fn write(&self, path: &Path, index: usize) {
        let size = self.layer.entries[index].size;
        fs::write(path, self.layer.content(index, size)).unwrap();
    }

    fn set_directory_times(&self) {
        for (path, time) in &self.directories {
            set_time(&self.place(path), time.unwrap_or_default());
        }
    }
}

fn clean(path: &[u8]) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                cleaned.pop();
            }
            name => cleaned.push(OsStr::from_bytes(name)),
        }
    }
    cleaned
}

fn set_time(path: &Path, time: Timestamp) {
    let time = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}
