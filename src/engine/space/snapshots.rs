//! The snapshots of containerd, as their records on the root have them.
//!
//! The records are the snapshotter's (`<root>/snapshots/<set>/<number>/record.json`); what commands show and need of them is read here.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::image_record::LayerDisk;
use crate::{
    engine::open::opened::DiskBasis,
    error::{Kind, Result, ResultExt as _},
    layer::unseal_json,
    oci::{Digest, Reference},
    regular_file,
};

/// The directory of all sets of snapshots, in the root.
pub(crate) const DIRECTORY: &str = "snapshots";
/// The version of the records that this program writes and reads.
pub(crate) const VERSION: u32 = 1;
/// The record of a snapshot, in its directory.
pub(crate) const RECORD: &str = "record.json";
/// Its copy, which counts if the record cannot be read. It is written after the record and removed before it.
pub(crate) const COPY: &str = "record.copy.json";
/// Maximum size of a record.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// What is in the file of a record.
#[derive(Deserialize)]
struct Record<S> {
    version: u32,
    snapshot: S,
}

/// The snapshot of a directory, as its record was found.
pub(crate) enum FoundRecord<S> {
    /// As it was written.
    Whole(S),
    /// From the copy, because of what is wrong with the record.
    Copied(S, io::Error),
    /// There is neither a record nor a copy.
    None,
    /// The record cannot be read for this reason, nor the copy.
    Lost(io::Error),
}

/// The snapshot that the record in a directory has. `is_it`: whether the record can be that of the directory. Blocks.
pub(crate) fn read_record<S: DeserializeOwned>(
    directory: &Path,
    is_it: impl Fn(&S) -> bool,
) -> FoundRecord<S> {
    let read = |name: &str| {
        let bytes = regular_file::read(&directory.join(name), MAX_RECORD_BYTES)?;
        let record = unseal_json::<Record<S>>(&bytes);
        let record = record.filter(|record| record.version == VERSION && is_it(&record.snapshot));
        let damaged = || {
            io::Error::new(
                ErrorKind::InvalidData,
                "it is damaged or of another version",
            )
        };
        record.map(|record| record.snapshot).ok_or_else(damaged)
    };
    match read(RECORD) {
        Ok(snapshot) => FoundRecord::Whole(snapshot),
        Err(why) => match read(COPY) {
            Ok(snapshot) => FoundRecord::Copied(snapshot, why),
            Err(of_copy) => match (why.kind(), of_copy.kind()) {
                (ErrorKind::NotFound, ErrorKind::NotFound) => FoundRecord::None,
                _ => FoundRecord::Lost(why),
            },
        },
    }
}

/// A snapshot, as its record has it.
#[derive(Debug, Deserialize)]
pub(in crate::engine) struct RecordedSnapshot {
    pub(in crate::engine) id: u64,
    pub(in crate::engine) name: String,
    pub(in crate::engine) parent: Option<String>,
    pub(in crate::engine) kind: SnapshotKind,
    #[serde(default)]
    pub(in crate::engine) why: Option<String>,
    pub(in crate::engine) layer: Option<RecordedLayer>,
}

/// The kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// A writable layer, of a container or of an extraction.
    Active,
    /// A read-only view.
    View,
    /// A layer that can be a parent.
    Committed,
}

/// The lazy layer of a snapshot.
#[derive(Debug, Deserialize)]
pub(in crate::engine) struct RecordedLayer {
    pub(in crate::engine) blob: RecordedBlob,
    pub(in crate::engine) table: Digest,
    pub(in crate::engine) basis: DiskBasis,
    #[serde(default)]
    pub(in crate::engine) chosen_by: String,
    pub(in crate::engine) chain_id: Digest,
    pub(in crate::engine) image: Reference,
    pub(in crate::engine) manifest: Digest,
}

#[derive(Debug, Deserialize)]
pub(in crate::engine) struct RecordedBlob {
    pub(in crate::engine) digest: Digest,
    pub(in crate::engine) size: u64,
}

/// The disk of a snapshot, and the image that was pulled.
pub(super) struct SnapshotDisk {
    pub(super) disk: LayerDisk,
    pub(super) image: (Reference, Digest),
}

/// The disks of all snapshots of a root. A record that is damaged counts for none: its snapshot is lost. Blocks.
pub(super) fn disks(root: &Path) -> Result<Vec<SnapshotDisk>> {
    let layers = recorded(root)?.into_iter();
    let layers = layers.filter_map(|(_, snapshot)| snapshot.layer);
    let disks = layers.map(|layer| SnapshotDisk {
        disk: LayerDisk {
            layer: layer.blob.digest,
            table: layer.table,
        },
        image: (layer.image, layer.manifest),
    });
    Ok(disks.collect())
}

/// All snapshots of a root with their directories. A record that is damaged counts for none: its snapshot is lost. Blocks.
pub(in crate::engine) fn recorded(root: &Path) -> Result<Vec<(PathBuf, RecordedSnapshot)>> {
    let mut found = Vec::new();
    for set in entries(&root.join(DIRECTORY))? {
        for directory in entries(&set)? {
            match read_record(&directory, |_| true) {
                FoundRecord::Whole(snapshot) | FoundRecord::Copied(snapshot, _) => {
                    found.push((directory, snapshot));
                }
                FoundRecord::None => {}
                FoundRecord::Lost(error) if error.kind() == ErrorKind::InvalidData => {}
                FoundRecord::Lost(error) => {
                    let context = || format!("reading the record of {}", directory.display());
                    return Err(error).or_kind(Kind::Io, context);
                }
            }
        }
    }
    Ok(found)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("listing {}", directory.display());
    match fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        listed => listed
            .or_kind(Kind::Io, context)?
            .map(|entry| Ok(entry.or_kind(Kind::Io, context)?.path()))
            .collect(),
    }
}
