//! How many bytes the disks of a root have on the local file system, and how many they may have.
//!
//! The sizes are those that the file system reports after each write. A write is preceded by a [`Reservation`], so that parallel writes do
//! not exceed the limit together.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use crate::{layer::locked::locked, oci::Digest};

/// A layer and the table of its disk.
pub(crate) type DiskName = (Digest, Digest);

/// What the disks of a root may have of the local file system.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
pub struct DiskLimits {
    /// Maximum number of bytes of all disks.
    pub limit: Option<u64>,
    /// What stays free on the file system of the root.
    pub reserve: Option<DiskReserve>,
}

/// Space of a file system that is not used.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum DiskReserve {
    /// A number of bytes.
    Bytes(u64),
    /// A share of the file system's size, from 0 to 100.
    Percent(u8),
}

impl DiskLimits {
    /// Whether there is any limit.
    pub fn is_on(&self) -> bool {
        self.limit.is_some() || self.reserve.is_some()
    }
}

/// The file system of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileSystemSpace {
    size: u64,
    available: u64,
}

#[derive(Default)]
struct Usage {
    disks: HashMap<DiskName, u64>,
    used: u64,
    /// Bytes of writes that have begun.
    reserved: u64,
    /// Bytes of disks that the kernel reads itself.
    held: u64,
}

/// The accounts of a root.
pub(crate) struct Budget {
    root: PathBuf,
    limits: Mutex<DiskLimits>,
    is_on: AtomicBool,
    usage: Mutex<Usage>,
    /// Counts the spans that were written, and the seconds: the time by which uses of spans are compared.
    clock: AtomicU32,
}

