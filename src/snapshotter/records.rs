//! The records of snapshots: all in memory, and a file for each, `<set>/<number>/record.json`, beside the directories of the snapshot.
//!
//! A change is in its file before it is answered: the file is written, synced and renamed, and its directory is synced. A file has a version
//! and a checksum. A record that cannot be read is made again from its copy: containerd has a record of its own, by which it takes the snapshot
//! to be there, and nothing that the snapshotter answers would make it unpack the layer again. Without a copy the snapshot does not exist, and
//! its directory is removed with the next cleanup.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{changes::Changes, errors::SnapshotError};
use crate::{
    engine::{
        DiskBasis,
        space::snapshots::{COPY, FoundRecord, RECORD, VERSION, read_record},
    },
    error::{Error, Kind, Result, ResultExt as _},
    layer::{LayerBlob, make_private, seal_json},
    oci::{Digest, Reference},
    regular_file,
};

/// Maximum length of a name, in bytes: containerd's namespace and number, and a path.
const MAX_NAME_BYTES: usize = 8 << 10;
/// Maximum size of the labels of a snapshot, in bytes.
const MAX_LABEL_BYTES: usize = 256 << 10;
/// Maximum number of snapshots of a set.
const MAX_SNAPSHOTS: usize = 100_000;

/// The labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// The kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// A writable layer.
    Active,
    /// A read-only view of a committed snapshot.
    View,
    /// A layer that can be a parent.
    Committed,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Number of its directory, unique in its set.
    pub id: u64,
    /// The client's name: a key, or, for a committed snapshot, the name of the commit.
    pub name: String,
    /// Name of the parent, which is committed; the lowest has none.
    pub parent: Option<String>,
    /// Kind.
    pub kind: SnapshotKind,
    /// The client's labels.
    pub labels: Labels,
    /// Time of the creation, or of the commit.
    pub created: SystemTime,
    /// Time of the last change.
    pub updated: SystemTime,
    /// The layer whose file system is its content; `None`: its content is in the directory.
    pub layer: Option<LazyLayer>,
    /// Bytes and inodes of a committed directory.
    pub usage: Option<Usage>,
    /// Why containerd extracts it, where its labels name an image.
    #[serde(default)]
    pub why: Option<String>,
}

/// A layer of an image whose file system is the content of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LazyLayer {
    /// The layer, as the manifest and the configuration of the image name it.
    pub blob: LayerBlob,
    /// The table of its disk.
    pub table: Digest,
    /// How its disk was made.
    pub basis: DiskBasis,
    /// What has chosen how it was pulled, for people.
    #[serde(default)]
    pub chosen_by: String,
    /// The chain ID of this layer and those below it.
    pub chain_id: Digest,
    /// The image that was pulled.
    pub image: Reference,
    /// The digest of its manifest.
    pub manifest: Digest,
}

/// What a snapshot uses on the local disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub size: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A snapshot that is to be created.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// Its name.
    pub name: String,
    /// Name of the parent; empty: none.
    pub parent: String,
    /// Kind.
    pub kind: SnapshotKind,
    /// Labels.
    pub labels: Labels,
    /// See [`Snapshot::layer`].
    pub layer: Option<LazyLayer>,
    /// See [`Snapshot::why`].
    pub why: Option<String>,
}

#[derive(Serialize)]
struct Record<'a> {
    version: u32,
    snapshot: &'a Snapshot,
}

/// All snapshots of a set.
pub struct Records {
    directory: PathBuf,
    by_name: RwLock<BTreeMap<String, Arc<Snapshot>>>,
    changes: Changes,
}

impl Records {
    /// Reads the records in a directory, which is made if it is missing. Blocks.
    pub fn open(directory: &Path) -> Result<Self> {
        make_private(directory)?;
        let context = || format!("listing {}", directory.display());
        let mut by_name = BTreeMap::new();
        let mut next = 1;
        for entry in fs::read_dir(directory).or_kind(Kind::Io, context)? {
            let path = entry.or_kind(Kind::Io, context)?.path();
            let Some(id) = number_of(&path) else { continue };
            next = next.max(id.saturating_add(1));
            let Some(snapshot) = read(&path, id) else {
                continue;
            };
            let replaced = by_name.insert(snapshot.name.clone(), Arc::new(snapshot));
            if let Some(other) = replaced {
                tracing::warn!(name = other.name, "two snapshots have one name");
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            by_name: RwLock::new(by_name),
            changes: Changes::new(next),
        })
    }

