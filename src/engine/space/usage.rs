//! `socinbd df`: what each layer and each image holds on the root.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{
    image_record::{ImageRecords, LayerDisk, UsedImage},
    in_use::AttachedDisks,
};
use crate::{
    engine::attach::records::AttachmentRecords,
    error::{Kind, Result, ResultExt as _},
    layer::{SpaceStatus, Store},
    oci::{Digest, Reference},
};

/// What a root holds. All sizes are bytes that are allocated on its file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SpaceReport {
    /// The state directory.
    pub root: PathBuf,
    /// Size of its file system.
    pub file_system_bytes: u64,
    /// Bytes of the file system that are available.
    pub available_bytes: u64,
    /// Bytes of all layer disks.
    pub bytes: u64,
    /// The limits of the daemon and what it has evicted; all 0 without a daemon.
    pub space: SpaceStatus,
    /// The images, the one that was used last first.
    pub images: Vec<ImageSpace>,
    /// The layer disks, ordered by layer and table.
    pub layers: Vec<LayerSpace>,
}

/// What an image holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ImageSpace {
    /// The reference by which it was opened.
    pub reference: Reference,
    /// The digest of its manifest.
    pub manifest: Digest,
    /// Whether it is attached, or kept for after a reboot.
    pub attached: bool,
    /// Whether its disks stay although nobody uses them.
    pub pinned: bool,
    /// Whether its reference was opened with another manifest later.
    pub replaced: bool,
    /// When it was used last, in seconds since 1970.
    pub used: u64,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of its layer disks.
    pub bytes: u64,
    /// Bytes of the disks that no other image has.
    pub own_bytes: u64,
    /// Bytes of the disks that other images have, too.
    pub shared_bytes: u64,
}

/// What the disk of a layer holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LayerSpace {
    /// The layer.
    pub layer: Digest,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
    /// Bytes of its directory.
    pub bytes: u64,
    /// Whether an attachment has it.
    pub attached: bool,
    /// Whether a pinned image has it.
    pub pinned: bool,
    /// Whether all spans are present and verified as a whole.
    pub complete: bool,
    /// Number of present spans.
    pub spans_present: u32,
    /// Number of all spans.
    pub spans: u32,
    /// When an image with the layer was used last, in seconds since 1970.
    pub used: u64,
    /// The references of the images that have it.
    pub images: Vec<Reference>,
}

/// Describes what a root holds. Blocks on local files.
pub fn report(
    root: &Path,
    store: &Arc<Store>,
    images: &ImageRecords,
    attachments: &AttachmentRecords,
) -> Result<SpaceReport> {
    let images = images.all()?;
    let attached = AttachedDisks::of(attachments)?;
    let mut users: HashMap<LayerDisk, Vec<&UsedImage>> = HashMap::new();
    for image in &images {
        let disks: HashSet<_> = image.record.disks.iter().copied().collect();
        for disk in disks {
            users.entry(disk).or_default().push(image);
        }
    }
    let mut known: BTreeMap<LayerDisk, _> = BTreeMap::new();
    for stored in store.list()? {
        let disk = LayerDisk {
            layer: stored.layer.digest,
            table: stored.table,
        };
        known.insert(disk, stored);
    }
    let mut layers = Vec::new();
    for (layer, table) in store.directories()? {
        let disk = LayerDisk { layer, table };
        let users = users.get(&disk).map_or(&[][..], Vec::as_slice);
        let stored = known.get(&disk);
        let by_images = users.iter().map(|image| image.used).max();
        layers.push(LayerSpace {
            layer,
            table,
            bytes: store.bytes_of(&layer, &table),
            attached: attached.disks.contains(&disk),
            pinned: users.iter().any(|image| image.record.pinned),
            complete: stored.is_some_and(|stored| stored.complete),
            spans_present: stored.map_or(0, |stored| stored.spans_present),
            spans: stored.map_or(0, |stored| stored.spans),
            used: by_images.map_or_else(|| seconds(store.changed(&layer, &table)), seconds),
            images: users
                .iter()
                .map(|image| image.record.reference.clone())
                .collect(),
        });
    }
    let bytes_of: HashMap<_, _> = layers
        .iter()
        .map(|it| ((it.layer, it.table), (it.bytes, it.images.len())))
        .collect();
    let mut seen = HashSet::new();
    let images = images
        .iter()
        .map(|image| {
            let record = &image.record;
            let disks: HashSet<_> = record.disks.iter().collect();
            let disks = disks
                .iter()
                .filter_map(|disk| bytes_of.get(&(disk.layer, disk.table)));
            let (own, shared): (Vec<_>, Vec<_>) = disks.partition(|(_, users)| *users == 1);
            let sum = |disks: Vec<&(u64, usize)>| disks.iter().map(|(bytes, _)| bytes).sum::<u64>();
            let (own_bytes, shared_bytes) = (sum(own), sum(shared));
            ImageSpace {
                reference: record.reference.clone(),
                manifest: record.manifest,
                attached: attached.has_image(&record.reference, record.manifest),
                pinned: record.pinned,
                replaced: !seen.insert(&record.reference),
                used: seconds(image.used),
                layers: record.disks.len(),
                bytes: own_bytes + shared_bytes,
                own_bytes,
                shared_bytes,
            }
        })
        .collect();
    let stat = rustix::fs::statvfs(root).or_kind(Kind::Io, || {
        format!("cannot read the free space of {}", root.display())
    })?;
    Ok(SpaceReport {
        root: root.to_owned(),
        file_system_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        bytes: layers.iter().map(|layer| layer.bytes).sum(),
        space: store.space_status(),
        images,
        layers,
    })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
