//! Sets the kernel's read-ahead of a disk's device.

use std::sync::Once;

use crate::{
    kernel::blockdev,
    layer::{Disk, Progress},
};

/// A lazy device's: its spans by this number, so that one read in so many costs a span that nobody asked for; and no less than the least.
const SPANS_BY_READ_AHEAD: u64 = 32;
const LEAST_KB: u64 = 32;
/// Of a device whose disk is complete, or will be without being asked: the kernel's usual value.
const USUAL_KB: u64 = 128;

/// The `read_ahead_kb` that a device of this disk should have.
pub(crate) fn of(disk: &Disk) -> u64 {
    match *disk.progress().borrow() {
        Progress::Lazy => {
            (disk.mean_span_bytes() / SPANS_BY_READ_AHEAD / 1024).clamp(LEAST_KB, USUAL_KB)
        }
        Progress::Filling | Progress::Full | Progress::Complete => USUAL_KB,
    }
}

/// Sets the read-ahead of a device, and its largest request where one is given, both in KiB. Without them it serves as well, only fetches
/// more than is asked for: so where they cannot be set (in a container `/sys` is often read-only) that is a warning, once in a process.
pub(super) fn set(device: &str, largest_request_kb: Option<u64>, read_ahead_kb: u64) {
    static WARNED: Once = Once::new();
    if let Err(error) = blockdev::set_read_ahead(device, largest_request_kb, read_ahead_kb) {
        WARNED.call_once(|| {
            tracing::warn!(
                "the kernel's read-ahead stays as it is, so that more may be fetched than is read; where /sys is read-only mount it \
                 writable: {}",
                error.report()
            );
        });
    }
}