    /// The directory of a snapshot.
    pub fn directory_of(&self, id: u64) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn all(&self) -> RwLockReadGuard<'_, BTreeMap<String, Arc<Snapshot>>> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, removed: Option<&str>, added: Option<Arc<Snapshot>>) {
        let mut all = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = removed {
            all.remove(name);
        }
        if let Some(snapshot) = added {
            all.insert(snapshot.name.clone(), snapshot);
        }
    }

    /// The snapshot of a name.
    pub fn get(&self, name: &str) -> Result<Arc<Snapshot>, SnapshotError> {
        self.all().get(name).cloned().ok_or_else(|| missing(name))
    }

    /// All snapshots, by name.
    pub fn list(&self) -> Vec<Arc<Snapshot>> {
        self.all().values().cloned().collect()
    }

    /// The snapshot of this name and its parents, the snapshot first; none for an empty name.
    pub fn chain(&self, name: &str) -> Result<Vec<Arc<Snapshot>>, SnapshotError> {
        let all = self.all();
        let mut chain: Vec<Arc<Snapshot>> = Vec::new();
        let mut next = Some(name).filter(|name| !name.is_empty());
        while let Some(name) = next {
            // a damaged record could be its own parent
            if chain.len() > all.len() {
                return Err(SnapshotError::FailedPrecondition(format!(
                    "the parents of snapshot {name} are a circle"
                )));
            }
            let snapshot = all.get(name).ok_or_else(|| missing(name))?;
            chain.push(Arc::clone(snapshot));
            next = snapshot.parent.as_deref();
        }
        Ok(chain)
    }

    /// Creates a snapshot. `prepare` fills its directory before the record is written. Blocks.
    pub fn create(
        &self,
        new: NewSnapshot,
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Arc<Snapshot>, SnapshotError> {
        let NewSnapshot {
            name,
            parent,
            kind,
            labels,
            layer,
            why,
        } = new;
        check_name(&name)?;
        let labels = checked(labels)?;
        let parent = (!parent.is_empty()).then_some(parent);
        let change = self.changes.begin(&name, None, parent.as_deref());
        if self.all().contains_key(&name) {
            return Err(SnapshotError::AlreadyExists(format!("snapshot {name}")));
        }
        if self.all().len() >= MAX_SNAPSHOTS {
            return Err(SnapshotError::Other(Error::new(
                Kind::Unavailable,
                format!("there are {MAX_SNAPSHOTS} snapshots, and no more are possible"),
            )));
        }
        if let Some(parent) = &parent
            && self.get(parent)?.kind != SnapshotKind::Committed
        {
            return Err(SnapshotError::InvalidArgument(format!(
                "parent {parent} is not a committed snapshot"
            )));
        }
        let now = SystemTime::now();
        let snapshot = Snapshot {
            id: change.new_id(),
            name,
            parent,
            kind,
            labels,
            created: now,
            updated: now,
            layer,
            usage: None,
            why,
        };
        let directory = self.directory_of(snapshot.id);
        let made = make_private(&directory)
            .and_then(|()| prepare(&directory))
            .and_then(|()| self.write(&snapshot));
        if let Err(error) = made {
            let _ = fs::remove_dir_all(&directory); // the next cleanup tries again
            return Err(error.into());
        }
        let snapshot = Arc::new(snapshot);
        self.replace(None, Some(Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    /// Commits an active snapshot under a name, with these labels. A snapshot without a parent may get one. Blocks.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        labels: Labels,
        parent: &str,
        usage: Option<Usage>,
    ) -> Result<Arc<Snapshot>, SnapshotError> {
        check_name(name)?;
        let labels = checked(labels)?;
        let new_parent = Some(parent).filter(|parent| !parent.is_empty());
        let _change = self.changes.begin(key, Some(name), new_parent);
        if self.all().contains_key(name) {
            return Err(SnapshotError::AlreadyExists(format!("snapshot {name}")));
        }
        let active = self.get(key)?;
        if active.kind != SnapshotKind::Active {
            return Err(SnapshotError::FailedPrecondition(format!(
                "snapshot {key} is not active"
            )));
        }
        let parent = match (&active.parent, parent) {
            (own, "") => own.clone(),
            (None, parent) => {
                if self.get(parent)?.kind != SnapshotKind::Committed {
                    return Err(SnapshotError::FailedPrecondition(format!(
                        "parent {parent} is not committed"
                    )));
                }
                Some(parent.to_owned())
            }
            (Some(own), parent) if own == parent => Some(own.clone()),
            (Some(_), _) => {
                return Err(SnapshotError::InvalidArgument(format!(
                    "the parent of the active snapshot {key} cannot be changed"
                )));
            }
        };
        let now = SystemTime::now();
        let committed = Snapshot {
            name: name.to_owned(),
            parent,
            kind: SnapshotKind::Committed,
            labels,
            created: now,
            updated: now,
            usage,
            ..Snapshot::clone(&active)
        };
        self.write(&committed)?;
        let committed = Arc::new(committed);
        self.replace(Some(key), Some(Arc::clone(&committed)));
        Ok(committed)
    }

    /// Changes the labels of a snapshot: those of `names`, or all. Blocks.
    pub fn update(
        &self,
        name: &str,
        labels: Labels,
        names: Option<&[String]>,
    ) -> Result<Arc<Snapshot>, SnapshotError> {
        let _change = self.changes.begin(name, None, None);
        let mut snapshot = Snapshot::clone(&*self.get(name)?);
        match names {
            None => snapshot.labels = labels,
            Some(names) => {
                for name in names {
                    let value = labels.get(name).cloned().unwrap_or_default();
                    snapshot.labels.insert(name.clone(), value);
                }
            }
        }
        snapshot.labels = checked(snapshot.labels)?;
        snapshot.updated = SystemTime::now();
        self.write(&snapshot)?;
        let snapshot = Arc::new(snapshot);
        self.replace(None, Some(Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    /// Gives a lazy layer another disk. Blocks.
    pub fn set_layer(&self, name: &str, layer: LazyLayer) -> Result<(), SnapshotError> {
        let _change = self.changes.begin(name, None, None);
        let snapshot = Snapshot {
            layer: Some(layer),
            ..Snapshot::clone(&*self.get(name)?)
        };
        self.write(&snapshot)?;
        self.replace(None, Some(Arc::new(snapshot)));
        Ok(())
    }

    /// Removes the record of a snapshot that is nobody's parent. Its directory is left. Blocks.
    pub fn remove(&self, name: &str) -> Result<Arc<Snapshot>, SnapshotError> {
        let _change = self.changes.begin(name, None, None);
        let snapshot = self.get(name)?;
        let is_parent = |other: &Arc<Snapshot>| other.parent.as_deref() == Some(name);
        if self.all().values().any(is_parent) {
            return Err(SnapshotError::FailedPrecondition(format!(
                "cannot remove snapshot {name}: it has a child"
            )));
        }
        let directory = self.directory_of(snapshot.id);
        let file = directory.join(RECORD);
        // the copy first: without a record it would count
        regular_file::remove(&directory.join(COPY))
            .and_then(|()| regular_file::remove(&file))
            .and_then(|()| File::open(&directory)?.sync_all())
            .or_kind(Kind::Io, || format!("removing {}", file.display()))?;
        self.replace(Some(name), None);
        Ok(snapshot)
    }

    /// The directories that no snapshot has. Blocks.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let context = || format!("listing {}", self.directory.display());
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.directory).or_kind(Kind::Io, context)? {
            let path = entry.or_kind(Kind::Io, context)?.path();
            if let Some(id) = number_of(&path) {
                found.push((id, path));
            }
        }
        // after the list: a snapshot that was being created then is still, or has its record
        let known = self.changes.with_ids(|mut ids| {
            ids.extend(self.all().values().map(|snapshot| snapshot.id));
            ids
        });
        found.retain(|(id, _)| !known.contains(id));
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }

    fn write(&self, snapshot: &Snapshot) -> Result<()> {
        write(&self.directory_of(snapshot.id), snapshot)?;
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.or_kind(Kind::Io, || format!("syncing {}", self.directory.display()))
    }
}

fn missing(name: &str) -> SnapshotError {
    SnapshotError::NotFound(format!("snapshot {name}"))
}

fn check_name(name: &str) -> Result<(), SnapshotError> {
    match name.len() {
        1..=MAX_NAME_BYTES => Ok(()),
        length => Err(SnapshotError::InvalidArgument(format!(
            "a snapshot's name has {length} bytes, not 1 to {MAX_NAME_BYTES}"
        ))),
    }
}

/// The labels without those that have no value: an empty value removes a label.
fn checked(mut labels: Labels) -> Result<Labels, SnapshotError> {
    labels.retain(|_, value| !value.is_empty());
    let bytes: usize = labels
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    match bytes {
        ..=MAX_LABEL_BYTES => Ok(labels),
        _ => Err(SnapshotError::InvalidArgument(format!(
            "the labels have {bytes} bytes, more than {MAX_LABEL_BYTES}"
        ))),
    }
}

/// The number of a snapshot's directory.
fn number_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let is_plain = name.bytes().all(|byte| byte.is_ascii_digit()) && !name.starts_with('0');
    is_plain.then(|| name.parse().ok()).flatten()
}

/// The record in a directory; `None`: there is none, or neither it nor its copy can be read.
fn read(directory: &Path, id: u64) -> Option<Snapshot> {
    let path = directory.join(RECORD);
    match read_record(directory, |snapshot: &Snapshot| snapshot.id == id) {
        FoundRecord::Whole(snapshot) => Some(snapshot),
        FoundRecord::Copied(snapshot, error) => {
            let (path, name) = (path.display(), &snapshot.name);
            tracing::warn!(%path, %error, name, "the record of a snapshot is made again from its copy");
            if let Err(error) = write(directory, &snapshot) {
                tracing::warn!(%path, "{}", error.report());
            }
            Some(snapshot)
        }
        FoundRecord::None => None,
        FoundRecord::Lost(error) => {
            tracing::warn!(
                path = %path.display(), %error,
                "a snapshot is lost, because neither its record nor the copy can be read: if containers of an image fail with \"already exists\", remove the image and pull it again"
            );
            None
        }
    }
}

/// Writes the record of a snapshot, and its copy.
fn write(directory: &Path, snapshot: &Snapshot) -> Result<()> {
    let record = Record {
        version: VERSION,
        snapshot,
    };
    let path = directory.join(RECORD);
    let written = seal_json(&record)
        .map_err(std::io::Error::from)
        .and_then(|bytes| regular_file::replace_synced(&path, &bytes).map(|()| bytes));
    let bytes = written.or_kind(Kind::Io, || format!("writing {}", path.display()))?;
    // It is not synced: after a power cut the record is whole. Without a copy the record alone counts.
    if let Err(error) = regular_file::replace(&directory.join(COPY), &bytes) {
        tracing::warn!(path = %path.display(), %error, "the record of a snapshot has no copy");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    fn new(name: &str, parent: &str) -> NewSnapshot {
        NewSnapshot {
            name: name.to_owned(),
            parent: parent.to_owned(),
            kind: SnapshotKind::Active,
            labels: Labels::new(),
            layer: None,
            why: None,
        }
    }

    fn commit(records: &Records, name: &str, parent: &str) -> Result<(), SnapshotError> {
        let key = format!("{name}-key");
        records.create(new(&key, parent), |_| Ok(()))?;
        records.commit(&key, name, Labels::new(), "", None)?;
        Ok(())
    }

    #[test]
    fn a_change_waits_for_those_of_the_same_snapshots_alone() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        for name in ["parent", "other"] {
            commit(&records, name, "").unwrap();
        }
        let (begun, is_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        thread::scope(|scope| {
            let slow = scope.spawn(|| {
                let (begun, may_go) = (begun, may_go);
                records.create(new("slow", "parent"), |_| {
                    begun.send(()).unwrap();
                    let time = Duration::from_secs(100);
                    let waited = may_go.recv_timeout(time);
                    waited.or_kind(Kind::Busy, || "the others wait".to_owned())
                })
            });
            is_begun.recv().unwrap();
            records.create(new("quick", "parent"), |_| Ok(())).unwrap();
            commit(&records, "committed", "other").unwrap();
            records.update("other", Labels::new(), None).unwrap();
            records.remove("quick").unwrap();
            // that of the removed one; the slow one is being made
            let directory = records.directory_of(4);
            assert_eq!(records.leftovers().unwrap(), [directory]);
            let removed = scope.spawn(|| records.remove("parent"));
            let again = scope.spawn(|| records.create(new("slow", ""), |_| Ok(())));
            go.send(()).unwrap();
            slow.join().unwrap().unwrap();
            let removed = removed.join().unwrap().unwrap_err();
            assert!(matches!(removed, SnapshotError::FailedPrecondition(_)));
            let again = again.join().unwrap().unwrap_err();
            assert!(matches!(again, SnapshotError::AlreadyExists(_)));
        });
    }

    #[test]
    fn changes_side_by_side_leave_the_records_that_are_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        let name = |number: u64| format!("name-{}", number % 5);
        thread::scope(|scope| {
            for first in 0..6_u64 {
                let records = &records;
                scope.spawn(move || {
                    for step in 0..60 {
                        let number = first * 7 + step * 13;
                        let (own, other) = (name(number / 3), name(number / 5 + 1));
                        // each may fail
                        match number % 4 {
                            0 => drop(commit(records, &own, &other)),
                            1 => drop(records.create(new(&own, &other), |_| Ok(()))),
                            2 => drop(records.remove(&own)),
                            _ => drop(commit(records, &own, "")),
                        }
                    }
                });
            }
        });
        let again = Records::open(folder.path()).unwrap();
        assert!(!records.list().is_empty());
        assert_eq!(again.list(), records.list());
        for snapshot in records.list() {
            records.chain(&snapshot.name).unwrap();
        }
    }
}
