//! Chooses the kind of device for a disk.

use crate::{
    engine::attach::types::{DeviceChoice, DeviceKind},
    error::{Error, Kind, Result},
    kernel::nbd as kernel_nbd,
    layer::Disk,
};

/// Returns the kind and the reason for it.
pub(super) fn choose(disk: &Disk, choice: DeviceChoice) -> Result<(DeviceKind, String)> {
    let (kind, why) = match choice {
        DeviceChoice::Auto if disk.is_complete() => (DeviceKind::Loop, "the disk is complete"),
        DeviceChoice::Auto => match (disk.is_full(), kernel_nbd::is_available()) {
            (false, true) => (DeviceKind::Nbd, "spans are absent, and this kernel has nbd"),
            (false, false) => (
                DeviceKind::Fuse,
                "spans are absent, and this kernel has no nbd",
            ),
            (true, true) => (
                DeviceKind::Nbd,
                "the layer has not been checked as a whole, and this kernel has nbd",
            ),
            (true, false) => (
                DeviceKind::Fuse,
                "the layer has not been checked as a whole, and this kernel has no nbd",
            ),
        },
        DeviceChoice::Loop if !disk.is_complete() => {
            let (present, all) = disk.span_counts();
            let checked = match disk.is_full() {
                true => ", and the layer has not been checked as a whole",
                false => "",
            };
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "layer {}: {present} of {all} spans are present{checked}; a loop device needs a complete disk; use --device auto",
                    disk.layer().digest
                ),
            ));
        }
        DeviceChoice::Loop => (DeviceKind::Loop, "asked for"),
        DeviceChoice::Nbd => (DeviceKind::Nbd, "asked for"),
        DeviceChoice::Fuse => (DeviceKind::Fuse, "asked for"),
    };
    Ok((kind, why.to_owned()))
}
