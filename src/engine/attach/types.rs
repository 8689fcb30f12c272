//! Requests and answers of an engine: plain data, shared by the command line, the HTTP API and the tests.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    engine::open::{opened::DiskBasis, policy::IndexChoice, soci_index::SociIndex},
    error::Result,
    layer::{DiskCounters, FillPolicy, SourceDown},
    oci::{Digest, Platform, Process, Reference},
    source::Access,
};

/// How the kernel gets a layer's disk.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// loop for a complete disk, otherwise nbd if the kernel has it, otherwise fuse.
    #[default]
    Auto,
    /// The kernel's network block device.
    Nbd,
    /// A loop device on the disk itself; all disks must be complete.
    Loop,
    /// One FUSE file per disk, and a loop device on it.
    Fuse,
}

/// A request to attach an image.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AttachRequest {
    /// The image.
    pub reference: Reference,
    /// Access to the image's source: the caller's credentials, proxies and certificates.
    pub access: Access,
    /// `os/architecture[/variant]`; `None`: the platform of this machine.
    pub platform: Option<Platform>,
    /// The SOCI index to use.
    pub index: IndexChoice,
    /// The kind of device.
    pub device: DeviceChoice,
    /// Whether to add a writable upper layer, which is removed with the attachment.
    pub writable: bool,
    /// Whether device nodes in the image work as devices.
    pub allow_devices: bool,
    /// When the rest of its layers is fetched.
    #[serde(default)]
    pub fill: FillPolicy,
    /// Absolute path where the caller is going to mount the image. `None`: the caller only needs the descriptor of the mount.
    pub mountpoint: Option<PathBuf>,
    /// Whether it is attached again after a reboot. Needs a mount point.
    #[serde(default)]
    pub keep: bool,
}

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
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
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AttachedLayer {
    /// The layer's digest.
    pub digest: Digest,
    /// The digest of the table that its disk was laid out from.
    pub table: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// The kind of device. A lazy device becomes a loop device when its disk is complete, if the kernel has a device mapper.
    pub device: DeviceKind,
    /// The device that is mounted, e.g. `/dev/nbd3`, `/dev/loop7`, `/dev/dm-2`.
    pub device_path: PathBuf,
    /// For a mapped device: the device that its reads went to when it was made.
    #[serde(default)]
    pub backing: Option<PathBuf>,
    /// Why the device is of this kind.
    pub why: String,
    /// How the disk was made.
    pub basis: DiskBasis,
}

impl AttachedLayer {
    /// Paths of the layer's devices.
    pub(in crate::engine) fn devices(&self) -> impl Iterator<Item = PathBuf> + use<> {
        [Some(self.device_path.clone()), self.backing.clone()]
            .into_iter()
            .flatten()
    }
}

/// An attached image.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Attachment {
    /// ID, unique in its runtime directory: 16 hexadecimal digits.
    pub id: String,
    /// The image reference of the request.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
    /// The SOCI index in use.
    pub index: Option<UsedIndex>,
    /// The compact index in use; preferred to the SOCI index.
    #[serde(default)]
    pub compact_index: Option<Digest>,
    /// Mount point of the request, or where it is mounted now.
    pub mountpoint: Option<PathBuf>,
    /// Whether it has a writable upper layer.
    pub writable: bool,
    /// Whether it is attached again after a reboot.
    #[serde(default)]
    pub kept: bool,
    /// When the rest of its layers is fetched.
    #[serde(default)]
    pub fill: FillPolicy,
    /// The program of the image.
    pub process: Process,
    /// Layers with their devices, topmost first. A repeated layer appears once.
    pub layers: Vec<AttachedLayer>,
    /// Warnings for the user: a fallback, or an unreadable index.
    pub warnings: Vec<String>,
}

/// The SOCI index of an attachment.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct UsedIndex {
    /// Digest of the index.
    pub digest: Digest,
    /// SOCI version, 1 or 2.
    pub version: u8,
    /// How it was found.
    pub origin: String,
}

impl UsedIndex {
    /// Describes a SOCI index that was found.
    pub fn of(index: &SociIndex) -> Self {
        Self {
            digest: index.digest,
            version: index.version,
            origin: index.origin.to_string(),
        }
    }
}

