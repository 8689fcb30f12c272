//! The attachments that this process serves, and how they are.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use tokio::sync::watch;

use super::{
    devices::Device,
    engine::{Engine, blocking, mount_source, unknown},
    mount_place,
    types::{Attachment, AttachmentStatus, State},
};
use crate::{
    error::{Error, Kind, Result},
    kernel::{
        mount_end::Watch,
        mountinfo::{self, Mount},
    },
    layer::{Progress, SourceDown},
};

/// What there is.
#[derive(Default)]
pub(crate) struct Table {
    pub(super) live: HashMap<String, Arc<Live>>,
    /// Attachments that are being made or given back: they have a record, and need not be live.
    pub(super) changing: HashSet<String>,
}

/// An attachment that this process serves. It is in the table until its mount has ended and its devices are idle.
pub(crate) struct Live {
    pub(super) attachment: Attachment,
    pub(super) devices: Vec<Arc<Device>>,
    /// The number of the overlay's file system (`st_dev`), major and minor.
    pub(super) mount_device: (u32, u32),
    /// Who tells the end of the overlay's file system; `None` where the kernel had no watch left.
    pub(super) watch: Option<Watch>,
    pub(super) phase: watch::Sender<Phase>,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Phase {
    /// Its caller has said that it is mounted.
    pub(super) is_mounted: bool,
    /// Its overlay has ended: it is mounted nowhere, no file of it is in use, and nobody has its descriptor.
    pub(super) has_ended: bool,
}

impl Engine {
    /// All attachments, those of an engine that died among them. What is just being made is left out.
    pub async fn list(&self) -> Result<Vec<AttachmentStatus>> {
        let (live, dead) = {
            let table = self.table();
            // read under the lock: what is neither live nor changing belongs to an engine that died
            let entries = self.records.entries()?.into_iter();
            let dead = entries.filter(|it| !table.live.contains_key(&it.id));
            let dead: Vec<_> = dead
                .filter(|it| !table.changing.contains(&it.id))
                .filter_map(|entry| Some(entry.record?.attachment))
                .collect();
            let live: Vec<_> = table.live.values().map(Arc::clone).collect();
            (live, dead)
        };
        blocking(move || {
            let mounts = mountinfo::own()?;
            let live = live.iter().map(|live| live.status(&mounts));
            let dead = dead.into_iter().map(AttachmentStatus::dead).map(Ok);
            let mut all: Vec<_> = live.chain(dead).collect::<Result<_>>()?;
            all.sort_by(|a, b| a.attachment.id.cmp(&b.attachment.id));
            Ok(all)
        })
        .await
    }

    /// How an attachment that this process serves is; `None` where it serves none of this id.
    pub(super) fn live(&self, id: &str) -> Option<Arc<Live>> {
        self.table().live.get(id).cloned()
    }

    /// The caller has mounted it. `Unavailable` when the engine has begun to end.
    pub fn mounted(&self, id: &str) -> Result<()> {
        let table = self.table();
        if *self.is_ending.borrow() {
            return Err(ending());
        }
        let live = table.live.get(id).ok_or_else(|| unknown(id))?;
        live.phase.send_modify(|phase| phase.is_mounted = true);
        Ok(())
    }

    /// Returns when [`Engine::mounted`] has been called, or the attachment is gone.
    pub async fn wait_mounted(&self, id: &str) {
        self.wait_for(id, |phase| phase.is_mounted || phase.has_ended)
            .await;
    }

    /// Returns when the attachment's mount has ended, or the attachment is gone: nobody uses it any more. Where the kernel had no watch
    /// left, it never does.
    pub async fn wait_ended(&self, id: &str) {
        self.wait_for(id, |phase| phase.has_ended).await;
    }

    async fn wait_for(&self, id: &str, is_it: impl FnMut(&Phase) -> bool) {
        let phase = self.live(id).map(|live| live.phase.subscribe());
        if let Some(mut phase) = phase {
            // an error: it is gone
            let _ = phase.wait_for(is_it).await;
        }
    }
}

impl Live {
    /// The attachment with its devices as they are now.
    pub(super) fn attachment(&self) -> Attachment {
        let mut attachment = self.attachment.clone();
        for (layer, device) in attachment.layers.iter_mut().zip(&self.devices) {
            (layer.device, layer.why) = (device.kind(), device.why());
        }
        attachment
    }

