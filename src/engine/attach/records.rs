//! Attachment records: what later daemons need to know about the attachments of a daemon that died. Each attachment has a directory
//! `attachments/<id>` in the root, with its record and its own directory trees.
//!
//! A record is written before the mount is made and removed after the last device is released, so every mount has a record. It is stored
//! beside the trees, in the root: files written with `--rw` must be found even when the runtime directory, which is usually in memory, is
//! gone. Devices and mounts do not survive a reboot, so a record has the ID of its boot.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    kept_record::{self, KeptRecord},
    types::{Attachment, AttachmentStatus},
};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel,
    layer::make_private,
    regular_file,
    versions::{is_read, readable},
};

/// File name of the record in the directory of an attachment.
const RECORD: &str = "record.json";
/// The version of a record that this program writes.
pub(crate) const RECORD_VERSION: u32 = 2;

/// Maximum size of a record, which has some hundred bytes for each layer.
const MAX_BYTES: u64 = 16 << 20;

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
    version: u32,
    boot_id: String,
    /// Runtime directory of its daemon.
    run_dir: PathBuf,
    /// Device number of the overlay, once the overlay exists.
    pub(super) mount_device: Option<(u32, u32)>,
    #[serde(flatten)]
    pub(super) attachment: Attachment,
}

impl AttachmentRecord {
    /// Whether its overlay existed, which others than the daemon can use.
    pub(super) fn was_mounted(&self) -> bool {
        self.mount_device.is_some()
    }
}

/// What is read of a record first.
#[derive(Deserialize)]
struct RecordVersion {
    /// Records of version 1 have none.
    #[serde(default = "first")]
    version: u32,
}

fn first() -> u32 {
    1
}

/// The directory of an attachment.
pub(crate) struct AttachmentDirectory {
    pub(super) id: String,
    /// `None` if there is no readable record of this boot. Then nothing of the attachment is mounted and it has no devices.
    pub(crate) record: Option<AttachmentRecord>,
    /// Whether it is attached again after a reboot.
    pub(super) is_kept: bool,
    /// The version of a record that this program cannot read: the attachment is left alone.
    pub(super) unknown_version: Option<u32>,
}

/// The name of the writable layer in the directory of an attachment.
pub(super) const UPPER: &str = "upper";

impl AttachmentRecords {
    /// The records of a root, for a runtime directory. Creates nothing. Both paths are absolute.
    pub fn open(root: &Path, run_dir: &Path) -> Result<Self> {
        Ok(Self {
            directory: root.join("attachments"),
            run_dir: real(run_dir),
            boot_id: kernel::boot_id()?,
        })
    }