/// The status of an attachment, for `list`.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AttachmentStatus {
    /// The attachment.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Former mount point, if the mount has moved since because a directory above it was renamed. `mountpoint` has the current one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_at: Option<PathBuf>,
    /// State.
    pub state: AttachmentState,
    /// Reason for the state, e.g. why it is degraded.
    pub why: Option<String>,
    /// The daemon that serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<ServingProgram>,
    /// Number of present spans and of all spans, over all layers; `None` without a daemon.
    pub spans: Option<(u64, u64)>,
    /// Compressed bytes fetched for the layers since the daemon opened their disks.
    pub fetched_bytes: Option<u64>,
    /// Counters of all layers since the daemon opened their disks; `None` without a daemon.
    #[serde(default)]
    pub counters: Option<DiskCounters>,
    /// Seconds since the attach, or since this daemon has taken the attachment over; `None` without a daemon.
    #[serde(default)]
    pub age_seconds: Option<u64>,
    /// Sources of the layers that do not respond.
    #[serde(default)]
    pub sources_down: Vec<SourceDown>,
}

/// A running daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ServingProgram {
    /// The program's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// The file that the program was started from.
    pub path: PathBuf,
    /// Whether that file has been removed or replaced by another one since.
    pub is_replaced: bool,
}

impl ServingProgram {
    /// This process.
    pub fn own() -> Self {
        const PROGRAM: &str = "/proc/self/exe";
        let link = fs::read_link(PROGRAM).unwrap_or_default();
        // so the kernel shows a file that was removed
        let removed = link.as_os_str().as_bytes().strip_suffix(b" (deleted)");
        let path = removed.map_or(link.clone(), |path| OsStr::from_bytes(path).into());
        let file = |path: &Path| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            is_replaced: file(&path) != file(Path::new(PROGRAM)),
            path,
        }
    }
}

/// The state of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AttachmentState {
    /// A daemon serves it, and some spans are absent.
    Lazy,
    /// A daemon serves it, and fetches all absent spans of a layer, because most of the layer was read.
    Filling,
    /// Every layer is complete.
    Complete,
    /// A fetch fails, or a source of a layer is down. The reason is in `why`.
    Degraded,
    /// A daemon serves it, but it is not mounted any more. It is released when nothing uses it.
    Unmounted,
    /// Its daemon has died. A daemon that starts takes it over if the kernel still has its devices; `detach` removes it.
    Dead,
    /// It is not attached. The next start of the daemon attaches it, or `restore`.
    Kept,
}

impl AttachmentState {
    /// All states.
    pub(in crate::engine) const ALL: [Self; 7] = [
        Self::Lazy,
        Self::Filling,
        Self::Complete,
        Self::Degraded,
        Self::Unmounted,
        Self::Dead,
        Self::Kept,
    ];

    /// The name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Filling => "filling",
            Self::Complete => "complete",
            Self::Degraded => "degraded",
            Self::Unmounted => "unmounted",
            Self::Dead => "dead",
            Self::Kept => "kept",
        }
    }
}

impl std::fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The result of attaching a kept attachment again.
#[derive(Debug)]
pub struct RestoredAttachment {
    /// Its ID.
    pub id: String,
    /// The attachment; `None` if its record cannot be read.
    pub attachment: Option<Attachment>,
    /// Whether it is attached now, and if it is not, why.
    pub result: Result<()>,
}

#[cfg(test)]
impl AttachmentStatus {
    /// A lazy attachment without layers, with this ID, for tests.
    pub(crate) fn of_test(id: &str) -> Self {
        Self {
            attachment: tests::attachment(id),
            attached_at: None,
            state: AttachmentState::Lazy,
            why: None,
            served_by: None,
            spans: Some((1, 4)),
            fetched_bytes: Some(0),
            counters: None,
            age_seconds: Some(1),
            sources_down: Vec::new(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An attachment without layers, with this ID.
    pub(in crate::engine) fn attachment(id: &str) -> Attachment {
        Attachment {
            id: id.to_owned(),
            reference: "registry.example/app".parse().unwrap(),
            manifest: Digest::of(b""),
            index: None,
            compact_index: None,
            mountpoint: None,
            writable: false,
            kept: false,
            fill: FillPolicy::Auto,
            process: Process::default(),
            layers: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