/// Bytes for a write that has begun; given back when it is dropped, after the disk was measured.
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new(root: PathBuf, limits: DiskLimits) -> Self {
        Self {
            root,
            is_on: AtomicBool::new(limits.is_on()),
            limits: Mutex::new(limits),
            usage: Mutex::default(),
            clock: AtomicU32::new(0),
        }
    }

    /// Whether there is any limit. Cheap.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    pub(crate) fn limits(&self) -> DiskLimits {
        *locked(&self.limits)
    }

    pub(crate) fn set_limits(&self, limits: DiskLimits) {
        *locked(&self.limits) = limits;
        self.is_on.store(limits.is_on(), Ordering::Relaxed);
    }

    /// The time of a use of a span.
    pub(crate) fn now(&self) -> u32 {
        self.clock.load(Ordering::Relaxed)
    }

    /// The time moves on: a span is written now, or a second has passed.
    pub(crate) fn tick(&self) -> u32 {
        self.clock.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Bytes of all disks.
    pub(crate) fn used(&self) -> u64 {
        locked(&self.usage).used
    }

    /// A disk has this many bytes; 0: it was removed.
    pub(crate) fn set(&self, disk: DiskName, bytes: u64) {
        let mut usage = locked(&self.usage);
        let before = match bytes {
            0 => usage.disks.remove(&disk),
            bytes => usage.disks.insert(disk, bytes),
        };
        usage.used = usage
            .used
            .saturating_sub(before.unwrap_or(0))
            .saturating_add(bytes);
    }

    /// Whether the kernel may read a disk of this size itself, so that its spans cannot be removed: as long as such disks have at most half
    /// of the limit. Then it is counted, until [`Self::end_hold`].
    pub(crate) fn may_hold(&self, bytes: u64) -> bool {
        let limit = locked(&self.limits).limit;
        let mut usage = locked(&self.usage);
        let held = usage.held.saturating_add(bytes);
        let is_allowed = limit.is_none_or(|limit| held <= limit / 2);
        if is_allowed {
            usage.held = held;
        }
        is_allowed
    }

    /// As [`Self::may_hold`], for a disk that the kernel does read.
    pub(crate) fn hold(&self, bytes: u64) {
        let mut usage = locked(&self.usage);
        usage.held = usage.held.saturating_add(bytes);
    }

    pub(crate) fn end_hold(&self, bytes: u64) {
        let mut usage = locked(&self.usage);
        usage.held = usage.held.saturating_sub(bytes);
    }

    /// How many bytes can be written without exceeding a limit. Negative: so many are to be removed.
    pub(crate) fn room(&self) -> i64 {
        self.room_of(&locked(&self.usage))
    }

    fn room_of(&self, usage: &Usage) -> i64 {
        let limits = self.limits();
        let room = |most: u64| signed(most).saturating_sub(signed(usage.reserved));
        let by_limit = limits
            .limit
            .map(|limit| room(limit).saturating_sub(signed(usage.used)));
        let by_reserve = limits
            .reserve
            .and_then(|reserve| Some((reserve, self.file_system()?)))
            .map(|(reserve, space)| {
                let reserve = match reserve {
                    DiskReserve::Bytes(bytes) => bytes,
                    DiskReserve::Percent(share) => space.size / 100 * u64::from(share),
                };
                room(space.available).saturating_sub(signed(reserve))
            });
        by_limit
            .into_iter()
            .chain(by_reserve)
            .min()
            .unwrap_or(i64::MAX)
    }

    /// Reserves bytes if there is room for them.
    pub(crate) fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let mut usage = locked(&self.usage);
        if self.room_of(&usage) < signed(bytes) {
            return None;
        }
        usage.reserved = usage.reserved.saturating_add(bytes);
        Some(Reservation {
            budget: Arc::clone(self),
            bytes,
        })
    }

    fn file_system(&self) -> Option<FileSystemSpace> {
        let stat = rustix::fs::statvfs(&self.root).ok()?;
        Some(FileSystemSpace {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut usage = locked(&self.budget.usage);
        usage.reserved = usage.reserved.saturating_sub(self.bytes);
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: Option<u64>, reserve: Option<DiskReserve>) -> Arc<Budget> {
        Arc::new(Budget::new("/".into(), DiskLimits { limit, reserve }))
    }

    fn disk(number: u8) -> DiskName {
        (Digest::new([number; 32]), Digest::new([number; 32]))
    }

    #[test]
    fn what_is_reserved_and_what_is_used_leave_the_rest() {
        let budget = budget(Some(100), None);
        budget.set(disk(1), 40);
        budget.set(disk(2), 30);
        budget.set(disk(1), 20);
        assert_eq!((budget.used(), budget.room()), (50, 50));
        let first = budget.reserve(30).unwrap();
        assert!(budget.reserve(21).is_none());
        let second = budget.reserve(20).unwrap();
        assert_eq!(budget.room(), 0);
        budget.set(disk(2), 60);
        drop((first, second));
        assert_eq!(budget.room(), 20);
        budget.set(disk(3), 50);
        assert_eq!(budget.room(), -30);
        budget.set(disk(3), 0);
        budget.set(disk(3), 0);
        assert_eq!(budget.used(), 80);
    }

    #[test]
    fn the_reserve_counts_what_the_file_system_has_left() {
        assert!(budget(None, Some(DiskReserve::Percent(0))).room() > 0);
        assert!(budget(None, Some(DiskReserve::Percent(100))).room() <= 0);
        assert!(budget(None, Some(DiskReserve::Bytes(u64::MAX))).room() < 0);
        let both = budget(Some(7), Some(DiskReserve::Bytes(0)));
        assert_eq!(both.room(), 7);
        assert_eq!(budget(None, None).room(), i64::MAX);
        assert!(!budget(None, None).is_on());
    }

    #[test]
    fn disks_that_the_kernel_reads_itself_have_half_of_the_limit() {
        let budget = budget(Some(100), None);
        assert!(budget.may_hold(40));
        assert!(!budget.may_hold(11));
        assert!(budget.may_hold(10));
        budget.hold(100);
        budget.end_hold(100);
        budget.end_hold(40);
        assert!(budget.may_hold(40));
    }
}
