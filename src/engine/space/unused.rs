//! Removes layers that nobody uses when the disk limit is reached.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use super::{
    image_record::{ImageRecords, LayerDisk},
    in_use::AttachedDisks,
};
use crate::{engine::attach::records::AttachmentRecords, error::Result, layer::Store};

/// Removes disks that are not attached, kept, pinned or open, the least recently used one first, until `bytes` are removed. Returns how many
/// bytes were removed. Blocks on local files.
pub(crate) fn remove(
    root: &Path,
    store: &Arc<Store>,
    attachments: &AttachmentRecords,
    bytes: u64,
) -> u64 {
    let disks = match unused(root, store, attachments) {
        Ok(disks) => disks,
        Err(error) => {
            tracing::warn!("unused layers are not removed: {}", error.report());
            return 0;
        }
    };
    let mut removed = 0;
    for disk in disks {
        if removed >= bytes {
            break;
        }
        match store.remove(&disk.layer, &disk.table) {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                removed += bytes;
                tracing::info!(layer = %disk.layer, bytes, "an unused layer was removed to make room");
            }
            Err(error) => tracing::warn!(
                "the disk of layer {} cannot be removed: {}",
                disk.layer,
                error.report()
            ),
        }
    }
    removed
}

/// The disks that nobody uses, the least recently used one first.
fn unused(
    root: &Path,
    store: &Arc<Store>,
    attachments: &AttachmentRecords,
) -> Result<Vec<LayerDisk>> {
    let mut stay: HashSet<LayerDisk> = AttachedDisks::of(attachments)?.disks;
    let mut used: HashMap<LayerDisk, SystemTime> = HashMap::new();
    for image in ImageRecords::open(root).all()? {
        for disk in image.record.disks {
            if image.record.pinned {
                stay.insert(disk);
            }
            let last = used.entry(disk).or_insert(image.used);
            *last = image.used.max(*last);
        }
    }
    let disks = store.directories()?.into_iter();
    let disks = disks.map(|(layer, table)| LayerDisk { layer, table });
    let mut disks: Vec<_> = disks
        .filter(|disk| !stay.contains(disk))
        .map(|disk| {
            let changed = || store.changed(&disk.layer, &disk.table);
            (used.get(&disk).copied().unwrap_or_else(changed), disk)
        })
        .collect();
    disks.sort_unstable();
    Ok(disks.into_iter().map(|(_, disk)| disk).collect())
}
