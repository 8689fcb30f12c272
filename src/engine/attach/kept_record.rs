//! The record of a kept attachment, which is attached again after a reboot: `kept.json` in the directory of the attachment.
//!
//! It has all that a later daemon needs to attach the image without its source. A directory with this file is not removed before the
//! attachment is forgotten (`detach`), because its writable layer may have files of the user.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::types::{Attachment, DeviceChoice};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{seal_json, unseal_json},
    regular_file,
};

/// The name of the file.
pub(super) const FILE: &str = "kept.json";
/// The version that this program writes and reads.
const VERSION: u32 = 1;
/// Maximum size of the file. A record of an image with 127 layers has about 100 KB.
const MAX_SIZE: u64 = 4 << 20;

/// The record of a kept attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KeptRecord {
    version: u32,
    /// Attachments are restored in the order of these numbers.
    pub(super) number: u64,
    /// The requested kind of device.
    pub(super) device: DeviceChoice,
    /// Whether device nodes in the image work as devices.
    pub(super) allow_devices: bool,
    /// The attachment as it was made. Its devices do not exist after a reboot.
    pub(super) attachment: Attachment,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl KeptRecord {
    pub(super) fn new(
        number: u64,
        attachment: Attachment,
        device: DeviceChoice,
        allow_devices: bool,
    ) -> Self {
        Self {
            version: VERSION,
            number,
            device,
            allow_devices,
            attachment,
        }
    }

    /// Whether a directory has such a file, readable or not.
    pub(super) fn is_in(directory: &Path) -> bool {
        fs::symlink_metadata(directory.join(FILE)).is_ok()
    }

    /// Writes the file atomically, and syncs it with its directory and the parents of that up to the root.
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        let write = || -> std::io::Result<()> {
            regular_file::replace_synced(&directory.join(FILE), &seal_json(self)?)?;
            for directory in directory.ancestors().skip(1).take(2) {
                File::open(directory)?.sync_all()?;
            }
            Ok(())
        };
        write().or_kind(Kind::Io, || {
            format!("writing {}", directory.join(FILE).display())
        })
    }

    /// Removes the file, if it exists, and syncs the directory: the attachment is not kept any more.
    pub(super) fn remove(directory: &Path) -> Result<()> {
        let path = directory.join(FILE);
        let removed = regular_file::remove(&path).and_then(|()| File::open(directory)?.sync_all());
        match removed {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.or_kind(Kind::Io, || format!("removing {}", path.display())),
        }
    }

    /// Reads the file of the attachment with this ID. The error says what to do.
    pub(super) fn read(directory: &Path, id: &str) -> Result<Self> {
        let path = directory.join(FILE);
        let damaged = || {
            format!(
                "{} is damaged: `socinbd detach {id}` removes it, then attach the image again with --keep",
                path.display()
            )
        };
        let bytes = regular_file::read(&path, MAX_SIZE).or_kind(Kind::Corrupt, damaged)?;
        let version = unseal_json::<Versioned>(&bytes)
            .ok_or_else(|| Error::new(Kind::Corrupt, damaged()))?
            .version;
        if version != VERSION {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} has version {version}, and this program reads version {VERSION}: use the program that has written it, or remove it with `socinbd detach {id}`",
                    path.display()
                ),
            ));
        }
        let record: Option<Self> = unseal_json(&bytes);
        record
            .filter(|record| record.attachment.id == id && record.mountpoint().is_some())
            .ok_or_else(|| Error::new(Kind::Corrupt, damaged()))
    }

    /// The mount point, which is absolute.
    pub(super) fn mountpoint(&self) -> Option<&PathBuf> {
        let mountpoint = self.attachment.mountpoint.as_ref();
        mountpoint.filter(|path| path.is_absolute())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::attach::types::tests::attachment;

    fn record(id: &str) -> KeptRecord {
        let attachment = Attachment {
            mountpoint: Some("/mnt".into()),
            ..attachment(id)
        };
        KeptRecord::new(7, attachment, DeviceChoice::Auto, true)
    }

    fn kind(directory: &Path) -> Kind {
        let error = KeptRecord::read(directory, "a").unwrap_err();
        assert!(error.report().contains("socinbd detach a"), "{error:?}");
        error.kind()
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!KeptRecord::is_in(directory.path()));
        record("a").write(directory.path()).unwrap();
        assert!(KeptRecord::is_in(directory.path()));
        let read = KeptRecord::read(directory.path(), "a").unwrap();
        assert_eq!((read.number, read.allow_devices), (7, true));
        assert_eq!(read.mountpoint(), Some(&"/mnt".into()));
        KeptRecord::remove(directory.path()).unwrap();
        KeptRecord::remove(directory.path()).unwrap();
        assert!(!KeptRecord::is_in(directory.path()));
    }

    #[test]
    fn each_changed_or_missing_byte_is_found() {
        let directory = tempfile::tempdir().unwrap();
        record("a").write(directory.path()).unwrap();
        let path = directory.path().join(FILE);
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 2;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(kind(directory.path()), Kind::Corrupt, "{at}");
            fs::write(&path, &bytes[..at]).unwrap();
            assert_eq!(kind(directory.path()), Kind::Corrupt, "{at}");
        }
    }

    #[test]
    fn what_is_not_such_a_file_is_refused_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let refused = |expected| {
            assert!(KeptRecord::is_in(directory.path()));
            assert_eq!(kind(directory.path()), expected);
            KeptRecord::remove(directory.path()).unwrap();
            assert!(!KeptRecord::is_in(directory.path()));
        };
        fs::create_dir(&path).unwrap();
        refused(Kind::Corrupt);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        refused(Kind::Corrupt);
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        refused(Kind::Corrupt);
        let huge = File::create(&path).unwrap();
        huge.set_len(1 << 40).unwrap();
        refused(Kind::Corrupt);
        // of another attachment, without a mount point, with a relative one
        record("b").write(directory.path()).unwrap();
        refused(Kind::Corrupt);
        for mountpoint in [None, Some("mnt".into())] {
            let mut record = record("a");
            record.attachment.mountpoint = mountpoint;
            record.write(directory.path()).unwrap();
            refused(Kind::Corrupt);
        }
        let mut later = record("a");
        later.version = VERSION + 1;
        later.write(directory.path()).unwrap();
        refused(Kind::Unsupported);
    }
}
