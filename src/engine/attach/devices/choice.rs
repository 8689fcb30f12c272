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

const MOVED: &str = "the disk became complete; before that: ";

/// Why a device of a disk that became complete is a loop device.
pub(super) fn moved(why: &str) -> String {
    format!("{MOVED}{why}")
}

/// Why a device was made, from a text that [`moved`] may have made of it.
pub(super) fn at_first(why: &str) -> &str {
    why.strip_prefix(MOVED).unwrap_or(why)
}
