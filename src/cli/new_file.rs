//! Output files of commands.

use std::{
    fs::{File, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// A file that is written atomically; an existing file that is not a regular file (`/dev/stdout`) is written in place.
pub(super) enum NewFile {
    Whole(NamedTempFile, PathBuf),
    InPlace(File),
}

impl NewFile {
    /// The file gets its name in [`Self::finish`].
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        if path.metadata().is_ok_and(|there| !there.is_file()) {
            return Ok(Self::InPlace(File::options().write(true).open(path)?));
        }
        // a symlink stays, its target is replaced
        let path = match path.canonicalize() {
            Ok(file) => file,
            Err(_) => std::path::absolute(path)?,
        };
        let temporary = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666)) // less the umask
            .tempfile_in(path.parent().unwrap_or(Path::new("/")))?;
        Ok(Self::Whole(temporary, path))
    }

    /// Renames the temporary file.
    pub(super) fn finish(self) -> io::Result<()> {
        if let Self::Whole(temporary, path) = self {
            temporary.persist(path)?;
        }
        Ok(())
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Whole(file, _) => file.write(bytes),
            Self::InPlace(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Whole(file, _) => file.flush(),
            Self::InPlace(file) => file.flush(),
        }
    }
}

/// Whether both paths are the same regular file.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => {
            one.is_file() && (one.dev(), one.ino()) == (other.dev(), other.ino())
        }
        _ => false,
    }
}
