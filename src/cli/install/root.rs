//! Files below a root directory: that of this machine, or of an image. Symbolic links are resolved as a process in that root would, so that no file
//! of this machine is read or changed in place of one of the image.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};

use crate::{
    error::{Kind, Result, ResultExt as _},
    regular_file,
};

/// Where units of systemd are, the first of a name counts.
pub(super) const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Bytes of a file that is read, at most.
const LIMIT: u64 = 1 << 20;

/// A root directory.
pub(super) struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

/// A path whose parent is open.
struct Place {
    path: PathBuf,
    _parent: OwnedFd,
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())
            .or_kind(Kind::NotFound, || format!("opening {}", path.display()))?;
        Ok(Self {
            directory,
            path: path.to_owned(),
        })
    }

    /// The root directory, as this process names it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the root directory of this machine.
    pub(super) fn is_host(&self) -> bool {
        self.path == Path::new("/")
    }

    fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT;
        Ok(openat2(
            &self.directory,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }

    fn place(&self, path: &Path) -> io::Result<Place> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let parent = self.directory(parent)?;
        let open = format!("/proc/self/fd/{}", parent.as_raw_fd());
        Ok(Place {
            path: Path::new(&open).join(name),
            _parent: parent,
        })
    }

    /// Whether there is something at a path. A symbolic link is something.
    pub(super) fn exists(&self, path: &Path) -> bool {
        let place = self.place(path);
        place.is_ok_and(|place| fs::symlink_metadata(place.path).is_ok())
    }

    /// A text file, if there is one.
    pub(super) fn read(&self, path: &Path) -> Result<Option<String>> {
        let read = self
            .place(path)
            .and_then(|place| regular_file::read(&place.path, LIMIT));
        let bytes = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.or_kind(Kind::InvalidArgument, || self.named("reading", path))?,
        };
        let text = String::from_utf8(bytes);
        let text = text.or_kind(Kind::InvalidArgument, || self.named("reading", path))?;
        Ok(Some(text))
    }

    /// The names in a directory, sorted; none if there is no such directory.
    pub(super) fn names(&self, path: &Path) -> Vec<String> {
        let Ok(directory) = self.directory(path) else {
            return Vec::new();
        };
        let open = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let entries = fs::read_dir(open).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Makes the missing directories above a path, and returns them.
    pub(super) fn make_parents(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let mut made = Vec::new();
        let mut parents: Vec<&Path> = path.ancestors().skip(1).collect();
        parents.reverse();
        for parent in parents {
            if self.directory(parent).is_ok() {
                continue;
            }
            let place = self.place(parent);
            let place = place.or_kind(Kind::Io, || self.named("making", parent))?;
            mkdirat(rustix::fs::CWD, &place.path, Mode::from(0o755))
                .or_kind(Kind::Io, || self.named("making", parent))?;
            made.push(parent.to_owned());
        }
        Ok(made)
    }

    /// Replaces a file as a whole. The owner and mode of a file that is there are kept.
    pub(super) fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
        self.replace(path, bytes, mode)
            .or_kind(Kind::Io, || self.named("writing", path))
    }

    fn replace(&self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        let place = self.place(path)?;
        let parent = place.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let mut file = tempfile::Builder::new()
            .prefix(".socinbd-")
            .tempfile_in(parent)?;
        file.write_all(bytes)?;
        let mode = match fs::symlink_metadata(&place.path) {
            Ok(there) => {
                std::os::unix::fs::fchown(file.as_file(), Some(there.uid()), Some(there.gid()))?;
                there.mode() & 0o7777
            }
            Err(_) => mode,
        };
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(&place.path)?;
        fs::File::open(parent)?.sync_all()
    }

    /// Copies a program of this machine to a path.
    pub(super) fn copy(&self, source: &Path, path: &Path) -> Result<()> {
        let copy = || {
            let place = self.place(path)?;
            let parent = place.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
            let mut file = tempfile::Builder::new()
                .prefix(".socinbd-")
                .tempfile_in(parent)?;
            io::copy(&mut fs::File::open(source)?, &mut file)?;
            file.as_file()
                .set_permissions(fs::Permissions::from_mode(0o755))?;
            file.as_file().sync_all()?;
            file.persist(&place.path)?;
            Ok::<_, io::Error>(())
        };
        copy().or_kind(Kind::Io, || self.named("writing", path))
    }

    /// Whether a path has a copy of a program of this machine.
    pub(super) fn has_copy(&self, path: &Path, source: &Path) -> bool {
        let is_same = || {
            let open = |path: &Path| {
                let file = regular_file::open(path, fs::OpenOptions::new().read(true))?;
                Ok::<_, io::Error>((
                    file.metadata()?.len(),
                    BufReader::with_capacity(1 << 16, file),
                ))
            };
            let (length, mut copy) = open(&self.place(path)?.path)?;
            let (wanted, mut source) = open(&fs::canonicalize(source)?)?;
            let mut is_same = length == wanted;
            while is_same {
                let (one, other) = (copy.fill_buf()?, source.fill_buf()?);
                let length = one.len().min(other.len());
                is_same = one[..length] == other[..length];
                if length == 0 {
                    return Ok(is_same && one.len() == other.len());
                }
                copy.consume(length);
                source.consume(length);
            }
            Ok::<_, io::Error>(false)
        };
        is_same().unwrap_or(false)
    }

    /// Removes a file, or an empty directory. Succeeds if nothing is there.
    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        match self.place(path) {
            Ok(place) => regular_file::remove_one(&place.path)
                .or_kind(Kind::Io, || self.named("removing", path)),
            Err(_) => Ok(()),
        }
    }

    /// A path below this root, as this process names it.
    pub(super) fn outside(&self, path: &Path) -> PathBuf {
        self.path.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn named(&self, doing: &str, path: &Path) -> String {
        format!("{doing} {}", self.outside(path).display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_in_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "outside").unwrap();
        let link = folder.path().join("etc");
        std::os::unix::fs::symlink(outside.path(), &link).unwrap();
        std::os::unix::fs::symlink("../../../..", folder.path().join("up")).unwrap();
        let root = Root::open(folder.path()).unwrap();
        assert_eq!(root.read(Path::new("/etc/file")).unwrap(), None);
        assert!(root.make_parents(Path::new("/etc/new/file")).is_err());
        root.write(Path::new("/up/file"), b"inside", 0o600).unwrap();
        assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"inside");
        let made = root.make_parents(Path::new("/a/b/c")).unwrap();
        assert_eq!(made, [Path::new("/a"), Path::new("/a/b")]);
        // the last component is not followed
        fs::remove_file(link).unwrap();
        std::os::unix::fs::symlink(outside.path().join("file"), folder.path().join("f")).unwrap();
        root.read(Path::new("/f")).unwrap_err();
        assert!(root.exists(Path::new("/f")));
        root.write(Path::new("/f"), b"inside", 0o644).unwrap();
        assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"outside");
        root.remove(Path::new("/f")).unwrap();
        root.remove(Path::new("/f")).unwrap();
    }
}
