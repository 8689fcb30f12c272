//! The settings of a snapshotter.

use std::{path::PathBuf, time::Duration};

use super::rules::Rule;
use crate::{
    engine::{DeviceChoice, LayerMounter, open::policy::IndexChoice},
    source::Access,
};

/// What is done with a lazy layer that was not compared with its diff ID yet. containerd uses a snapshot for every image that names the diff
/// IDs of its layers, and trusts that they are true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Unproven {
    /// It is served, and compared when all of it was read.
    Lazy,
    /// It is served, and all of it is fetched in the background and compared.
    #[default]
    VerifySoon,
    /// It is not served: it is fetched as a whole and compared first.
    Stream,
}

/// The CRI image service that the snapshotter puts in front of containerd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageServiceOptions {
    /// Its socket.
    pub address: PathBuf,
    /// The socket of containerd.
    pub containerd: PathBuf,
}

/// The limits of pulls of layers that a rule or a label wants on disks. containerd waits for them, and holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullLimits {
    /// Maximum time that a request waits for a layer.
    pub time: Duration,
    /// A layer has to bring [`Self::progress`] bytes in this time.
    pub progress_time: Duration,
    /// Bytes in their order: parts that come side by side with the first one that is missing do not count, so this is about a quarter of what
    /// arrives.
    pub progress: u64,
}

impl Default for PullLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(600),
            progress_time: Duration::from_secs(30),
            progress: 256 << 10,
        }
    }
}

/// The settings of a snapshotter.
#[derive(Clone, Debug, Default)]
pub struct SnapshotterOptions {
    /// Access to the registries of images.
    pub access: Access,
    /// The indexes to trust.
    pub index: IndexChoice,
    /// The kind of device.
    pub device: DeviceChoice,
    /// See [`Unproven`].
    pub unproven: Unproven,
    /// How layers are pulled: the first rule that applies counts.
    pub rules: Vec<Rule>,
    /// See [`PullLimits`].
    pub pull_limits: PullLimits,
    /// Who mounts the file systems of lazy layers.
    pub layer_mounts: LayerMounter,
    /// The image service; `None`: none is served.
    pub image_service: Option<ImageServiceOptions>,
    /// Headers of the requests to registries that labels may set, in lower case.
    pub label_headers: Vec<String>,
}
