//! Keeps attachments, and attaches kept ones again: from the state directory alone, without a source.

use std::{os::fd::AsFd as _, path::Path, sync::Arc, time::Instant};

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::{
    blocking::blocking,
    engine::{
        attach::{
            engine::Engine,
            kept_record::KeptRecord,
            live::{self, KeepOptions},
            names::unknown,
            steps::AttachedImage,
            types::{AttachedLayer, RestoredAttachment},
        },
        open::opened::{LAYERS_AT_ONCE, OpenedLayer},
    },
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount,
};

impl Engine {
    /// Keeps a live attachment, if its request has asked for it: it is attached again after a reboot.
    pub async fn keep(self: &Arc<Self>, id: &str) -> Result<()> {
        let live = self.live(id).ok_or_else(|| unknown(id))?;
        let Some(options) = live.keep else {
            return Ok(());
        };
        let (engine, id) = (Arc::clone(self), id.to_owned());
        self.finish(async move {
            let _changing = engine.wait_to_change(&id).await;
            let keep = Arc::clone(&engine);
            blocking(move || {
                // a disk that was just made is valid after a reboot only if it was synced
                live.devices
                    .iter()
                    .try_for_each(|device| device.disk().sync())?;
                let _numbering = keep.restoring.blocking_lock();
                let kept = keep.records.all_kept()?.into_iter();
                let numbers = kept.filter_map(|id| Some(keep.records.kept(&id).ok()?.number));
                keep.records.keep(&KeptRecord::new(
                    numbers.max().map_or(1, |last| last.saturating_add(1)),
                    live.attachment.clone(),
                    options.device,
                    options.allow_devices,
                ))
            })
            .await
        })
        .await
    }

    /// Attaches all kept attachments that are not attached, in the order in which they were attached at first. The result has all kept
    /// attachments; what fails is also logged.
    pub async fn restore(self: &Arc<Self>) -> Result<Vec<RestoredAttachment>> {
        let engine = Arc::clone(self);
        self.finish(async move { engine.restore_all().await }).await
    }

    async fn restore_all(self: &Arc<Self>) -> Result<Vec<RestoredAttachment>> {
        let _one_at_a_time = self.restoring.lock().await;
        let engine = Arc::clone(self);
        let mut kept = blocking(move || {
            let ids = engine.records.all_kept()?.into_iter();
            let kept = ids.map(|id| {
                let record = engine.records.kept(&id);
                (id, record)
            });
            Ok(kept.collect::<Vec<_>>())
        })
        .await?;
        kept.sort_by_key(|(_, record)| record.as_ref().map_or(0, |record| record.number));
        let mut restored = Vec::new();
        for (id, record) in kept {
            let (attachment, result) = match record {
                Ok(record) => {
                    let attachment = record.attachment.clone();
                    (Some(attachment), self.restore_one(record).await)
                }
                Err(error) => (None, Err(error)),
            };
            let why = result.as_ref().err().map(Error::report);
            match &why {
                None => self.table().not_restored.remove(&id),
                Some(why) => {
                    tracing::error!(id, "a kept attachment is not restored: {why}");
                    let why = format!("not restored: {why}");
                    self.table().not_restored.insert(id.clone(), why)
                }
            };
            restored.push(RestoredAttachment {
                id,
                attachment,
                result,
            });
        }
        Ok(restored)
    }

    async fn restore_one(self: &Arc<Self>, record: KeptRecord) -> Result<()> {
        let id = record.attachment.id.clone();
        let _changing = self.wait_to_change(&id).await;
        if self.live(&id).is_some() || !self.records.is_kept(&id) {
            return Ok(()); // attached, or forgotten since the list was read
        }
        if self.is_ending() {
            return Err(live::ending());
        }
        if self.records.find(&id)?.is_some() {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "its mount of a daemon that has died is still in use; `socinbd detach --keep-record {id}` releases it, then `socinbd restore` attaches it again"
                ),
            ));
        }
        let reference = record.attachment.reference.clone();
        let restored = self.attach_again(record).await;
        restored.map_err(|error| error.context(format!("restoring {reference}")))
    }

    async fn attach_again(self: &Arc<Self>, record: KeptRecord) -> Result<()> {
        let mountpoint = record.mountpoint().cloned();
        let mountpoint =
            mountpoint.ok_or_else(|| Error::new(Kind::Corrupt, "its record has no mount point"))?;
        let engine = Arc::clone(self);
        let checked = mountpoint.clone();
        blocking(move || {
            engine.check_mountpoint(&checked)?;
            check_free(&checked)
        })
        .await?;
        let layers = self.stored_layers(&record).await?;
        let options = KeepOptions {
            device: record.device,
            allow_devices: record.allow_devices,
        };
        let AttachedImage { attachment, mount } = self
            .mount(record.attachment, layers, options, Instant::now())
            .await?;
        // after an error the descriptor is closed, and so the attachment is released
        blocking(move || mount::attach(mount.as_fd(), &mountpoint)).await?;
        self.mounted(&attachment.id)
    }

    /// The disks of a kept attachment.
    async fn stored_layers(&self, record: &KeptRecord) -> Result<Vec<OpenedLayer>> {
        let command = format!(
            "socinbd attach --keep {} {}",
            record.attachment.reference,
            record
                .mountpoint()
                .map_or("MOUNTPOINT".into(), |it| it.display().to_string()),
        );
        let opening: Vec<_> = record
            .attachment
            .layers
            .iter()
            .cloned()
            .map(|layer: AttachedLayer| {
                let (store, command) = (Arc::clone(self.disks.store()), command.clone());
                blocking(move || {
                    let disk = store.stored_after_restart(&layer.digest, &layer.table)?;
                    let disk = disk.ok_or_else(|| {
                        Error::new(
                            Kind::NotFound,
                            format!(
                                "the disk of layer {} is not in the state directory, or is damaged (the log says how); attach the image again: `{command}`",
                                layer.digest
                            ),
                        )
                    })?;
                    Ok(OpenedLayer {
                        disk,
                        basis: layer.basis,
                    })
                })
            })
            .collect();
        let layers: Vec<OpenedLayer> = futures_util::stream::iter(opening)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        let disks = layers.iter().map(|layer| &layer.disk);
        self.disks.store().belong_together(disks);
        Ok(layers)
    }
}

/// Whether something can be mounted there: a directory that is not a mount point.
fn check_free(mountpoint: &Path) -> Result<()> {
    let metadata = std::fs::metadata(mountpoint).or_kind(Kind::NotFound, || {
        format!(
            "mount point {} (make the directory, then `socinbd restore`)",
            mountpoint.display()
        )
    })?;
    if !metadata.is_dir() {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "mount point {} is not a directory; make it one, then `socinbd restore`",
                mountpoint.display()
            ),
        ));
    }
    match mount::is_mount(mountpoint)? {
        false => Ok(()),
        true => Err(Error::new(
            Kind::Busy,
            format!(
                "another file system is mounted at {}; unmount it, then `socinbd restore`",
                mountpoint.display()
            ),
        )),
    }
}
