//! The blobs of a layout: files of a directory, or ranges of a tar file.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Mode, OFlags};

use super::archive::Members;
use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::Digest,
};

/// The storage of a layout.
pub(super) enum Blobs {
    /// A folder.
    Folder(PathBuf),
    /// A tar file.
    Archive {
        path: PathBuf,
        file: Arc<File>,
        members: Members,
    },
}

/// One blob, open.
#[derive(Clone)]
pub(super) struct Blob {
    file: Arc<File>,
    start: u64,
    /// Bytes of the blob.
    pub(super) size: u64,
}

impl Blob {
    /// Fills the buffer from this offset of the blob. Reading past its end is an error of kind `UnexpectedEof`.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        // cannot overflow: `start + size` is at most the file's length
        self.file.read_exact_at(buffer, self.start + offset)
    }

    /// The whole blob. The caller has compared `size` with its limit.
    pub(super) fn read_all(&self) -> std::io::Result<Vec<u8>> {
        let length = usize::try_from(self.size).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        let mut bytes = vec![0; length];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

impl Blobs {
    /// The folder or file, as errors name it.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Archive { path, .. } => path,
        }
    }

    /// Opens a blob.
    pub(super) fn open(&self, digest: &Digest) -> Result<Blob> {
        match self {
            Self::Folder(path) => open_regular(&blob_path(path, digest)),
            Self::Archive { file, members, .. } => match members.blobs.get(digest) {
                Some(range) => Ok(member(file, range)),
                None => Err(Error::new(
                    Kind::NotFound,
                    format!("blob {digest} is not in {}", self.path().display()),
                )),
            },
        }
    }

    /// Opens `oci-layout`.
    pub(super) fn open_marker(&self) -> Result<Blob> {
        match self {
            Self::Folder(path) => open_regular(&path.join("oci-layout")),
            Self::Archive { file, members, .. } => match &members.marker {
                Some(range) => Ok(member(file, range)),
                None => Err(self.missing("oci-layout")),
            },
        }
    }

    /// Opens `index.json`.
    pub(super) fn open_index(&self) -> Result<Blob> {
        match self {
            Self::Folder(path) => open_regular(&path.join("index.json")),
            Self::Archive { file, members, .. } => match &members.index {
                Some(range) => Ok(member(file, range)),
                None => Err(self.missing("index.json")),
            },
        }
    }

    fn missing(&self, name: &str) -> Error {
        let hint = match self {
            Self::Archive { members, .. } if members.docker_save => {
                "; this is the format of `docker save`: convert it with `skopeo copy docker-archive:FILE oci-archive:FILE`"
            }
            _ => "",
        };
        Error::new(
            Kind::NotFound,
            format!("{} has no {name}{hint}", self.path().display()),
        )
    }
}

/// The path of a blob in a directory. A digest has 64 hexadecimal digits: it cannot lead out of the directory.
pub(super) fn blob_path(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join("blobs/sha256").join(digest.hex())
}

fn member(file: &Arc<File>, range: &Range<u64>) -> Blob {
    Blob {
        file: file.clone(),
        start: range.start,
        size: range.end - range.start,
    }
}

/// Opens a regular file (also through a symbolic link: pools of blobs shared by several layouts are made so). A fifo or a device in
/// its place is refused rather than waited for.
pub(super) fn open_regular(path: &Path) -> Result<Blob> {
    let failed = |error: rustix::io::Errno| {
        let kind = match error {
            rustix::io::Errno::NOENT => Kind::NotFound,
            _ => Kind::Io,
        };
        Error::with_source(
            kind,
            path.display().to_string(),
            std::io::Error::from(error),
        )
    };
    let not_regular = || {
        Error::new(
            Kind::Corrupt,
            format!("{} is not a regular file", path.display()),
        )
    };
    // looked at first: merely opening a device can have effects
    if !rustix::fs::FileType::from_raw_mode(rustix::fs::stat(path).map_err(failed)?.st_mode)
        .is_file()
    {
        return Err(not_regular());
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?);
    let metadata = file
        .metadata()
        .or_kind(Kind::Io, || path.display().to_string())?;
    if !metadata.is_file() {
        return Err(not_regular());
    }
    Ok(Blob {
        file: Arc::new(file),
        start: 0,
        size: metadata.len(),
    })
}

impl Blob {
    /// The open file, for an archive to be scanned.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}
