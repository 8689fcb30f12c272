//! The disks of a root that attachments and snapshots use, or will use after a reboot.

use std::collections::HashSet;

use super::{image_record::LayerDisk, snapshots};
use crate::{
    engine::attach::{records::AttachmentRecords, types::Attachment},
    error::Result,
    oci::{Digest, Reference},
};

/// The disks of all attachments of a root, of any runtime directory, and of all snapshots.
#[derive(Clone, Debug, Default)]
pub struct AttachedDisks {
    /// The disks.
    pub disks: HashSet<LayerDisk>,
    /// The images, by reference and manifest.
    images: HashSet<(Reference, Digest)>,
}

impl AttachedDisks {
    /// Reads the records of the attachments. An error: a record cannot be read, so that it is not known what its attachment uses.
    pub fn of(records: &AttachmentRecords) -> Result<Self> {
        let mut found = Self::default();
        records
            .all()?
            .iter()
            .for_each(|attachment| found.add(attachment));
        for snapshot in snapshots::disks(records.root())? {
            found.disks.insert(snapshot.disk);
            found.images.insert(snapshot.image);
        }
        Ok(found)
    }

    fn add(&mut self, attachment: &Attachment) {
        let layers = attachment.layers.iter().map(|layer| LayerDisk {
            layer: layer.digest,
            table: layer.table,
        });
        self.disks.extend(layers);
        let image = (attachment.reference.clone(), attachment.manifest);
        self.images.insert(image);
    }

    /// Whether an image is attached.
    pub fn has_image(&self, reference: &Reference, manifest: Digest) -> bool {
        self.images.contains(&(reference.clone(), manifest))
    }
}
