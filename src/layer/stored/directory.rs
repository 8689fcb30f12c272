//! The directory of a disk: the names and modes of its files, and how it is made atomically.
//!
//! A directory is made under `<root>/layers/new/` and renamed to its place when all files are written. Directories that are under `new`
//! when the store opens were left by a killed daemon. The rename does not wait for the local disk: until the directory is synced, its
//! `state.json` names the boot in which it is valid (see [`super::state`]).

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, Metadata, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    seal::{self, Damage},
    state::DiskState,
    stored_file::{FileIdentity, StoredFile},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{build::buffered_writer::WRITE_BYTES, types::StackingFacts},
    regular_file,
};

/// The verified zTOC.
pub(crate) const ZTOC: &str = "ztoc";
/// The verified table of a compact index, instead of a zTOC.
pub(super) const COMPACT: &str = "compact";
/// Windows of spans, if the table is that of a compact index.
pub(crate) const WINDOWS: &str = "windows";
/// The sources of the compact index.
pub(crate) const WINDOW_SOURCES: &str = "windows.json";
/// The spans, without the file metadata.
pub(crate) const SPAN_TABLE: &str = "spans.table";
/// The fingerprints of the tar headers, by the table's entries.
pub(crate) const HEADERS: &str = "headers";
/// The map from ranges of the layer to ranges of the disk.
pub(crate) const LAYOUT: &str = "layout";
/// The bytes of the layer that are in no file, until the layer has been checked.
pub(crate) const REST: &str = "rest";
/// The last span as it was fetched, if its tail is too long for [`REST`]; until the layer has been checked.
pub(crate) const LAST: &str = "last";
/// The layer's ext4 image.
pub(crate) const DISK: &str = "disk.ext4";
/// Whether each span is on the disk, and its checksums.
pub(crate) const SPANS: &str = "spans";
/// The revoked spans, if there are any.
pub(crate) const DISOWNED: &str = "disowned";
/// The checksum of each piece of the disk of a streamed layer.
pub(crate) const PIECES: &str = "pieces";
/// The sources of the layer.
pub(crate) const SOURCES: &str = "sources.json";
/// The paths of the layer that matter for stacking.
pub(crate) const STACKING: &str = "stacking.json";
/// The state of the directory.
pub(crate) const STATE: &str = "state.json";

/// The name of the table.
pub(crate) fn table(is_compact: bool) -> &'static str {
    match is_compact {
        true => COMPACT,
        false => ZTOC,
    }
}

/// Makes a directory of mode 0700, with its parents. Existing ones are not changed.
pub fn make_private(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .or_kind(Kind::Io, || {
            format!("cannot make the directory {}", path.display())
        })
}

/// A directory, and the files in it.
#[derive(Clone, Debug)]
pub(crate) struct DiskDirectory {
    path: PathBuf,
    /// Identity of the directory, when it is in use.
    identity: Option<FileIdentity>,
}

