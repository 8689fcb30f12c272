//! The images that were opened in a root, each with a file `<root>/images/<digest of reference and manifest>.json`.
//!
//! The time of the last change of the file is the time when the image was used last. A file that cannot be read counts as missing: the
//! next attach of its image writes it again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, FileTimes},
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
    sync::Mutex,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{Disk, make_private, seal_json, unseal_json},
    oci::{Digest, Reference},
    regular_file,
};

/// The version that this program writes and reads.
const VERSION: u32 = 1;
/// Maximum size of a file. A record of an image with 127 layers has about 20 KB.
const MAX_BYTES: u64 = 1 << 20;

/// A layer and the table of its disk.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
pub struct LayerDisk {
    /// The digest of the layer.
    pub layer: Digest,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
}

impl LayerDisk {
    /// The name of an open disk.
    pub fn of(disk: &Disk) -> Self {
        Self {
            layer: disk.layer().digest,
            table: *disk.table(),
        }
    }
}

/// The record of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ImageRecord {
    version: u32,
    /// The reference by which it was opened.
    pub reference: Reference,
    /// The digest of its manifest.
    pub manifest: Digest,
    /// Whether its disks stay although nobody uses them.
    pub pinned: bool,
    /// The disks of its layers.
    pub disks: Vec<LayerDisk>,
}

/// A record, and when its image was used last.
#[derive(Clone, Debug)]
pub struct UsedImage {
    /// The record.
    pub record: ImageRecord,
    /// When an attach or a detach of the image was last made.
    pub used: SystemTime,
    path: PathBuf,
}

/// Manifests by reference.
type Known = BTreeMap<String, BTreeSet<Digest>>;

/// The image records of a root.
#[derive(Debug)]
pub struct ImageRecords {
    directory: PathBuf,
    /// Held while records are changed. The manifests that each reference has records of, once they were listed: only the process with the
    /// lock of the root adds records.
    changing: Mutex<Option<Known>>,
}

impl ImageRecords {
    /// The records of a root. Creates nothing.
    pub fn open(root: &Path) -> Self {
        Self {
            directory: root.join("images"),
            changing: Mutex::default(),
        }
    }

