//! The kernel's read-ahead for the device of a disk.

use std::sync::Once;

use crate::{
    kernel::blockdev,
    layer::{Disk, DiskProgress},
};

/// The read-ahead of a lazy device is its mean span size divided by this number, so about one read in 32 fetches a span that no program
/// asked for.
const SPANS_BY_READ_AHEAD: u64 = 32;
/// Minimum read-ahead of a lazy device.
const LEAST_KB: u64 = 32;
/// The read-ahead of a device whose disk is complete or is being filled: the kernel's default.
const USUAL_KB: u64 = 128;

/// The `read_ahead_kb` for the device of this disk.
pub(crate) fn of(disk: &Disk) -> u64 {
    match *disk.progress().borrow() {
        DiskProgress::Lazy => {
            (disk.mean_span_bytes() / SPANS_BY_READ_AHEAD / 1024).clamp(LEAST_KB, USUAL_KB)
        }
        DiskProgress::Filling | DiskProgress::Full | DiskProgress::Complete => USUAL_KB,
    }
}

/// Sets the read-ahead of a device and, where given, its maximum request size, both in KiB. The device works without these settings, but
/// more data is fetched than programs read. So a failure (in a container `/sys` is often read-only) is only a warning, once per process.
pub(super) fn set(device: &str, largest_request_kb: Option<u64>, read_ahead_kb: u64) {
    static WARNED: Once = Once::new();
    if let Err(error) = blockdev::set_read_ahead(device, largest_request_kb, read_ahead_kb) {
        WARNED.call_once(|| {
            tracing::warn!(
                "cannot set the kernel's read-ahead, so more data may be fetched than programs read; if /sys is read-only, mount it \
                 writable: {}",
                error.report()
            );
        });
    }
}