    /// The root.
    pub(crate) fn root(&self) -> &Path {
        self.directory.parent().unwrap_or(&self.directory)
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
            version: RECORD_VERSION,
            boot_id: self.boot_id.clone(),
            run_dir: self.run_dir.clone(),
            mount_device,
            attachment: attachment.clone(),
        };
        let write = || -> std::io::Result<()> {
            regular_file::replace(&directory.join(RECORD), &serde_json::to_vec(&record)?)
        };
        write().or_kind(Kind::Io, || {
            format!(
                "writing the record of an attachment in {}",
                directory.display()
            )
        })
    }

    /// Removes the trees of an attachment, then its record. It is not kept any more. Succeeds if they do not exist.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        let directory = self.directory_of(id);
        if fs::symlink_metadata(&directory).is_ok_and(|there| !there.is_dir()) {
            return done(regular_file::remove(&directory), &directory);
        }
        // first: what is left is not attached again
        KeptRecord::remove(&directory)?;
        let remove = || {
            remove_trees(&directory, |_| false)?;
            fs::remove_dir_all(&directory)
        };
        done(remove(), &directory)
    }

    /// As [`Self::remove`], but a kept attachment stays one, with its writable layer.
    pub(super) fn put_away(&self, id: &str) -> Result<()> {
        let directory = self.directory_of(id);
        if !KeptRecord::is_in(&directory) {
            return self.remove(id);
        }
        let put_away = || {
            remove_trees(&directory, |name| {
                name == kept_record::FILE || name == UPPER
            })?;
            regular_file::remove(&directory.join(RECORD))
        };
        done(put_away(), &directory)
    }

    /// Keeps an attachment: it is attached again after a reboot.
    pub(super) fn keep(&self, record: &KeptRecord) -> Result<()> {
        record.write(&self.directory_of(&record.attachment.id))
    }

    /// The record of a kept attachment.
    pub(super) fn kept(&self, id: &str) -> Result<KeptRecord> {
        KeptRecord::read(&self.directory_of(id), id)
    }

    /// Whether the attachment with this ID is kept, also if its record is damaged.
    pub fn is_kept(&self, id: &str) -> bool {
        let is_id = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_id && KeptRecord::is_in(&self.directory_of(id))
    }

    /// The attachments of the root, of any runtime directory, and the kept ones. An error: a record cannot be read, so that it is not known
    /// what its attachment uses.
    pub(crate) fn all(&self) -> Result<Vec<Attachment>> {
        let mut all = Vec::new();
        for entry in self.entries()? {
            if let Some(version) = entry.unknown_version {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "attachment {} has a record of version {version}, and this program reads {}; use the program that has written it",
                        entry.id,
                        readable(RECORD_VERSION)
                    ),
                ));
            }
            if entry.is_kept {
                all.push(self.kept(&entry.id)?.attachment);
            }
            all.extend(entry.record.map(|record| record.attachment));
        }
        Ok(all)
    }

    /// The IDs of all kept attachments.
    pub fn all_kept(&self) -> Result<Vec<String>> {
        let kept = self.entries()?.into_iter().filter(|entry| entry.is_kept);
        Ok(kept.map(|entry| entry.id).collect())
    }

    /// The attachments that have no daemon: those of this boot and runtime directory, and kept ones that are not attached. Sorted by ID.
    pub fn without_daemon(&self) -> Result<Vec<AttachmentStatus>> {
        let statuses = self
            .entries()?
            .into_iter()
            .filter_map(|entry| match entry.record {
                Some(record) if self.has(&record) => {
                    Some(AttachmentStatus::dead(record.attachment))
                }
                None if entry.is_kept => {
                    let record = self.kept(&entry.id).inspect_err(|error| {
                        tracing::warn!("{}", error.report());
                    });
                    Some(AttachmentStatus::kept(record.ok()?.attachment, None))
                }
                _ => None,
            });
        Ok(statuses.collect())
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
                let (record, unknown_version) = match self.read(&path.join(RECORD)) {
                    ReadRecord::Record(record) => (Some(*record), None),
                    ReadRecord::None => (None, None),
                    ReadRecord::UnknownVersion(version) => (None, Some(version)),
                };
                found.push(AttachmentDirectory {
                    id: id.to_owned(),
                    record,
                    unknown_version,
                    is_kept: KeptRecord::is_in(&path),
                });
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    fn read(&self, path: &Path) -> ReadRecord {
        let bytes = match regular_file::read(path, MAX_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return ReadRecord::None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read the record of an attachment");
                return ReadRecord::None;
            }
        };
        match self.parse(&bytes) {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "invalid record of an attachment");
                ReadRecord::None
            }
        }
    }

    fn parse(&self, bytes: &[u8]) -> serde_json::Result<ReadRecord> {
        let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
        let RecordVersion { version } = RecordVersion::deserialize(&value)?;
        if !is_read(version, RECORD_VERSION) {
            return Ok(ReadRecord::UnknownVersion(version));
        }
        // version 2 is version 1 with its number
        value["version"] = version.into();
        let record = AttachmentRecord::deserialize(value)?;
        Ok(match record.boot_id == self.boot_id {
            true => ReadRecord::Record(Box::new(record)),
            false => ReadRecord::None,
        })
    }
}

/// What the file of a record is.
enum ReadRecord {
    Record(Box<AttachmentRecord>),
    /// There is none of this boot.
    None,
    UnknownVersion(u32),
}