    /// All records that can be read, the one that was used last first.
    pub fn all(&self) -> Result<Vec<UsedImage>> {
        let context = || format!("cannot list {}", self.directory.display());
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.or_kind(Kind::Io, context)?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.or_kind(Kind::Io, context)?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                all.extend(read(&path));
            }
        }
        sort(&mut all);
        Ok(all)
    }

    /// Records that an image was opened with these disks. A pin of another manifest with the same reference moves to this one.
    pub fn opened(
        &self,
        reference: &Reference,
        manifest: Digest,
        disks: Vec<LayerDisk>,
    ) -> Result<()> {
        let mut known = self.lock();
        let others = self.of_reference(&mut known, reference)?;
        let record = ImageRecord {
            version: VERSION,
            reference: reference.clone(),
            manifest,
            pinned: others.iter().any(|image| image.record.pinned),
            disks,
        };
        self.write(&record)?;
        let known = known.get_or_insert_default();
        let manifests = known.entry(reference.to_string()).or_default();
        manifests.insert(manifest);
        for other in others {
            if other.record.pinned && other.record.manifest != manifest {
                self.write_at(
                    other.used,
                    &ImageRecord {
                        pinned: false,
                        ..other.record
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Records that an image is used until now.
    pub fn used(&self, reference: &Reference, manifest: &Digest) {
        let touched = File::open(self.path(reference, manifest))
            .and_then(|file| file.set_times(FileTimes::new().set_modified(SystemTime::now())));
        match touched {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%reference, "the time of the last use of an image is not recorded: {error}");
            }
            _ => {}
        }
    }

    /// Pins or unpins the image that was opened last by this reference.
    pub fn pin(&self, reference: &Reference, pinned: bool) -> Result<ImageRecord> {
        let mut known = self.lock();
        let images = self.of_reference(&mut known, reference)?;
        let image = images.into_iter().next().ok_or_else(|| {
            let context = format!(
                "no disks of {reference} are in the state directory; attach the image first"
            );
            Error::new(Kind::NotFound, context)
        })?;
        let record = ImageRecord {
            pinned,
            ..image.record
        };
        self.write_at(image.used, &record)?;
        Ok(record)
    }

    /// The records of a reference, the one that was used last first. All records are read once; then only these, so that an attach does not
    /// take longer with each image that the root has.
    fn of_reference(
        &self,
        known: &mut Option<Known>,
        reference: &Reference,
    ) -> Result<Vec<UsedImage>> {
        let known = match known {
            Some(known) => known,
            None => {
                let mut all = Known::new();
                for image in self.all()? {
                    let manifests = all.entry(image.record.reference.to_string()).or_default();
                    manifests.insert(image.record.manifest);
                }
                known.insert(all)
            }
        };
        let manifests = known.get(&reference.to_string()).into_iter().flatten();
        let mut images: Vec<_> = manifests
            .filter_map(|manifest| read(&self.path(reference, manifest)))
            .collect();
        sort(&mut images);
        Ok(images)
    }

    /// Removes a record, unless its image was used or changed meanwhile.
    pub(super) fn remove(&self, image: &UsedImage) -> Result<()> {
        let mut known = self.lock();
        let is_same = read(&image.path)
            .is_some_and(|now| (now.used, &now.record) == (image.used, &image.record));
        if is_same {
            regular_file::remove(&image.path).or_kind(Kind::Io, || {
                format!("cannot remove {}", image.path.display())
            })?;
            let ImageRecord {
                reference,
                manifest,
                ..
            } = &image.record;
            if let Some(known) = &mut *known
                && let Some(manifests) = known.get_mut(&reference.to_string())
            {
                manifests.remove(manifest);
                if manifests.is_empty() {
                    known.remove(&reference.to_string());
                }
            }
        }
        Ok(())
    }

    fn path(&self, reference: &Reference, manifest: &Digest) -> PathBuf {
        let name = Digest::of(format!("{reference}\n{manifest}").as_bytes());
        self.directory.join(format!("{}.json", name.hex()))
    }

    fn write(&self, record: &ImageRecord) -> Result<()> {
        self.write_at(SystemTime::now(), record)
    }

    /// Writes a record atomically. The record of a pinned image is synced, so the pin survives a power cut; another one is not, because an
    /// attach would wait for it, and the next attach writes a lost record again.
    fn write_at(&self, used: SystemTime, record: &ImageRecord) -> Result<()> {
        let path = self.path(&record.reference, &record.manifest);
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            file.write_all(&seal_json(record)?)?;
            file.as_file()
                .set_times(FileTimes::new().set_modified(used))?;
            if !record.pinned {
                file.persist(&path)?;
                return Ok(());
            }
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(&self.directory)?.sync_all()
        };
        make_private(&self.directory)?;
        write().or_kind(Kind::Io, || format!("cannot write {}", path.display()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Known>> {
        self.changing
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The one that was used last first.
fn sort(images: &mut [UsedImage]) {
    images.sort_by(|a, b| (b.used, &a.path).cmp(&(a.used, &b.path)));
}

fn read(path: &Path) -> Option<UsedImage> {
    let read = || -> std::io::Result<_> {
        let bytes = regular_file::read(path, MAX_BYTES)?;
        Ok((bytes, fs::metadata(path)?.modified()?))
    };
    let (bytes, used) = match read() {
        Ok(read) => read,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!("{} cannot be read: {error}", path.display());
            return None;
        }
    };
    let record = unseal_json::<ImageRecord>(&bytes).filter(|record| record.version == VERSION);
    if record.is_none() {
        tracing::warn!(
            "{} is damaged or of another version: the next attach of its image writes it again; a pin is lost",
            path.display()
        );
    }
    Some(UsedImage {
        record: record?,
        used,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn disk(number: u8) -> LayerDisk {
        LayerDisk {
            layer: Digest::new([number; 32]),
            table: Digest::new([number + 100; 32]),
        }
    }

    fn reference(name: &str) -> Reference {
        format!("registry.example/{name}:1").parse().unwrap()
    }

    #[test]
    fn a_pin_stays_with_the_reference_when_its_manifest_changes() {
        let root = tempfile::tempdir().unwrap();
        let records = ImageRecords::open(root.path());
        assert_eq!(records.all().unwrap().len(), 0);
        let app = reference("app");
        let error = records.pin(&app, true).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        let [old, new] = [b"old", b"new"].map(|bytes| Digest::of(bytes));
        records.opened(&app, old, vec![disk(1)]).unwrap();
        records
            .opened(&reference("other"), old, vec![disk(1)])
            .unwrap();
        records.pin(&app, true).unwrap();
        records.opened(&app, old, vec![disk(1), disk(2)]).unwrap();
        records.opened(&app, new, vec![disk(3)]).unwrap();
        let all = ImageRecords::open(root.path()).all().unwrap();
        let state: Vec<_> = all
            .iter()
            .map(|it| (it.record.manifest, it.record.disks.len(), it.record.pinned))
            .collect();
        assert_eq!(state[0], (new, 1, true));
        assert!(
            state[1..]
                .iter()
                .all(|(manifest, _, pinned)| *manifest == old && !pinned)
        );
        assert!(!records.pin(&app, false).unwrap().pinned);
        assert!(
            all.iter()
                .all(|it| it.used.elapsed().unwrap() < Duration::from_secs(600))
        );
    }

    /// Otherwise an attach would take longer with each image that the root has.
    #[test]
    fn the_records_of_other_references_are_read_once() {
        let root = tempfile::tempdir().unwrap();
        let records = ImageRecords::open(root.path());
        let (app, other) = (reference("app"), reference("other"));
        let [old, new] = [b"old", b"new"].map(|bytes| Digest::of(bytes));
        for image in [&app, &other] {
            records.opened(image, old, vec![disk(1)]).unwrap();
        }
        let path = records.path(&other, &old);
        let bytes = fs::read(&path).unwrap();
        let never = SystemTime::UNIX_EPOCH;
        let file = File::open(&path).unwrap();
        file.set_times(FileTimes::new().set_accessed(never))
            .unwrap();
        records.pin(&app, true).unwrap();
        records.opened(&app, new, vec![disk(2)]).unwrap();
        let accessed = fs::metadata(&path).unwrap().accessed().unwrap();
        assert_eq!(accessed, never, "the record of another image was read");
        assert_eq!(bytes, fs::read(&path).unwrap());
        // what was removed is not known any more
        for image in records.all().unwrap() {
            records.remove(&image).unwrap();
        }
        assert_eq!(records.all().unwrap().len(), 0);
        assert!(records.lock().as_ref().unwrap().is_empty());
        assert!(records.pin(&app, true).is_err());
    }

    #[test]
    fn a_record_that_was_used_meanwhile_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let records = ImageRecords::open(root.path());
        let (app, manifest) = (reference("app"), Digest::of(b"manifest"));
        records.opened(&app, manifest, vec![disk(1)]).unwrap();
        let seen = records.all().unwrap().remove(0);
        records.used(&app, &manifest);
        records.remove(&seen).unwrap();
        let seen = records.all().unwrap().remove(0);
        records.remove(&seen).unwrap();
        assert_eq!(records.all().unwrap().len(), 0);
        records.used(&app, &manifest);
        records.remove(&seen).unwrap();
    }

    #[test]
    fn what_is_no_record_counts_as_missing() {
        let root = tempfile::tempdir().unwrap();
        let records = ImageRecords::open(root.path());
        let (app, manifest) = (reference("app"), Digest::of(b"manifest"));
        records.opened(&app, manifest, vec![disk(1)]).unwrap();
        let path = records.path(&app, &manifest);
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(records.all().unwrap().len(), 0, "byte {at}");
        }
        fs::write(records.directory.join("other.json"), "").unwrap();
        fs::create_dir(records.directory.join("directory.json")).unwrap();
        fs::write(records.directory.join("file"), "").unwrap();
        assert_eq!(records.all().unwrap().len(), 0);
        records.opened(&app, manifest, vec![disk(1)]).unwrap();
        assert_eq!(records.all().unwrap().len(), 1);
    }
}
