//! Takes over the attachments of a daemon that died: opens their disks from the state directory, without a source, and serves the devices
//! that the kernel still has.
//!
//! What the kernel has is what counts: an attachment that is mounted nowhere, and whose devices nobody uses, is left to `leftovers`.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::leftovers::is_used;
use crate::{
    engine::attach::{
        devices::Device,
        engine::Engine,
        live::{AttachmentPhase, LiveAttachment},
        names::mount_source,
        records::AttachmentRecord,
        types::AttachedLayer,
    },
    error::{Error, Kind, Result},
    kernel::mount::info,
};

impl Engine {
    /// Takes over what can be taken over. What cannot is logged with the reason, and stays dead. Blocks.
    pub(in crate::engine::attach) fn recover(&self) -> Result<()> {
        // What was not mounted yet is left to `leftovers`: to open its devices could wait for a thread of the dead daemon.
        let is_ours = |record: &AttachmentRecord| record.was_mounted() && self.records.has(record);
        let entries = self.records.entries()?.into_iter();
        let records: Vec<_> = entries
            .filter_map(|entry| entry.record.filter(is_ours))
            .collect();
        let source = |record: &AttachmentRecord| mount_source(&record.attachment.id);
        let sources: Vec<_> = records.iter().map(source).collect();
        let mut mounts = info::open_anywhere(&sources)?;
        let found: Vec<_> = records
            .into_iter()
            .zip(sources)
            .map(|(record, source)| (record, mounts.remove(&source)))
            .collect();
        let mut alone = self.devices.in_kernel()?;
        for (record, _) in found.iter().filter(|(_, mount)| mount.is_some()) {
            for device in record
                .attachment
                .layers
                .iter()
                .flat_map(AttachedLayer::devices)
            {
                alone.remove(&device);
            }
        }
        for (record, mount) in found {
            if mount.is_none() && !is_used(&record, &alone) {
                continue;
            }
            let (id, reference) = (
                record.attachment.id.clone(),
                record.attachment.reference.clone(),
            );
            match self.take_attachment_over(record, mount) {
                Ok(()) => {
                    tracing::info!(id, %reference, "the daemon before has ended; this one serves the attachment");
                }
                Err(error) => tracing::error!(
                    id,
                    %reference,
                    "its daemon has died, and it cannot be taken over: {}",
                    error.report()
                ),
            }
        }
        Ok(())
    }

    fn take_attachment_over(&self, record: AttachmentRecord, mount: Option<OwnedFd>) -> Result<()> {
        let Some(mount_device) = record.mount_device else {
            return Err(Error::new(Kind::NotFound, "it was not mounted yet"));
        };
        let attachment = record.attachment;
        let devices: Vec<Arc<Device>> = attachment
            .layers
            .iter()
            .map(|layer| {
                let disk = self
                    .disks
                    .store()
                    .stored_after_restart(&layer.digest, &layer.table)?;
                let disk = disk.ok_or_else(|| {
                    let context = format!("the disk of layer {} is gone", layer.digest);
                    Error::new(Kind::NotFound, context)
                })?;
                self.devices.adopt(&disk, layer)
            })
            .collect::<Result<_>>()?;
        self.disks
            .store()
            .belong_together(devices.iter().map(|device| device.disk()));
        let disks = devices.iter().map(|device| Arc::clone(device.disk()));
        self.disks.store().fill(disks, attachment.fill);
        let live = LiveAttachment {
            mount_device,
            watch: mount.as_ref().and_then(|mount| self.watch(mount)),
            phase: watch::Sender::new(AttachmentPhase {
                is_mounted: mount.is_some(),
                has_ended: false,
            }),
            devices,
            // it was kept before, or never will be
            keep: None,
            attachment,
            began: Instant::now(),
            mounted_after: Duration::ZERO,
            _first_read: None,
        };
        let id = live.attachment.id.clone();
        self.table().live.insert(id, Arc::new(live));
        Ok(())
    }
}