impl DiskDirectory {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            identity: None,
        }
    }

    /// From now on every operation fails if another directory has taken the place of this one. An error of kind `Corrupt`: it is not a
    /// directory.
    pub(crate) fn pinned(self) -> Result<Self> {
        let metadata = fs::metadata(&self.path).map_err(|error| {
            let kind = match seal::is_damage(&error) {
                true => Kind::Corrupt, // a link that leads nowhere
                false => Kind::Io,
            };
            Error::with_source(kind, format!("cannot stat {}", self.path.display()), error)
        })?;
        Ok(Self {
            path: self.path,
            identity: Some(FileIdentity::of(&metadata)),
        })
    }

    /// Whether no other directory has taken the place of this one, if it is pinned. An error otherwise.
    pub(crate) fn check_place(&self) -> Result<()> {
        let place = self.at("");
        place
            .map(|_| ())
            .or_kind(Kind::Io, || self.path.display().to_string())
    }

    /// The path of a file of this name.
    fn at(&self, name: &str) -> io::Result<PathBuf> {
        if let Some(identity) = self.identity {
            let there = fs::metadata(&self.path);
            if !there.is_ok_and(|there| FileIdentity::of(&there) == identity) {
                return Err(io::Error::other(
                    "its directory was removed while its layer was in use; detach the image and attach it again",
                ));
            }
        }
        Ok(self.path.join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes an empty file of mode 0600.
    pub(crate) fn create(&self, name: &'static str) -> Result<File> {
        self.open_with(name, OpenOptions::new().create_new(true))
    }

    /// Whether there is anything of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path.join(name)).is_ok()
    }

    /// Opens a file to read and write it. If it is missing, the error is [`Damage`], of kind `Corrupt`.
    pub(crate) fn open(&self, name: &'static str) -> Result<File> {
        self.open_with(name, &mut OpenOptions::new())
    }

    /// As [`Self::open`], for a file that need not stay open.
    pub(crate) fn open_stored(&self, name: &'static str) -> Result<StoredFile> {
        let (file, metadata) = self.open_with_metadata(name, &mut OpenOptions::new())?;
        let path = self.path.join(name);
        Ok(StoredFile::with_metadata(path, file, &metadata))
    }

    /// Makes an open file of this directory one that need not stay open.
    pub(crate) fn stored(&self, name: &'static str, file: File) -> Result<StoredFile> {
        let path = self.path.join(name);
        StoredFile::new(path.clone(), file)
            .or_kind(Kind::Io, || format!("cannot stat {}", path.display()))
    }

    /// As [`Self::open`], but if it is missing or cannot be opened because of damage, an empty one is made: then the second value is true.
    pub(crate) fn open_or_create(&self, name: &'static str) -> Result<(File, bool)> {
        match self.open(name) {
            Err(error) if Damage::is_in(&error) => {
                self.remove(name)?;
                Ok((self.create(name)?, true))
            }
            opened => Ok((opened?, false)),
        }
    }

    fn open_with(&self, name: &'static str, options: &mut OpenOptions) -> Result<File> {
        Ok(self.open_with_metadata(name, options)?.0)
    }

    fn open_with_metadata(
        &self,
        name: &'static str,
        options: &mut OpenOptions,
    ) -> Result<(File, Metadata)> {
        options.read(true).write(true).mode(0o600);
        let opened = self
            .at(name)
            .and_then(|path| regular_file::open_with_metadata(&path, options));
        opened.map_err(|error| unusable(name, self.cannot("open", name), error))
    }

    /// Writes a new file.
    pub(crate) fn write(&self, name: &'static str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        bytes
            .chunks(WRITE_BYTES)
            .try_for_each(|piece| file.write_all(piece))
            .or_kind(Kind::Io, || self.cannot("write", name))
    }

    /// Replaces a file atomically, and syncs it.
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let replace = || {
            let next = self.at(&format!("{name}.next"))?;
            regular_file::remove(&next)?;
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&next)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            let place = self.path.join(name);
            if fs::symlink_metadata(&place).is_ok_and(|there| there.is_dir()) {
                regular_file::remove(&place)?; // a directory is not replaced by a rename
            }
            fs::rename(&next, place)?;
            File::open(&self.path)?.sync_all()
        };
        replace().or_kind(Kind::Io, || self.cannot("write", name))
    }

    /// Removes the files that only the check of the layer needs.
    pub(crate) fn remove_rest(&self) -> Result<()> {
        self.remove(REST)?;
        self.remove(LAST)
    }

    /// Removes a file, if it exists.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let removed = self.at(name).and_then(|path| regular_file::remove(&path));
        removed.or_kind(Kind::Io, || self.cannot("remove", name))
    }

    /// Whether a file can be read and has this content.
    pub(crate) fn has_content(&self, name: &'static str, bytes: &[u8]) -> bool {
        let read = self
            .at(name)
            .and_then(|path| regular_file::read(&path, bytes.len() as u64));
        read.is_ok_and(|found| found == bytes)
    }

    /// Reads a whole file. As with [`Self::open`], a missing or unreadable file is [`Damage`], and so is one that is too long.
    pub(crate) fn read(&self, name: &'static str) -> Result<Vec<u8>> {
        let read = self
            .at(name)
            .and_then(|path| regular_file::read(&path, max_bytes(name)));
        read.map_err(|error| unusable(name, self.cannot("read", name), error))
    }

    /// Replaces the content of a damaged file in place, so that an already open file has it.
    pub(crate) fn rewrite(&self, name: &'static str, bytes: &[u8]) -> Result<()> {
        let in_place = || {
            let file = regular_file::open(&self.at(name)?, OpenOptions::new().write(true))?;
            file.write_all_at(bytes, 0)?;
            file.set_len(bytes.len() as u64)?;
            file.sync_all()
        };
        match in_place() {
            // the file is missing, or its blocks cannot be written any more
            Err(error) if seal::is_damage(&error) => self.replace(name, bytes),
            written => written.or_kind(Kind::Io, || self.cannot("write", name)),
        }
    }

    /// The paths of the layer that matter for stacking.
    pub(crate) fn stacking(&self) -> Result<StackingFacts> {
        let damaged = || Damage::check(STACKING);
        seal::unseal_json(&self.read(STACKING)?)
            .ok_or_else(damaged)
            .or_kind(Kind::Corrupt, || self.path.display().to_string())
    }

    /// The state. An error of kind `Corrupt`: the directory is not valid.
    pub(crate) fn state(&self) -> Result<DiskState> {
        DiskState::parse(&self.read(STATE)?).ok_or_else(|| {
            Error::new(
                Kind::Corrupt,
                format!(
                    "{} is of another version, is damaged, or was not synced before the machine stopped",
                    self.path.join(STATE).display()
                ),
            )
        })
    }

    /// Syncs all files of the directory, and its name.
    pub(crate) fn sync(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.at("")?)? {
            let entry = entry?;
            if !entry.file_type()?.is_file() {
                continue; // damage, which opening the file finds
            }
            match regular_file::open(&entry.path(), OpenOptions::new().read(true)) {
                // it was removed, or renamed and synced
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                file => file?.sync_all()?,
            }
        }
        // the directory itself, that of the layer, and its parents up to `layers`
        for directory in self.path.ancestors().take(4) {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }

    fn cannot(&self, what: &str, name: &str) -> String {
        format!("cannot {what} {}", self.path.join(name).display())
    }
}

