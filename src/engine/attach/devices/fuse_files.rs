//! FUSE files with the content of disks, and the loop devices on them.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use super::{
    kept::{HeldName, StoredName},
    metadata_readahead::WatchedDisk,
    servers::Serving,
};
use crate::{
    engine::attach::names::random_digits,
    error::Result,
    kernel::{
        fuse,
        loopdev::{self, LoopDevice, LoopOptions},
    },
};

/// A loop device on a FUSE file. Drop order: the device, the file, its name in the descriptor store.
pub(super) struct FuseDevice {
    device: LoopDevice,
    _server: fuse::Server,
    _name: Option<HeldName>,
}

impl FuseDevice {
    /// Makes a file and a device. The device's name is the identifier and digits after it, by which the descriptor store has the file.
    pub(super) fn make(
        serving: &Serving,
        watched: &Arc<WatchedDisk>,
        identifier: &str,
    ) -> Result<Self> {
        let digits = random_digits()?;
        let mut name = None;
        let keep = |descriptors: &[BorrowedFd<'_>]| {
            name = Some(HeldName(serving.kept.store_file(&digits, descriptors)));
        };
        let served = Arc::clone(watched);
        let file = fuse::serve(served, identifier, &serving.runtime, keep)?;
        let options = LoopOptions {
            name: format!("{identifier}-{digits}"),
            ..LoopOptions::default()
        };
        let device = loopdev::attach(file.file(), &options)?;
        let server = file.into_server();
        serving.servers.add(&server.pulse());
        Ok(Self {
            device,
            _server: server,
            _name: name,
        })
    }

    /// Serves the file of a daemon that died, from its descriptors and their name, and takes over its device.
    pub(super) fn adopt(
        serving: &Serving,
        index: u32,
        kept: (StoredName, Vec<OwnedFd>),
        watched: &Arc<WatchedDisk>,
    ) -> Result<Self> {
        let name = HeldName(kept.0);
        let served = Arc::clone(watched);
        let server = fuse::resume(kept.1, served, &serving.runtime)?;
        serving.servers.add(&server.pulse());
        Ok(Self {
            // opened last: that may have to wait for the file
            device: LoopDevice::adopt(index)?,
            _server: server,
            _name: Some(name),
        })
    }

    pub(super) fn device(&self) -> &LoopDevice {
        &self.device
    }
}
