//! The snapshots of containerd, with the states of their layers.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layers::LayerStatus;
use crate::{
    engine::{
        attach::engine::Engine,
        open::opened::DiskBasis,
        space::snapshots::{self, SnapshotKind},
    },
    error::Result,
    oci::{Digest, Reference},
};

/// The directory with the content of a snapshot, in its directory.
const CONTENT: &str = "fs";

/// A snapshot of containerd.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotStatus {
    /// The set: the snapshots of one socket.
    pub set: String,
    /// Its number in the set.
    pub number: u64,
    /// Its name: a key of containerd with namespace and number, or that of a lazy layer.
    pub name: String,
    /// The name of its parent; the lowest has none.
    pub parent: Option<String>,
    /// Kind.
    pub kind: SnapshotKind,
    /// The directory with its content: what was written, or the mount of its layer.
    pub path: PathBuf,
    /// Its lazy layer; `None`: its content was written.
    pub layer: Option<SnapshotLayer>,
    /// Why containerd has extracted it although it asked for a lazy layer.
    pub why: Option<String>,
}

/// The lazy layer of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotLayer {
    /// The layer's digest.
    pub digest: Digest,
    /// The digest of the table of its disk.
    pub table: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// How its disk was made.
    pub basis: DiskBasis,
    /// What has chosen how it was pulled, for people: a rule, a label, or why there was none. May be empty.
    pub chosen_by: String,
    /// The chain ID of this layer and those below it.
    pub chain_id: Digest,
    /// The image that was pulled.
    pub image: Reference,
    /// The digest of its manifest.
    pub manifest: Digest,
    /// Its state and devices; `None`: it is not mounted, because no container needs it, or no daemon runs.
    pub mounted: Option<LayerStatus>,
}

impl Engine {
    /// All snapshots of the root, by set and number. Blocks.
    pub fn snapshots(&self) -> Result<Vec<SnapshotStatus>> {
        let mut mounted = HashMap::new();
        for layer in self.layers() {
            for path in &layer.mounts {
                mounted.insert(path.clone(), layer.clone());
            }
        }
        all(self.root(), mounted)
    }
}

impl SnapshotStatus {
    /// All snapshots of a root that no daemon serves, by set and number. Blocks.
    pub fn without_daemon(root: &Path) -> Result<Vec<Self>> {
        all(root, HashMap::new())
    }
}

fn all(root: &Path, mut mounted: HashMap<PathBuf, LayerStatus>) -> Result<Vec<SnapshotStatus>> {
    let mut all = Vec::new();
    for (directory, snapshot) in snapshots::recorded(root)? {
        let path = directory.join(CONTENT);
        let set = directory.parent().and_then(Path::file_name);
        all.push(SnapshotStatus {
            set: set.unwrap_or_default().to_string_lossy().into_owned(),
            number: snapshot.id,
            name: snapshot.name,
            parent: snapshot.parent,
            kind: snapshot.kind,
            layer: snapshot.layer.map(|layer| SnapshotLayer {
                digest: layer.blob.digest,
                table: layer.table,
                size: layer.blob.size,
                basis: layer.basis,
                chosen_by: layer.chosen_by,
                chain_id: layer.chain_id,
                image: layer.image,
                manifest: layer.manifest,
                mounted: mounted.remove(&path),
            }),
            why: snapshot.why,
            path,
        });
    }
    all.sort_by(|a, b| (&a.set, a.number).cmp(&(&b.set, b.number)));
    Ok(all)
}