/// Removes all of a directory except its record and what is to stay.
fn remove_trees(directory: &Path, stays: impl Fn(&str) -> bool) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == RECORD || name.to_str().is_some_and(&stays) {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

fn done(removed: std::io::Result<()>, directory: &Path) -> Result<()> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).or_kind(Kind::Io, || format!("removing {}", directory.display()))
        }
        _ => Ok(()),
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
    use crate::engine::attach::types::{AttachmentState, DeviceChoice, tests::attachment};

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
        assert_eq!(first.without_daemon().unwrap().len(), 0);
        first.write(&attachment("a"), Some((0, 52))).unwrap();
        assert_eq!(first.without_daemon().unwrap().len(), 1);
        let found = first.find("a").unwrap().unwrap();
        assert_eq!(found.mount_device, Some((0, 52)));
        assert!(first.find("b").unwrap().is_none());
        // of another runtime directory: not in `without_daemon`, but in `entries`
        let second = records(root.path(), "/run/2", "today");
        assert_eq!(second.without_daemon().unwrap().len(), 0);
        assert!(second.entries().unwrap()[0].record.is_some());
        // of another boot: only the directory remains
        let later = records(root.path(), "/run/1", "tomorrow");
        assert_eq!(later.without_daemon().unwrap().len(), 0);
        let entries = later.entries().unwrap();
        assert_eq!(entries[0].id, "a");
        assert!(entries[0].record.is_none());
        later.remove("a").unwrap();
        later.remove("a").unwrap();
        assert_eq!(later.entries().unwrap().len(), 0);
    }

    #[test]
    fn a_kept_attachment_stays_with_its_writable_layer_until_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let records = records(root.path(), "/run/1", "today");
        let attachment = Attachment {
            mountpoint: Some("/mnt".into()),
            ..attachment("a")
        };
        records.write(&attachment, None).unwrap();
        let directory = records.directory_of("a");
        for tree in ["upper", "work", "top"] {
            fs::create_dir(directory.join(tree)).unwrap();
            fs::write(directory.join(tree).join("file"), b"").unwrap();
        }
        let record = KeptRecord::new(1, attachment, DeviceChoice::Auto, false);
        records.keep(&record).unwrap();
        assert_eq!(
            records.without_daemon().unwrap()[0].state,
            AttachmentState::Dead
        );
        records.put_away("a").unwrap();
        let mut left: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["kept.json", "upper"]);
        assert!(directory.join("upper/file").exists());
        assert_eq!(
            records.without_daemon().unwrap()[0].state,
            AttachmentState::Kept
        );
        assert!(records.is_kept("a") && !records.is_kept("b"));
        for strange in ["", ".", "..", "../attachments/a", "a/.", "/"] {
            assert!(!records.is_kept(strange), "{strange}");
        }
        assert_eq!(records.all_kept().unwrap(), ["a"]);
        records.remove("a").unwrap();
        assert!(!directory.exists());
        records.put_away("a").unwrap();
    }

    #[test]
    fn a_record_of_the_version_before_is_read_and_of_another_one_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let records = records(root.path(), "/run/1", "today");
        records.write(&attachment("a"), Some((0, 52))).unwrap();
        let path = records.directory_of("a").join(RECORD);
        let written: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(written["version"], RECORD_VERSION);
        let read = |version: Option<u32>| {
            let mut record = written.clone();
            match version {
                Some(version) => record["version"] = version.into(),
                None => drop(record.as_object_mut().unwrap().remove("version")),
            }
            fs::write(&path, record.to_string()).unwrap();
            let entry = records.entries().unwrap().remove(0);
            (entry.record.is_some(), entry.unknown_version)
        };
        assert_eq!(read(None), (true, None));
        assert_eq!(read(Some(1)), (true, None));
        assert_eq!(read(Some(2)), (true, None));
        assert_eq!(read(Some(3)), (false, Some(3)));
        assert_eq!(read(Some(0)), (false, Some(0)));
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
