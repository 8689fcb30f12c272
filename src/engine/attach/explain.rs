//! The answer to `socinbd why`: for each layer its state, its errors, its device, and the sources of its files.

use serde::{Deserialize, Serialize};

use super::{
    engine::Engine,
    live::LiveAttachment,
    names::unknown,
    types::{AttachedLayer, Attachment, AttachmentState, AttachmentStatus, UsedIndex},
};
use crate::{
    error::Result,
    layer::{Disk, Reason},
    oci::{Digest, Reference},
};

/// An attachment, explained.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// Its id.
    pub id: String,
    /// The image as it was asked for.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
    /// Where it is mounted.
    pub mountpoint: Option<std::path::PathBuf>,
    /// The state of the whole.
    pub state: AttachmentState,
    /// The SOCI index in use.
    pub index: Option<UsedIndex>,
    /// The compact index in use, which goes before it.
    pub compact_index: Option<Digest>,
    /// What was said when it was attached.
    pub warnings: Vec<String>,
    /// Its layers, topmost first.
    pub layers: Vec<LayerExplanation>,
}

/// A layer of an attachment, explained.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerExplanation {
    /// Its disk, where that comes from, and its device with the reason for it.
    #[serde(flatten)]
    pub layer: AttachedLayer,
    /// Its state.
    pub state: AttachmentState,
    /// Spans present and in all; `None` where no daemon can tell.
    pub spans: Option<(u32, u32)>,
    /// Compressed bytes fetched since the daemon opened its disk.
    pub fetched_bytes: Option<u64>,
    /// Whether the layer has been checked as a whole, against its digest or diff ID; `None` where no daemon can tell.
    pub verified: Option<bool>,
    /// Why a layer whose spans are all present could not be checked.
    pub check_error: Option<String>,
    /// What it is degraded for.
    pub reasons: Vec<Reason>,
}

impl Engine {
    /// Explains an attachment by its id.
    pub async fn why(&self, id: &str) -> Result<Explanation> {
        let mut all = self.list().await?.into_iter();
        let status = all.find(|status| status.attachment.id == id);
        let status = status.ok_or_else(|| unknown(id))?;
        Ok(match self.live(id) {
            Some(live) => live.why(status),
            None => Explanation::dead(status.attachment),
        })
    }
}

impl LiveAttachment {
    fn why(&self, status: AttachmentStatus) -> Explanation {
        let attachment = status.attachment;
        let layers = attachment.layers.iter().zip(&self.devices);
        let layers = layers
            .map(|(layer, device)| LayerExplanation::of(layer.clone(), device.disk()))
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

    /// What its record says of an attachment that no daemon serves.
    pub fn dead(attachment: Attachment) -> Self {
        let attachment = attachment.with_devices_found();
        let layers = attachment.layers.iter().cloned();
        let layers = layers
            .map(|layer| LayerExplanation {
                layer,
                state: AttachmentState::Dead,
                spans: None,
                fetched_bytes: None,
                verified: None,
                check_error: None,
                reasons: Vec::new(),
            })
            .collect();
        Self::new(attachment, AttachmentState::Dead, layers)
    }
}

impl LayerExplanation {
    fn of(layer: AttachedLayer, disk: &Disk) -> Self {
        let reasons = disk.reasons();
        Self {
            layer,
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
