//! `socinbd prune`: removes the disks that nobody uses.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    image_record::{ImageRecords, LayerDisk, UsedImage},
    in_use::AttachedDisks,
};
use crate::{
    engine::attach::records::AttachmentRecords,
    error::Result,
    layer::Store,
    oci::{Digest, Reference},
};

/// What to remove.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PruneRequest {
    /// Also images that their reference still names.
    #[serde(default)]
    pub all: bool,
    /// Only what was not used for this many seconds.
    #[serde(default)]
    pub older_than: u64,
    /// Remove nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PruneReport {
    /// Whether nothing was removed.
    pub dry_run: bool,
    /// The images.
    pub images: Vec<PrunedImage>,
    /// The disks of layers.
    pub layers: Vec<PrunedLayer>,
    /// The bytes of these disks on the file system.
    pub bytes: u64,
}

/// An image that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PrunedImage {
    /// The reference by which it was opened.
    pub reference: Reference,
    /// The digest of its manifest.
    pub manifest: Digest,
}

/// The disk of a layer that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PrunedLayer {
    /// The layer.
    pub layer: Digest,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
    /// Bytes on the file system.
    pub bytes: u64,
}

/// Removes images that are not attached and not pinned, and the disks of layers that no other image has. Blocks on local files.
pub fn prune(
    store: &Arc<Store>,
    images: &ImageRecords,
    attachments: &AttachmentRecords,
    request: &PruneRequest,
) -> Result<PruneReport> {
    let attached = AttachedDisks::of(attachments)?;
    let before = SystemTime::now().checked_sub(Duration::from_secs(request.older_than));
    let is_old = |used: SystemTime| before.is_some_and(|before| used <= before);
    let mut seen = HashSet::new();
    let (removed, staying): (Vec<UsedImage>, Vec<UsedImage>) =
        images.all()?.into_iter().partition(|image| {
            let record = &image.record;
            let is_replaced = !seen.insert(record.reference.clone());
            (request.all || is_replaced)
                && !record.pinned
                && !attached.has_image(&record.reference, record.manifest)
                && is_old(image.used)
        });
    let disks_of = |images: &[UsedImage]| -> HashSet<LayerDisk> {
        images
            .iter()
            .flat_map(|image| image.record.disks.iter().copied())
            .collect()
    };
    let (with_removed, with_staying) = (disks_of(&removed), disks_of(&staying));
    let mut report = PruneReport {
        dry_run: request.dry_run,
        ..PruneReport::default()
    };
    for (layer, table) in store.directories()? {
        let disk = LayerDisk { layer, table };
        let stays = attached.disks.contains(&disk)
            || with_staying.contains(&disk)
            // no image has it
            || !with_removed.contains(&disk) && !is_old(store.changed(&layer, &table));
        if stays {
            continue;
        }
        let bytes = match request.dry_run {
            true => store.removable(&layer, &table),
            false => store.remove(&layer, &table)?,
        };
        if let Some(bytes) = bytes {
            report.bytes += bytes;
            report.layers.push(PrunedLayer {
                layer,
                table,
                bytes,
            });
        }
    }
    for image in removed {
        if !request.dry_run {
            images.remove(&image)?;
        }
        report.images.push(PrunedImage {
            reference: image.record.reference,
            manifest: image.record.manifest,
        });
    }
    Ok(report)
}

impl fmt::Display for PruneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.dry_run {
            true => "would remove",
            false => "removed",
        };
        for image in &self.images {
            writeln!(f, "{verb} image {} ({})", image.reference, image.manifest)?;
        }
        for layer in &self.layers {
            writeln!(f, "{verb} layer {}", layer.layer)?;
        }
        write!(
            f,
            "{verb} {} images and {} layers with {} bytes",
            self.images.len(),
            self.layers.len(),
            self.bytes
        )
    }
}
