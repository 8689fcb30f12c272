//! How far the kernel reads ahead on the device of a disk.

use crate::layer::{Disk, Progress};

/// A lazy device's: its spans by this number, so that one read in so many costs a span that nobody asked for; and no less than the least.
const SPANS_BY_READ_AHEAD: u64 = 32;
const LEAST_KB: u64 = 32;
/// Of a device whose disk is complete, or will be without being asked: the kernel's usual value.
const USUAL_KB: u64 = 128;

/// The `read_ahead_kb` that a device of this disk should have.
pub(super) fn of(disk: &Disk) -> u64 {
    match *disk.progress().borrow() {
        Progress::Lazy => {
            (disk.mean_span_bytes() / SPANS_BY_READ_AHEAD / 1024).clamp(LEAST_KB, USUAL_KB)
        }
        Progress::Filling | Progress::Full | Progress::Complete => USUAL_KB,
    }
}
