//! Opens, reads, replaces and removes files of the state and runtime directories, which may have been damaged: in the place of a file there may be a directory, a FIFO, a
//! device or a symbolic link, or a file of any length. No call here waits for another process or reads more than it was told to.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use rustix::fs::OFlags;
use tempfile::NamedTempFile;

/// Opens a regular file. Symbolic links are not followed.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    Ok(open_with_metadata(path, options)?.0)
}

/// As [`open`], with what is known of the file by then.
pub(crate) fn open_with_metadata(
    path: &Path,
    options: &mut OpenOptions,
) -> io::Result<(File, Metadata)> {
    // without NONBLOCK, the open of a FIFO waits for its other end
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options.custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok((file, metadata)),
        false => Err(invalid("it is not a regular file".to_owned())),
    }
}

/// As [`open`]; anything else in the place of the file is removed first, but not a directory with content: that may be of a person.
/// `options` must allow to create the file.
pub(crate) fn open_or_replace(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        tracing::warn!(
            "{} is not a regular file; it is removed and made again",
            path.display()
        );
        remove_one(path)?;
    }
    open(path, options)
}

/// Reads a whole regular file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (file, metadata) = open_with_metadata(path, OpenOptions::new().read(true))?;
    let length = metadata.len();
    if length > limit {
        return Err(invalid(format!(
            "it has {length} bytes; the limit is {limit}"
        )));
    }
    let mut bytes = Vec::with_capacity(length as usize); // at most `limit`
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last bytes of a regular file, at most `limit`.
pub(crate) fn read_end(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (mut file, metadata) = open_with_metadata(path, OpenOptions::new().read(true))?;
    let start = metadata.len().saturating_sub(limit);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a file as a whole, or makes it, with mode 0600: a reader finds the old content or the new one. A power cut may lose both.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    written(path, bytes)?.persist(path)?;
    Ok(())
}

/// As [`replace`], and syncs the file and its directory: after a power cut the content is the new one.
pub(crate) fn replace_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = written(path, bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(directory_of(path)?)?.sync_all()
}

/// A new file with a temporary name, in the directory of a path.
fn written(path: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new_in(directory_of(path)?)?;
    file.write_all(bytes)?;
    Ok(file)
}

fn directory_of(path: &Path) -> io::Result<&Path> {
    path.parent()
        .ok_or_else(|| invalid("it is not the path of a file".to_owned()))
}

/// Removes whatever is at a path, also a directory with content. Succeeds if nothing is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    remove_with(path, |path| fs::remove_dir_all(path))
}

/// As [`remove`], but a directory with content is an error.
pub(crate) fn remove_one(path: &Path) -> io::Result<()> {
    remove_with(path, |path| fs::remove_dir(path))
}

fn remove_with(
    path: &Path,
    remove_directory: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => remove_directory(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_of_limited_length_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "12345").unwrap();
        assert_eq!(read(&at("file"), 5).unwrap(), b"12345");
        assert_eq!(read_end(&at("file"), 2).unwrap(), b"45");
        assert_eq!(read_end(&at("file"), 9).unwrap(), b"12345");
        replace(&at("file"), b"new").unwrap();
        assert_eq!(read(&at("file"), 5).unwrap(), b"new");
        replace_synced(&at("file"), b"12345").unwrap();
        assert_eq!(read(&at("file"), 5).unwrap(), b"12345");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = read(&at("file"), 4).unwrap_err();
        assert!(error.to_string().contains("the limit is 4"), "{error}");

        fs::create_dir(at("directory")).unwrap();
        fs::write(at("directory").join("inside"), "").unwrap();
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), mode).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("link")).unwrap();
        for name in ["directory", "fifo", "link"] {
            read(&at(name), 5).unwrap_err();
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            open(&at(name), &mut options).unwrap_err();
            options.create(true);
            let is_replaced = open_or_replace(&at(name), &mut options).is_ok();
            assert_eq!(is_replaced, name != "directory", "{name}");
            remove(&at(name)).unwrap();
            assert!(fs::symlink_metadata(at(name)).is_err(), "{name}");
            remove(&at(name)).unwrap();
        }
        assert!(Path::new("/dev/zero").exists());
    }
}