    /// How it is, where these are the mounts of this mount namespace.
    pub(super) fn status(&self, mounts: &[Mount]) -> Result<AttachmentStatus> {
        let disks = || self.devices.iter().map(|device| device.disk());
        let mut attachment = self.attachment();
        let asked = attachment.mountpoint.clone();
        let is_unmounted = match mount_place::place_of(mounts, &attachment) {
            Some(place) if asked.is_some() => {
                attachment.mountpoint = Some(place);
                false
            }
            Some(_) => false,
            None => asked.is_some() && self.is_unmounted()?,
        };
        let degraded = disks().find_map(|disk| {
            disk.degraded()
                .map(|why| format!("layer {}: {why}", disk.layer().digest))
        });
        let (present, all) = disks()
            .map(|disk| disk.span_counts())
            .fold((0, 0), |(present, all), counts| {
                (present + u64::from(counts.0), all + u64::from(counts.1))
            });
        let mut sources_down: Vec<SourceDown> = Vec::new();
        for down in disks().flat_map(|disk| disk.sources_down()) {
            if !sources_down.iter().any(|it| it.source == down.source) {
                sources_down.push(down);
            }
        }
        let (state, why) = match degraded {
            _ if is_unmounted => (State::Unmounted, Some(self.why_unmounted())),
            Some(why) => (State::Degraded, Some(why)),
            None if disks().all(|disk| disk.is_complete()) => (State::Complete, None),
            None if disks().any(|disk| *disk.progress().borrow() == Progress::Filling) => {
                (State::Filling, None)
            }
            None => (State::Lazy, None),
        };
        Ok(AttachmentStatus {
            attached_at: asked.filter(|asked| Some(asked) != attachment.mountpoint.as_ref()),
            attachment,
            state,
            why,
            spans: Some((present, all)),
            fetched_bytes: Some(disks().map(|disk| disk.counters().fetched_bytes).sum()),
            sources_down,
        })
    }

    /// Whether it was mounted once, and is in no mount namespace any more.
    fn is_unmounted(&self) -> Result<bool> {
        let phase = *self.phase.borrow();
        if phase.has_ended || !phase.is_mounted {
            return Ok(phase.has_ended);
        }
        let source = mount_source(&self.attachment.id);
        Ok(mountinfo::find_anywhere(&source)?.is_none())
    }

    fn why_unmounted(&self) -> String {
        if self.phase.borrow().has_ended {
            return "it was unmounted; its devices are given back in a moment, and at once by `socinbd detach`"
                .to_owned();
        }
        format!(
            "it was unmounted, and is still in use {}; its devices are given back when that ends",
            mount_place::who_uses(&self.attachment.id, Some(self.mount_device))
        )
    }

    /// What of it something still uses: its mount, or a device that no other attachment has.
    pub(super) fn in_use(&self) -> Option<PathBuf> {
        let own = |device: &&Arc<Device>| Arc::strong_count(device) == 1;
        let in_use = |device: &&Arc<Device>| device.is_in_use();
        let device = self.devices.iter().filter(own).find(in_use);
        let device = device.map(|device| device.shown_path());
        if self.watch.is_some() && !self.phase.borrow().has_ended {
            return device.or_else(|| Some("its mount".into()));
        }
        device
    }
}

impl AttachmentStatus {
    /// The status of an attachment that no daemon serves.
    pub fn dead(attachment: Attachment) -> Self {
        let mut attachment = attachment.with_devices_found();
        let asked = attachment.mountpoint.clone();
        let mounts = mountinfo::own().unwrap_or_default();
        if asked.is_some()
            && let Some(place) = mount_place::place_of(&mounts, &attachment)
        {
            attachment.mountpoint = Some(place);
        }
        let why = "its daemon has died: complete layers can be read on, absent data cannot; `socinbd detach` cleans up";
        Self {
            attached_at: asked.filter(|asked| Some(asked) != attachment.mountpoint.as_ref()),
            attachment,
            state: State::Dead,
            why: Some(why.to_owned()),
            spans: None,
            fetched_bytes: None,
            sources_down: Vec::new(),
        }
    }
}

/// What is asked of an engine that gives everything back.
pub(super) fn ending() -> Error {
    Error::new(
        Kind::Unavailable,
        "the daemon is ending; try again when it has ended, and a new one is started",
    )
}
