//! Chooses the kind of device for a disk.

use std::sync::Arc;

use crate::{
    engine::attach::types::{DeviceChoice, DeviceKind},
    error::{Error, Kind, Result},
    kernel::nbd as kernel_nbd,
    layer::{Disk, SpanHold},
};

/// A kind of device, the reason for it and, for a loop device, what keeps the spans of the disk.
pub(super) struct Choice {
    pub(super) kind: DeviceKind,
    pub(super) why: String,
    pub(super) hold: Option<SpanHold>,
}

/// Chooses the kind.
pub(super) fn choose(disk: &Arc<Disk>, choice: DeviceChoice) -> Result<Choice> {
    let mut hold = None;
    let (kind, why) = match choice {
        DeviceChoice::Auto if is_held(&mut hold, disk.hold_for_loop()) => {
            (DeviceKind::Loop, "the disk is complete")
        }
        DeviceChoice::Auto => match (disk.is_full(), kernel_nbd::is_available()) {
            (false, true) => (DeviceKind::Nbd, "spans are absent, and this kernel has nbd"),
            (false, false) => (
                DeviceKind::Fuse,
                "spans are absent, and this kernel has no nbd",
            ),
            (true, has_nbd) => (
                match has_nbd {
                    true => DeviceKind::Nbd,
                    false => DeviceKind::Fuse,
                },
                match disk.is_verified() {
                    true => "loop devices have half of the disk limit already",
                    false => "the layer has not been checked as a whole",
                },
            ),
        },
        DeviceChoice::Loop if !is_held(&mut hold, disk.hold_complete()) => {
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
    Ok(Choice {
        kind,
        why: why.to_owned(),
        hold,
    })
}

fn is_held(hold: &mut Option<SpanHold>, found: Option<SpanHold>) -> bool {
    *hold = found;
    hold.is_some()
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
