//! The layers that the daemon serves, whoever uses them: attachments, or a snapshotter that mounts layers alone.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    engine::attach::{
        devices::Device,
        engine::Engine,
        types::{AttachedLayer, AttachmentState, AttachmentStatus, DeviceKind},
    },
    layer::{Disk, DiskCounters, DiskProgress},
    oci::{Digest, Reference},
};

/// A layer in use.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LayerStatus {
    /// The layer's digest.
    pub digest: Digest,
    /// The digest of the table that its disk was laid out from.
    pub table: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// State of the layer.
    pub state: AttachmentState,
    /// Why it is degraded.
    pub why: Option<String>,
    /// The kind of device.
    pub device: DeviceKind,
    /// The kernel's devices: the one that is mounted, and the one that its reads go to if it is a mapped device.
    pub devices: Vec<PathBuf>,
    /// Number of present spans and of all spans; `None` without a daemon.
    pub spans: Option<(u32, u32)>,
    /// Counters since the daemon opened the disk; `None` without a daemon.
    pub counters: Option<DiskCounters>,
    /// The attachments that have the layer.
    pub attachments: Vec<LayerUser>,
    /// Paths where it is mounted alone, for a snapshotter.
    pub mounts: Vec<PathBuf>,
}

/// An attachment that has a layer.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LayerUser {
    /// Its ID.
    pub id: String,
    /// The image reference of the request.
    pub reference: Reference,
    /// Mount point.
    pub mountpoint: Option<PathBuf>,
}

impl Engine {
    /// The layers that this engine serves, by their digests.
    pub fn layers(&self) -> Vec<LayerStatus> {
        let mut layers: BTreeMap<(Digest, String), LayerStatus> = BTreeMap::new();
        let mut of = |device: &Arc<Device>, user: LayerUse| {
            let key = (device.disk().layer().digest, device.name().to_owned());
            let layer = layers.entry(key).or_insert_with(|| LayerStatus::of(device));
            match user {
                LayerUse::Attachment(user) => layer.attachments.push(user),
                LayerUse::Mount(path) => layer.mounts.push(path),
            }
        };
        for live in self.all_live() {
            let attachment = &live.attachment;
            let user = LayerUser {
                id: attachment.id.clone(),
                reference: attachment.reference.clone(),
                mountpoint: attachment.mountpoint.clone(),
            };
            for device in &live.devices {
                of(device, LayerUse::Attachment(user.clone()));
            }
        }
        for (path, device) in self.layer_mounts() {
            of(&device, LayerUse::Mount(path));
        }
        layers.into_values().collect()
    }
}

enum LayerUse {
    Attachment(LayerUser),
    Mount(PathBuf),
}

impl LayerStatus {
    /// A layer that is served, without its users.
    fn of(device: &Device) -> Self {
        let disk = device.disk();
        let why = disk.degraded();
        Self {
            digest: disk.layer().digest,
            table: *disk.table(),
            size: disk.layer().size,
            state: state(disk, why.is_some()),
            why,
            device: device.kind(),
            devices: device.kernel_paths(),
            spans: Some(disk.span_counts()),
            counters: Some(disk.counters()),
            attachments: Vec::new(),
            mounts: Vec::new(),
        }
    }

    /// The layers of attachments that no daemon serves, from their records.
    pub fn without_daemon(attachments: &[AttachmentStatus]) -> Vec<Self> {
        let layers = attachments.iter().flat_map(|status| {
            let layers = status.attachment.layers.iter();
            layers.map(move |layer| Self::of_record(status, layer))
        });
        layers.collect()
    }

    fn of_record(status: &AttachmentStatus, layer: &AttachedLayer) -> Self {
        Self {
            digest: layer.digest,
            table: layer.table,
            size: layer.size,
            state: status.state,
            why: status.why.clone(),
            device: layer.device,
            devices: layer.devices().collect(),
            spans: None,
            counters: None,
            attachments: vec![LayerUser {
                id: status.attachment.id.clone(),
                reference: status.attachment.reference.clone(),
                mountpoint: status.attachment.mountpoint.clone(),
            }],
            mounts: Vec::new(),
        }
    }
}

fn state(disk: &Disk, is_degraded: bool) -> AttachmentState {
    match *disk.progress().borrow() {
        _ if is_degraded => AttachmentState::Degraded,
        DiskProgress::Complete => AttachmentState::Complete,
        DiskProgress::Filling => AttachmentState::Filling,
        DiskProgress::Lazy | DiskProgress::Full => AttachmentState::Lazy,
    }
}
