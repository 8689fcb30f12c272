//! The limits of the local disk, of commands that run a daemon.

use clap::Args;

use crate::{
    cli::quantity,
    layer::{DiskLimits, DiskReserve},
};

/// The limits of the local disk.
#[derive(Args, Clone, Debug)]
pub(in crate::cli) struct DiskArgs {
    /// Maximum size of the layer disks
    ///
    /// When it is reached, layers that nobody uses are removed, and then the spans of other layers that were not read for the longest time:
    /// they are fetched again when they are read. What is being read, pinned images and layers with a loop device stay. Default: no limit.
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes)]
    disk_limit: Option<u64>,
    /// Free space to leave, e.g. 10GiB or 10%
    ///
    /// It is that of the file system of the state directory. When other programs take it, layers and spans are removed as for --disk-limit.
    /// Default: none.
    #[arg(long, value_name = "BYTES|%", value_parser = quantity::reserve)]
    disk_reserve: Option<DiskReserve>,
}

impl DiskArgs {
    pub(in crate::cli) fn limits(&self) -> DiskLimits {
        DiskLimits {
            limit: self.disk_limit,
            reserve: self.disk_reserve,
        }
    }
}