/// The maximum length of a file that is read as a whole.
fn max_bytes(name: &str) -> u64 {
    match name {
        STATE | SOURCES | WINDOW_SOURCES => 16 << 20,
        // more than the longest span with its window
        LAST => 160 << 20,
        // that of a zTOC; what follows from a zTOC is shorter
        _ => 1 << 30,
    }
}

/// The error of a required file that cannot be opened or read.
fn unusable(name: &'static str, context: String, error: io::Error) -> Error {
    match Damage::found(name, &error) {
        Some(damage) => Error::with_source(Kind::Corrupt, context, damage),
        None => Error::with_source(Kind::Io, context, error),
    }
}

/// A directory that is being made. It is removed when it is dropped before [`DiskDraft::publish`].
pub(crate) struct DiskDraft {
    directory: DiskDirectory,
    published: bool,
}

impl DiskDraft {
    /// An empty directory below `new`.
    pub(crate) fn new(new: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = new.join(format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        make_private(&path)?;
        Ok(Self {
            directory: DiskDirectory::new(path),
            published: false,
        })
    }

    pub(crate) fn directory(&self) -> &DiskDirectory {
        &self.directory
    }

    /// Renames the directory to its place. What is there instead of the directory of the layer is removed.
    pub(crate) fn publish(mut self, place: &Path) -> Result<()> {
        let cannot = || format!("cannot make {}", place.display());
        loop {
            if let Some(parent) = place.parent() {
                if !parent.is_dir() {
                    regular_file::remove(parent).or_kind(Kind::Io, || {
                        format!("cannot replace {} by a directory", parent.display())
                    })?;
                }
                make_private(parent)?;
            }
            match fs::rename(self.directory.path(), place) {
                // the last other disk of the layer was removed meanwhile, and the parent with it
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && self.directory.path().is_dir() => {}
                renamed => break renamed.or_kind(Kind::Io, cannot)?,
            }
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for DiskDraft {
    fn drop(&mut self) {
        if !self.published {
            // if this fails, it is removed when the store is opened
            let _ = fs::remove_dir_all(self.directory.path());
        }
    }
}

/// Removes a directory that is not valid: first it is renamed, then deleted.
pub(crate) fn discard(new: &Path, place: &Path) -> Result<()> {
    let draft = DiskDraft::new(new)?;
    let name = place.file_name().unwrap_or(OsStr::new("disk"));
    fs::rename(place, draft.directory().path().join(name))
        .or_kind(Kind::Io, || format!("cannot remove {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_the_place_of_a_directory_in_use_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("disk");
        fs::create_dir(&path).unwrap();
        let directory = DiskDirectory::new(path.clone()).pinned().unwrap();
        directory.replace(STATE, b"ours").unwrap();
        assert_eq!(directory.read(STATE).unwrap(), b"ours");
        for is_another_there in [false, true] {
            // kept, so that its inode number is not used again
            let _ = fs::rename(&path, root.path().join("before"));
            if is_another_there {
                fs::create_dir(&path).unwrap();
                fs::write(path.join(STATE), b"theirs").unwrap();
            }
            let tried = [
                directory.read(STATE).map(drop),
                directory.open(STATE).map(drop),
                directory.open_stored(STATE).map(drop),
                directory.create(REST).map(drop),
                directory.write(REST, b"ours"),
                directory.replace(STATE, b"ours"),
                directory.rewrite(STATE, b"ours"),
                directory.remove(STATE),
                directory.state().map(drop),
                directory.sync().or_kind(Kind::Io, String::new),
            ];
            for (number, tried) in tried.into_iter().enumerate() {
                let error = tried.unwrap_err().report();
                assert!(error.contains("removed while"), "{number}: {error}");
            }
        }
        assert_eq!(fs::read(path.join(STATE)).unwrap(), b"theirs");
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    }
}
