//! The records of layer mounts: `layer-mounts/<digits>.json` in the root, where the digits follow from the path of the mount.
//!
//! A record is written when the file system is mounted, and removed when it is unmounted. It is of one boot, so it is not synced.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    engine::attach::types::AttachedLayer,
    error::{Kind, Result, ResultExt as _},
    kernel,
    layer::{make_private, seal_json, unseal_json},
    oci::Digest,
    regular_file,
    versions::is_read,
};

/// The version that this program writes. It reads the one before too, whose layers are all mounted.
pub(crate) const VERSION: u32 = 2;
/// Maximum size of a record.
const MAX_BYTES: u64 = 64 * 1024;

/// The record of one mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LayerMountRecord {
    version: u32,
    boot_id: String,
    /// Where it is mounted.
    pub(super) path: PathBuf,
    /// False: another program mounts the device, elsewhere.
    #[serde(default = "mounted")]
    pub(super) is_mounted: bool,
    /// The layer and its devices.
    pub(super) layer: AttachedLayer,
}

/// In version 1.
fn mounted() -> bool {
    true
}

/// The records of a root.
#[derive(Clone, Debug)]
pub(crate) struct LayerMountRecords {
    directory: PathBuf,
    boot_id: String,
}

impl LayerMountRecords {
    /// The records of a root. Creates nothing.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        Ok(Self {
            directory: root.join("layer-mounts"),
            boot_id: kernel::boot_id()?,
        })
    }

    /// The name of a mount among the changes of an engine, and of its record.
    pub(crate) fn id(path: &Path) -> String {
        format!("layer-{}", Self::digits(path))
    }

    /// The digits of a mount.
    pub(super) fn digits(path: &Path) -> String {
        let digest = Digest::of(path.as_os_str().as_encoded_bytes());
        digest.hex()[..16].to_owned()
    }

    fn file(&self, path: &Path) -> PathBuf {
        self.directory.join(format!("{}.json", Self::id(path)))
    }

    /// Writes the record of a mount.
    pub(super) fn write(&self, path: &Path, layer: &AttachedLayer, is_mounted: bool) -> Result<()> {
        make_private(&self.directory)?;
        let record = LayerMountRecord {
            version: VERSION,
            boot_id: self.boot_id.clone(),
            path: path.to_owned(),
            is_mounted,
            layer: layer.clone(),
        };
        let write = || -> std::io::Result<()> {
            regular_file::replace(&self.file(path), &seal_json(&record)?)
        };
        write().or_kind(Kind::Io, || {
            format!(
                "writing the record of a mount in {}",
                self.directory.display()
            )
        })
    }

    /// Removes the record of a mount, if there is one.
    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        let file = self.file(path);
        match regular_file::remove(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).or_kind(Kind::Io, || format!("removing {}", file.display()))
            }
            _ => Ok(()),
        }
    }

    /// The records of this boot. Others, and what cannot be read, are removed: nothing is mounted by them.
    pub(super) fn take(&self) -> Result<Vec<LayerMountRecord>> {
        let context = || format!("listing {}", self.directory.display());
        let listed = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed.or_kind(Kind::Io, context)?,
        };
        let mut records = Vec::new();
        for entry in listed {
            let path = entry.or_kind(Kind::Io, context)?.path();
            let record = regular_file::read(&path, MAX_BYTES).ok();
            let record = record.and_then(|bytes| unseal_json::<LayerMountRecord>(&bytes));
            match record {
                Some(record)
                    if is_read(record.version, VERSION) && record.boot_id == self.boot_id =>
                {
                    records.push(record);
                }
                _ => {
                    if let Err(error) = regular_file::remove(&path) {
                        tracing::warn!(path = %path.display(), %error, "cannot remove a record of a mount");
                    }
                }
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{DeviceKind, DiskBasis};

    #[test]
    fn a_record_is_of_its_path_and_boot() {
        let root = tempfile::tempdir().unwrap();
        let records = LayerMountRecords::open(root.path()).unwrap();
        assert_eq!(records.take().unwrap().len(), 0);
        let layer = AttachedLayer {
            digest: Digest::of(b"layer"),
            table: Digest::of(b"table"),
            size: 1,
            device: DeviceKind::Fuse,
            device_path: "/dev/loop7".into(),
            backing: None,
            why: "there is no nbd".to_owned(),
            basis: DiskBasis::Ztoc,
        };
        for path in ["/a", "/b"] {
            records.write(Path::new(path), &layer, true).unwrap();
        }
        records.remove(Path::new("/b")).unwrap();
        records.remove(Path::new("/b")).unwrap();
        let found = records.take().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].path, Path::new("/a"));
        assert_eq!(found[0].layer.device_path, Path::new("/dev/loop7"));
        assert!(found[0].is_mounted);
        // of the version before
        let old = serde_json::json!({
            "version": 1, "boot_id": records.boot_id, "path": "/old", "layer": layer,
        });
        let old = seal_json(&old).unwrap();
        fs::write(records.file(Path::new("/old")), old).unwrap();
        let found = records.take().unwrap();
        assert!(
            found
                .iter()
                .any(|it| it.path == Path::new("/old") && it.is_mounted)
        );
        // of another boot, and damaged
        let later = LayerMountRecords {
            boot_id: "later".to_owned(),
            ..records.clone()
        };
        records.write(Path::new("/c"), &layer, true).unwrap();
        fs::write(records.file(Path::new("/c")), "{}").unwrap();
        assert_eq!(later.take().unwrap().len(), 0);
        assert_eq!(fs::read_dir(&records.directory).unwrap().count(), 0);
    }
}
