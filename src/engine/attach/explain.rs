//! Explains attachments for `socinbd why`: for each layer its state, errors, device and sources.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    devices::Device,
    engine::Engine,
    live::LiveAttachment,
    names::unknown,
    types::{AttachedLayer, Attachment, AttachmentState, AttachmentStatus, UsedIndex},
};
use crate::{
    error::Result,
    layer::DegradedReason,
    oci::{Digest, Reference},
};

/// Explanation of an attachment.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Explanation {
    /// ID of the attachment.
    pub id: String,
    /// The image reference of the request.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
    /// Mount point.
    pub mountpoint: Option<PathBuf>,
    /// State of the attachment.
    pub state: AttachmentState,
    /// The SOCI index in use.
    pub index: Option<UsedIndex>,
    /// The compact index in use; preferred to the SOCI index.
    pub compact_index: Option<Digest>,
    /// Warnings of the attach.
    pub warnings: Vec<String>,
    /// Layers, topmost first.
    pub layers: Vec<LayerExplanation>,
}

/// Explanation of a layer.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LayerExplanation {
    /// The layer's disk, the basis of the disk, and the device with the reason for its kind.
    #[serde(flatten)]
    pub layer: AttachedLayer,
    /// The kernel's devices at the moment: the one that is mounted, and the one that its reads go to if it is a mapped device.
    #[serde(default)]
    pub devices: Vec<PathBuf>,
    /// State of the layer.
    pub state: AttachmentState,
    /// Number of present spans and of all spans; `None` without a daemon.
    pub spans: Option<(u32, u32)>,
    /// Compressed bytes fetched since the daemon opened the disk.
    pub fetched_bytes: Option<u64>,
    /// Whether the whole layer was verified against its digest or diff ID; `None` without a daemon.
    pub verified: Option<bool>,
    /// Why the whole layer could not be verified although all spans are present.
    pub check_error: Option<String>,
    /// Why the layer is degraded.
    pub reasons: Vec<DegradedReason>,
}

impl Engine {
    /// Explains the attachment with this ID.
    pub async fn why(&self, id: &str) -> Result<Explanation> {
        let mut all = self.list().await?.into_iter();
        let status = all.find(|status| status.attachment.id == id);
        let status = status.ok_or_else(|| unknown(id))?;
        Ok(match self.live(id) {
            Some(live) => live.why(status),
            None => Explanation::without_daemon(status),
        })
    }
}

impl LiveAttachment {
    fn why(&self, status: AttachmentStatus) -> Explanation {
        let attachment = status.attachment;
        let layers = attachment.layers.iter().zip(&self.devices);
        let layers = layers
            .map(|(layer, device)| LayerExplanation::of(layer.clone(), device))
            .collect();
        Explanation::new(attachment, status.state, layers)
    }
}

impl Explanation {
    fn new(attachment: Attachment, state: AttachmentState, layers: Vec<LayerExplanation>) -> Self {
        let Attachment {
            id,
            reference,
            manifest,
            index,
            compact_index,
            mountpoint,
            warnings,
            ..
        } = attachment;
        Self {
            id,
            reference,
            manifest,
            mountpoint,
            state,
            index,
            compact_index,
            warnings,
            layers,
        }
    }

    /// Explains an attachment that no daemon serves, from its record.
    pub fn without_daemon(status: AttachmentStatus) -> Self {
        let AttachmentStatus {
            attachment, state, ..
        } = status;
        let attachment = attachment.with_devices_found();
        let layers = attachment.layers.iter().cloned();
        let layers = layers
            .map(|layer| LayerExplanation {
                devices: layer.devices().collect(),
                layer,
                state,
                spans: None,
                fetched_bytes: None,
                verified: None,
                check_error: None,
                reasons: Vec::new(),
            })
            .collect();
        Self::new(attachment, state, layers)
    }
}

impl LayerExplanation {
    fn of(layer: AttachedLayer, device: &Device) -> Self {
        let disk = device.disk();
        let reasons = disk.reasons();
        Self {
            layer,
            devices: device.kernel_paths(),
            state: match &reasons[..] {
                [_, ..] => AttachmentState::Degraded,
                [] if disk.is_complete() => AttachmentState::Complete,
                [] => AttachmentState::Lazy,
            },
            spans: Some(disk.span_counts()),
            fetched_bytes: Some(disk.counters().fetched_bytes),
            verified: Some(disk.is_verified()),
            check_error: disk.check_error(),
            reasons,
        }
    }
}
