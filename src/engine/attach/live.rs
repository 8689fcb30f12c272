//! An attachment that this process serves, and its status.

use std::{
    collections::{HashMap, HashSet},
    ops::Add,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    devices::Device,
    mount_place,
    names::mount_source,
    types::{Attachment, AttachmentState, AttachmentStatus, DeviceChoice, ServingProgram},
};
use crate::{
    error::{Error, Kind, Result},
    kernel::mount::{
        end::Watch,
        info::{self, Mount},
    },
    layer::{DiskCounters, DiskProgress, FirstRead, SourceDown},
};

/// The attachments of an engine.
#[derive(Default)]
pub(crate) struct AttachmentTable {
    pub(super) live: HashMap<String, Arc<LiveAttachment>>,
    /// IDs of attachments that are being made or released. They have a record, but may not be in `live`.
    pub(super) changing: HashSet<String>,
    /// Kept attachments that could not be restored, with the reasons.
    pub(super) not_restored: HashMap<String, String>,
}

/// An attachment that this process serves. It stays in the table until its mount has ended and its devices are idle.
pub(crate) struct LiveAttachment {
    pub(in crate::engine) attachment: Attachment,
    pub(in crate::engine) devices: Vec<Arc<Device>>,
    /// Device number of the overlay (`st_dev`), major and minor.
    pub(super) mount_device: (u32, u32),
    /// The options of an attachment that was asked to be kept.
    pub(super) keep: Option<KeepOptions>,
    /// Watch for the end of the overlay; `None` if the kernel had no watch left.
    pub(super) watch: Option<Watch>,
    pub(super) phase: watch::Sender<AttachmentPhase>,
    /// When the attach began, or the daemon has taken the attachment over.
    pub(in crate::engine) began: Instant,
    /// Time from then to the mount.
    pub(in crate::engine) mounted_after: Duration,
    /// The first read after the attach; `None` if the daemon has taken the attachment over.
    pub(super) _first_read: Option<Arc<FirstRead>>,
}

/// What a kept attachment needs besides its record to be attached again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepOptions {
    pub(super) device: DeviceChoice,
    pub(super) allow_devices: bool,
}

/// Progress of an attachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AttachmentPhase {
    /// The client has reported that it has mounted the attachment.
    pub(super) is_mounted: bool,
    /// The overlay has ended: it is not mounted anywhere, and no process holds a file or descriptor of it.
    pub(super) has_ended: bool,
}

impl LiveAttachment {
    /// The attachment with the current kinds of its devices.
    pub(super) fn attachment(&self) -> Attachment {
        let mut attachment = self.attachment.clone();
        for (layer, device) in attachment.layers.iter_mut().zip(&self.devices) {
            (layer.device, layer.why) = (device.kind(), device.why());
        }
        attachment
    }

    /// The status, given the mounts of this mount namespace.
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
            _ if is_unmounted => (AttachmentState::Unmounted, Some(self.why_unmounted())),
            Some(why) => (AttachmentState::Degraded, Some(why)),
            None if disks().all(|disk| disk.is_complete()) => (AttachmentState::Complete, None),
            None if disks().any(|disk| *disk.progress().borrow() == DiskProgress::Filling) => {
                (AttachmentState::Filling, None)
            }
            None => (AttachmentState::Lazy, None),
        };
        let counters = disks()
            .map(|disk| disk.counters())
            .fold(DiskCounters::default(), Add::add);
        Ok(AttachmentStatus {
            attached_at: asked.filter(|asked| Some(asked) != attachment.mountpoint.as_ref()),
            attachment,
            state,
            why,
            spans: Some((present, all)),
            served_by: Some(ServingProgram::own()),
            fetched_bytes: Some(counters.fetched_bytes),
            counters: Some(counters),
            age_seconds: Some(self.began.elapsed().as_secs()),
            sources_down,
        })
    }

    /// Whether it was mounted, and is not mounted in any mount namespace any more.
    fn is_unmounted(&self) -> Result<bool> {
        let phase = *self.phase.borrow();
        if phase.has_ended || !phase.is_mounted {
            return Ok(phase.has_ended);
        }
        let source = mount_source(&self.attachment.id);
        Ok(info::find_anywhere(&source)?.is_none())
    }

    fn why_unmounted(&self) -> String {
        if self.phase.borrow().has_ended {
            return "unmounted; the devices are released in a minute, or at once by `socinbd detach`"
                .to_owned();
        }
        format!(
            "unmounted, but still in use {}; the devices are released when that use ends",
            mount_place::who_uses(&self.attachment.id, Some(self.mount_device))
        )
    }

    /// The part that is still in use: the mount, or a device that no other attachment uses.
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
    /// The status of a dead attachment.
    pub fn dead(attachment: Attachment) -> Self {
        let mut attachment = attachment.with_devices_found();
        let asked = attachment.mountpoint.clone();
        let mounts = info::own().unwrap_or_default();
        if asked.is_some()
            && let Some(place) = mount_place::place_of(&mounts, &attachment)
        {
            attachment.mountpoint = Some(place);
        }
        let why = "the daemon has died: complete layers are readable, absent data is not; a daemon that starts takes the attachment over if the kernel still has its devices, and `socinbd detach` removes it";
        Self {
            attached_at: asked.filter(|asked| Some(asked) != attachment.mountpoint.as_ref()),
            ..Self::unserved(attachment, AttachmentState::Dead, why.to_owned())
        }
    }

    /// The status of a kept attachment that is not attached; `why` if that was tried.
    pub(super) fn kept(attachment: Attachment, why: Option<String>) -> Self {
        let why = why.unwrap_or_else(|| {
            "not attached; `socinbd restore` attaches it, `socinbd detach` forgets it".to_owned()
        });
        Self::unserved(attachment, AttachmentState::Kept, why)
    }

    /// The status of an attachment without a server.
    fn unserved(attachment: Attachment, state: AttachmentState, why: String) -> Self {
        Self {
            attached_at: None,
            attachment,
            state,
            why: Some(why),
            served_by: None,
            spans: None,
            fetched_bytes: None,
            counters: None,
            age_seconds: None,
            sources_down: Vec::new(),
        }
    }
}

/// The error of requests during shutdown.
pub(super) fn ending() -> Error {
    Error::new(
        Kind::Unavailable,
        "the daemon is shutting down; try again when it has exited, and a new daemon is started",
    )
}
