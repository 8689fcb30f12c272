//! Owners of lower layers for containers in user namespaces: containerd gives their maps in labels (`remap-ids`). The lower layers are mounted
//! once more with mapped owners, in the directory of the snapshot, and their file systems do not change.

use std::{
    fs,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::snapshotter::{
    labels::{GID_MAPPING, TARGET, UID_MAPPING},
    records::{Snapshot, SnapshotKind},
    set::SnapshotSet,
};
use crate::{
    engine::attach::stack::directories::LayerPlace,
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount::{
        self,
        idmap::{self, IdMaps, UserNamespace},
    },
};

/// The mounts with mapped owners, in the directory of a snapshot.
const MAPPED: &str = "mapped";

impl SnapshotSet {
    /// The maps for the lower layers of a snapshot.
    ///
    /// Those of an extraction have no meaning. containerd gives a container the labels also where it does not know that owners can be mapped
    /// here: then the parent does not belong to an image: it is a copy, whose owners containerd has changed.
    pub(in crate::snapshotter) fn maps(&self, snapshot: &Snapshot) -> Result<Option<IdMaps>> {
        let label = |name: &str| snapshot.labels.get(name).map(String::as_str);
        let (Some(users), Some(groups)) = (label(UID_MAPPING), label(GID_MAPPING)) else {
            return Ok(None);
        };
        let parent = snapshot.parent.as_deref();
        let parent = parent.and_then(|parent| self.records.get(parent).ok());
        let is_of_image =
            parent.is_some_and(|it| it.layer.is_some() || it.labels.contains_key(TARGET));
        if snapshot.kind == SnapshotKind::Committed
            || snapshot.labels.contains_key(TARGET)
            || !is_of_image
        {
            return Ok(None);
        }
        IdMaps::parse(users, groups).map(Some)
    }
}

/// Mounts directories with mapped owners, in the directory of a snapshot; what is mounted there already stays. The paths of the mounts.
/// Blocks.
pub(in crate::snapshotter) fn mount_mapped(
    snapshot: &Path,
    lowers: &[LayerPlace],
    maps: &IdMaps,
) -> Result<Vec<LayerPlace>> {
    if !idmap::is_stackable() {
        let why = "overlayfs of this kernel takes no ID-mapped mounts (Linux 5.19 and later); without `remap-ids` in the capabilities of the proxy plugin, containerd changes the owners of a copy";
        return Err(Error::new(Kind::Unsupported, why));
    }
    let directory = snapshot.join(MAPPED);
    let paths: Vec<PathBuf> = (0..lowers.len())
        .map(|number| directory.join(number.to_string()))
        .collect();
    let missing: Vec<_> = lowers
        .iter()
        .map(LayerPlace::path)
        .zip(&paths)
        .filter(|(lower, path)| !is_same(lower, path))
        .collect();
    if !missing.is_empty() {
        let namespace = UserNamespace::new(maps)?;
        for (lower, path) in missing {
            while mount::is_mount(path)? {
                mount::detach_lazily(path)?;
            }
            fs::create_dir_all(path).or_kind(Kind::Io, || format!("making {}", path.display()))?;
            let mapped = idmap::mapped(lower, &namespace)?;
            mount::attach(mapped.as_fd(), path)?;
        }
    }
    Ok(paths.into_iter().map(LayerPlace::Directory).collect())
}

/// Whether a path is a mount of a directory.
fn is_same(lower: &Path, path: &Path) -> bool {
    let of = |path: &Path| fs::symlink_metadata(path).map(|it| (it.dev(), it.ino()));
    of(path).is_ok_and(|found| of(lower).is_ok_and(|lower| lower == found))
}

/// Gives a directory the owner that it has in a user namespace; one that is not mapped is nobody's. Blocks.
pub(in crate::snapshotter) fn map_owner(directory: &Path, maps: &IdMaps) -> Result<()> {
    let context = || format!("changing the owner of {}", directory.display());
    let metadata = fs::symlink_metadata(directory).or_kind(Kind::Io, context)?;
    let (user, group) = (maps.user(metadata.uid()), maps.group(metadata.gid()));
    let (user, group) = (user.unwrap_or(NOBODY), group.unwrap_or(NOBODY));
    std::os::unix::fs::lchown(directory, Some(user), Some(group)).or_kind(Kind::Io, context)
}

/// What the kernel shows for an owner without a map (`/proc/sys/kernel/overflowuid`).
const NOBODY: u32 = 65534;
