//! Attachment records: what later daemons need to know about the attachments of a daemon that died. Each attachment has a directory
//! `attachments/<id>` in the root, with its record and its own directory trees.
//!
//! A record is written before the mount is made and removed after the last device is released, so every mount has a record. It is stored
//! beside the trees, in the root: files written with `--rw` must be found even when the runtime directory, which is usually in memory, is
//! gone. Devices and mounts do not survive a reboot, so a record has the ID of its boot.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::types::Attachment;
use crate::{
    error::{Kind, Result, ResultExt},
    kernel,
    layer::make_private,
};

/// File name of the record in the directory of an attachment.
const RECORD: &str = "record.json";

/// The attachment records of a root.
#[derive(Clone, Debug)]
pub struct AttachmentRecords {
    directory: PathBuf,
    /// The runtime directory of the attachments that are written here.
    run_dir: PathBuf,
    boot_id: String,
}

/// The record of an attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AttachmentRecord {
    boot_id: String,
    /// Runtime directory of its daemon.
    run_dir: PathBuf,
    /// Device number of the overlay, once the overlay exists.
    pub(super) mount_device: Option<(u32, u32)>,
    #[serde(flatten)]
    pub(super) attachment: Attachment,
}

/// The directory of an attachment.
pub(crate) struct AttachmentDirectory {
    pub(super) id: String,
    /// `None` if there is no readable record of this boot. Then nothing of the attachment is mounted and it has no devices.
    pub(crate) record: Option<AttachmentRecord>,
}

impl AttachmentRecords {
    /// The records of a root, for a runtime directory. Creates nothing. Both paths are absolute.
    pub fn open(root: &Path, run_dir: &Path) -> Result<Self> {
        Ok(Self {
            directory: root.join("attachments"),
            run_dir: real(run_dir),
            boot_id: kernel::boot_id()?,
        })
    }

    /// The directory for the trees of an attachment: the top tree of the stack, and the writable layer.
    pub(super) fn directory_of(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Writes a record atomically.
    pub(crate) fn write(
        &self,
        attachment: &Attachment,
        mount_device: Option<(u32, u32)>,
    ) -> Result<()> {
        let directory = self.directory_of(&attachment.id);
        make_private(&directory)?;
        let record = AttachmentRecord {
            boot_id: self.boot_id.clone(),
            run_dir: self.run_dir.clone(),
            mount_device,
            attachment: attachment.clone(),
        };
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&directory)?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            file.persist(directory.join(RECORD))?;
            Ok(())
        };
        write().or_kind(Kind::Io, || {
            format!(
                "writing the record of an attachment in {}",
                directory.display()
            )
        })
    }

    /// Removes the trees of an attachment, then its record. Succeeds if they do not exist.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        let directory = self.directory_of(id);
        let remove = || -> std::io::Result<()> {
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else if entry.file_name() != RECORD {
                    fs::remove_file(entry.path())?;
                }
            }
            fs::remove_dir_all(&directory)
        };
        match remove() {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).or_kind(Kind::Io, || format!("removing {}", directory.display()))
            }
            _ => Ok(()),
        }
    }

    /// The attachments of this boot and runtime directory, sorted by ID.
    pub fn all(&self) -> Result<Vec<Attachment>> {
        let records = self.entries()?.into_iter().filter_map(|entry| entry.record);
        Ok(records
            .filter(|record| self.has(record))
            .map(|record| record.attachment)
            .collect())
    }

    /// Whether a record is of this runtime directory.
    pub(super) fn has(&self, record: &AttachmentRecord) -> bool {
        record.run_dir == self.run_dir
    }

    /// The record of the attachment with this ID, if it is of this boot.
    pub(crate) fn find(&self, id: &str) -> Result<Option<AttachmentRecord>> {
        let mut entries = self.entries()?.into_iter();
        Ok(entries
            .find(|entry| entry.id == id)
            .and_then(|it| it.record))
    }

    /// All attachment directories of the root, sorted by ID, of any runtime directory and boot.
    pub(crate) fn entries(&self) -> Result<Vec<AttachmentDirectory>> {
        let context = || format!("listing {}", self.directory.display());
        let listed = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed.or_kind(Kind::Io, context)?,
        };
        let mut found = Vec::new();
        for entry in listed {
            let path = entry.or_kind(Kind::Io, context)?.path();
            if let Some(id) = path.file_name().and_then(|name| name.to_str()) {
                found.push(AttachmentDirectory {
                    id: id.to_owned(),
                    record: self.read(&path.join(RECORD)),
                });
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    fn read(&self, path: &Path) -> Option<AttachmentRecord> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read the record of an attachment");
                return None;
            }
        };
        match serde_json::from_slice::<AttachmentRecord>(&bytes) {
            Ok(record) => (record.boot_id == self.boot_id).then_some(record),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "invalid record of an attachment");
                None
            }
        }
    }
}

/// The path without symlinks, if the directory exists.
fn real(directory: &Path) -> PathBuf {
    directory
        .canonicalize()
        .unwrap_or_else(|_| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::attach::types::tests::attachment;

    fn records(root: &Path, run_dir: &str, boot_id: &str) -> AttachmentRecords {
        AttachmentRecords {
            directory: root.join("attachments"),
            run_dir: run_dir.into(),
            boot_id: boot_id.into(),
        }
    }

    #[test]
    fn a_record_is_of_its_boot_and_run_directory() {
        let root = tempfile::tempdir().unwrap();
        let first = records(root.path(), "/run/1", "today");
        assert_eq!(first.all().unwrap().len(), 0);
        first.write(&attachment("a"), Some((0, 52))).unwrap();
        assert_eq!(first.all().unwrap().len(), 1);
        let found = first.find("a").unwrap().unwrap();
        assert_eq!(found.mount_device, Some((0, 52)));
        assert!(first.find("b").unwrap().is_none());
        // of another runtime directory: not in `all`, but in `entries`
        let second = records(root.path(), "/run/2", "today");
        assert_eq!(second.all().unwrap().len(), 0);
        assert!(second.entries().unwrap()[0].record.is_some());
        // of another boot: only the directory remains
        let later = records(root.path(), "/run/1", "tomorrow");
        assert_eq!(later.all().unwrap().len(), 0);
        let entries = later.entries().unwrap();
        assert_eq!(entries[0].id, "a");
        assert!(entries[0].record.is_none());
        later.remove("a").unwrap();
        later.remove("a").unwrap();
        assert_eq!(later.entries().unwrap().len(), 0);
    }

    #[test]
    fn what_is_no_record_is_a_folder_without_one() {
        let root = tempfile::tempdir().unwrap();
        let records = records(root.path(), "/run/1", "today");
        for (id, bytes) in [("a", &b"{}"[..]), ("b", b"\0\xff"), ("c", b"")] {
            fs::create_dir_all(records.directory_of(id)).unwrap();
            fs::write(records.directory_of(id).join(RECORD), bytes).unwrap();
        }
        fs::create_dir_all(records.directory_of("d").join(RECORD)).unwrap();
        fs::create_dir_all(records.directory_of("e").join("upper")).unwrap();
        let entries = records.entries().unwrap();
        assert_eq!(entries.len(), 5);
        for entry in entries {
            assert!(entry.record.is_none(), "{}", entry.id);
            records.remove(&entry.id).unwrap();
        }
        assert_eq!(records.entries().unwrap().len(), 0);
    }
}
