//! The kernel device that answers the reads of a disk.

use std::sync::Arc;

use super::{fuse_files::FuseDevice, nbd_connections::NbdLink};
use crate::{
    kernel::{blockdev::Node, loopdev::LoopDevice},
    layer::SpanHold,
};

/// The kernel device that answers reads.
pub(super) enum DeviceBacking {
    /// The spans of the disk stay as long as the device.
    Loop {
        device: LoopDevice,
        _hold: SpanHold,
    },
    Fuse(FuseDevice),
    Nbd(Arc<NbdLink>),
}

impl DeviceBacking {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Loop { device, .. } => device.name(),
            Self::Fuse(fuse) => fuse.device().name(),
            Self::Nbd(link) => link.device().name(),
        }
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        match self {
            Self::Loop { device, .. } => device.node(),
            Self::Fuse(fuse) => fuse.device().node(),
            Self::Nbd(link) => link.device().node(),
        }
    }
}
