//! Requests and answers of an engine: plain data that the command line, the HTTP API and the tests share.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    engine::open::{opened::DiskBasis, policy::IndexChoice, soci_index::SociIndex},
    layer::SourceDown,
    oci::{Digest, Platform, Process, Reference},
    source::Access,
};

/// How the kernel gets a layer's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// loop for a complete disk, else nbd where this kernel has it, else fuse.
    #[default]
    Auto,
    /// The kernel's network block device.
    Nbd,
    /// A loop device on the disk itself; all disks must be complete.
    Loop,
    /// One FUSE file a disk, and a loop device on it.
    Fuse,
}

/// An image that is to be attached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    /// The image.
    pub reference: Reference,
    /// How its source is reached: credentials, proxies and certificates of the person who asks.
    pub access: Access,
    /// `os/architecture[/variant]`; this machine's when left out.
    pub platform: Option<Platform>,
    /// The SOCI index to use.
    pub index: IndexChoice,
    /// The kind of device.
    pub device: DeviceChoice,
    /// With a writable upper layer, which ends with the attachment.
    pub writable: bool,
    /// Device files in the image work as devices.
    pub allow_devices: bool,
    /// Where the caller is going to mount it; absolute. `None`: the caller only wants the mount's descriptor.
    pub mountpoint: Option<PathBuf>,
}

/// Which way a device took, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// See [`DeviceChoice::Nbd`].
    Nbd,
    /// See [`DeviceChoice::Loop`].
    Loop,
    /// See [`DeviceChoice::Fuse`].
    Fuse,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Nbd => "nbd",
            Self::Loop => "loop",
            Self::Fuse => "fuse",
        })
    }
}

/// One layer of an attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachedLayer {
    /// The layer's digest.
    pub digest: Digest,
    /// The digest of the table that its disk was laid out from.
    pub table: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// The kind of device. A lazy one becomes a loop device when the disk is complete, where the kernel has a device mapper.
    pub device: DeviceKind,
    /// What is mounted, e.g. `/dev/nbd3`, `/dev/loop7`, `/dev/dm-2`.
    pub device_path: PathBuf,
    /// Where that is one of the device mapper: the device that its reads went on to when it was made.
    #[serde(default)]
    pub backing: Option<PathBuf>,
    /// Why this kind of device.
    pub why: String,
    /// How its disk came to be.
    pub basis: DiskBasis,
}

impl AttachedLayer {
    /// Its devices.
    pub(super) fn devices(&self) -> impl Iterator<Item = PathBuf> + use<> {
        [Some(self.device_path.clone()), self.backing.clone()]
            .into_iter()
            .flatten()
    }
}

/// An attached image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// Its name among the attachments of a run directory: 16 hexadecimal digits.
    pub id: String,
    /// The image as it was asked for.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
    /// The SOCI index in use.
    pub index: Option<UsedIndex>,
    /// The compact index in use, which goes before it.
    #[serde(default)]
    pub compact_index: Option<Digest>,
    /// Where it is mounted, once it is.
    pub mountpoint: Option<PathBuf>,
    /// Whether there is a writable upper layer.
    pub writable: bool,
    /// The image's program.
    pub process: Process,
    /// Its layers that have a device, topmost first. Equal layers appear once.
    pub layers: Vec<AttachedLayer>,
    /// What the person should know: a fallback taken, an index that could not be read.
    pub warnings: Vec<String>,
}

/// The SOCI index of an attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UsedIndex {
    /// Its digest.
    pub digest: Digest,
    /// 1 or 2.
    pub version: u8,
    /// How it was found.
    pub origin: String,
}

impl UsedIndex {
    /// The index as it was found.
    pub fn of(index: &SociIndex) -> Self {
        Self {
            digest: index.digest,
            version: index.version,
            origin: index.origin.to_string(),
        }
    }
}

/// The state of an attachment, for `list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// The attachment.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Where it was mounted once, if it has moved since: a folder above it was renamed. `mountpoint` says where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_at: Option<PathBuf>,
    /// Whether a daemon serves it, and how well.
    pub state: AttachmentState,
    /// Why it is degraded.
    pub why: Option<String>,
    /// Spans present and in all, over the layers; `None` where no daemon can tell.
    pub spans: Option<(u64, u64)>,
    /// Compressed bytes fetched for its layers since the daemon opened their disks.
    pub fetched_bytes: Option<u64>,
    /// Sources of its layers that do not answer.
    #[serde(default)]
    pub sources_down: Vec<SourceDown>,
}

/// How an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachmentState {
    /// Served, and some spans are absent.
    Lazy,
    /// Served, and all absent spans of a layer are being fetched, for most of it was wanted.
    Filling,
    /// Every layer is complete.
    Complete,
    /// A fetch fails at the moment, or a source of a layer is down; see `why`.
    Degraded,
    /// Served, and mounted nowhere any more: it was unmounted by hand. It is given back when nothing uses it.
    Unmounted,
    /// No daemon serves it: its daemon has died. `detach` cleans up.
    Dead,
}

impl std::fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Lazy => "lazy",
            Self::Filling => "filling",
            Self::Complete => "complete",
            Self::Degraded => "degraded",
            Self::Unmounted => "unmounted",
            Self::Dead => "dead",
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An attachment of nothing, with this id.
    pub(in crate::engine) fn attachment(id: &str) -> Attachment {
        Attachment {
            id: id.to_owned(),
            reference: "registry.example/app".parse().unwrap(),
            manifest: Digest::of(b""),
            index: None,
            compact_index: None,
            mountpoint: None,
            writable: false,
            process: Process::default(),
            layers: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
