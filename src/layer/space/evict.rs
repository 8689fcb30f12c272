//! Makes room on the local disk: removes layers that nobody uses, and then the least recently used spans of those in use.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::budget::{Budget, DiskLimits, Reservation};
use crate::{layer::locked::locked, units::SpanId};

/// Interval in which the free space of the file system is compared with the reserve: other programs write there, too.
const INTERVAL: Duration = Duration::from_secs(1);

/// More bytes than needed are removed at once, because each removal syncs records: this part of the limit, and at most [`MOST_AHEAD`].
const AHEAD: u64 = 16;
const MOST_AHEAD: u64 = 64 << 20;

/// Attempts of one write to make room.
const ATTEMPTS: usize = 3;

/// An open disk whose spans can be evicted.
pub(crate) trait Evictable: Send + Sync {
    /// Calls `found` for each span that can be evicted now, with its age and its bytes.
    fn candidates(&self, now: u32, found: &mut dyn FnMut(u32, SpanId, u64));

    /// Removes the bytes of these spans, and returns how many there were. 0: the disk is held, or, without `wait`, being synced.
    fn evict(&self, spans: &[SpanId], wait: bool) -> io::Result<u64>;
}

/// Removes layers that nobody uses, the least recently used one first, until this many bytes are removed or none is left. Returns how many
/// bytes were removed.
type RemoveUnused = Box<dyn Fn(u64) -> u64 + Send + Sync>;

/// What was evicted since the store was opened, and the state of the limits.
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
pub struct SpaceStatus {
    /// The limits.
    pub limits: DiskLimits,
    /// Bytes of all disks; 0 without a limit.
    pub used_bytes: u64,
    /// Bytes that can be written before something has to be removed; negative: so many have to be removed. `None`: there is no limit.
    pub room_bytes: Option<i64>,
    /// Spans that were evicted.
    pub evicted_spans: u64,
    /// Bytes that were removed: spans, and layers that nobody used.
    pub evicted_bytes: u64,
    /// The last write found no room, and nothing could be removed.
    pub is_full: bool,
}

/// The space of a root's disks.
pub(crate) struct Space {
    budget: Arc<Budget>,
    open: Mutex<Vec<Weak<dyn Evictable>>>,
    remove_unused: OnceLock<RemoveUnused>,
    /// Held while room is made.
    evicting: Mutex<()>,
    evicted_spans: AtomicU64,
    evicted_bytes: AtomicU64,
    is_full: AtomicBool,
}

impl Space {
    pub(crate) fn new(budget: Budget) -> Arc<Self> {
        Arc::new(Self {
            budget: Arc::new(budget),
            open: Mutex::default(),
            remove_unused: OnceLock::new(),
            evicting: Mutex::default(),
            evicted_spans: AtomicU64::new(0),
            evicted_bytes: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
        })
    }

    pub(crate) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Adds an open disk.
    pub(crate) fn opened(&self, disk: Weak<dyn Evictable>) {
        let mut open = locked(&self.open);
        open.retain(|disk| disk.strong_count() > 0);
        open.push(disk);
    }

    /// Sets how layers are removed that nobody uses. Only the first call counts.
    pub(crate) fn set_remove_unused(&self, remove: RemoveUnused) {
        let _ = self.remove_unused.set(remove);
    }

    pub(crate) fn status(&self) -> SpaceStatus {
        let is_on = self.budget.is_on();
        SpaceStatus {
            limits: self.budget.limits(),
            used_bytes: self.budget.used(),
            room_bytes: is_on.then(|| self.budget.room()),
            evicted_spans: self.evicted_spans.load(Ordering::Relaxed),
            evicted_bytes: self.evicted_bytes.load(Ordering::Relaxed),
            is_full: is_on && self.is_full.load(Ordering::Relaxed),
        }
    }

    /// Reserves bytes for a write, and makes room for them if necessary. `Ok(None)`: there is no limit. An error: nothing can be removed.
    /// Blocks on local files.
    pub(crate) fn reserve(&self, bytes: u64) -> io::Result<Option<Reservation>> {
        if !self.budget.is_on() {
            return Ok(None);
        }
        for attempt in 0..=ATTEMPTS {
            if let Some(reservation) = self.budget.reserve(bytes) {
                self.is_full.store(false, Ordering::Relaxed);
                return Ok(Some(reservation));
            }
            if attempt == ATTEMPTS
                || self.make_room(bytes) == 0 && self.budget.room() < signed(bytes)
            {
                break;
            }
        }
        self.is_full.store(true, Ordering::Relaxed);
        Err(io::Error::new(
            io::ErrorKind::StorageFull,
            "the limit of the local disk is reached (--disk-limit, --disk-reserve), and all that is stored is in use; raise the limit, or detach images",
        ))
    }

    /// Whether this many bytes have room now.
    pub(crate) fn fits(&self, bytes: u64) -> bool {
        !self.budget.is_on() || self.budget.room() >= signed(bytes)
    }

    /// Removes what is above the limits.
    fn shrink(&self) {
        if self.budget.is_on() && self.budget.room() < 0 && self.make_room(0) == 0 {
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// Removes so much that this many bytes have room, and some more. Returns how many bytes were removed.
    fn make_room(&self, bytes: u64) -> u64 {
        let _evicting = locked(&self.evicting);
        let missing = signed(bytes).saturating_sub(self.budget.room());
        let Ok(missing @ 1..) = u64::try_from(missing) else {
            return 0; // another thread has made room meanwhile
        };
        let limit = self.budget.limits().limit;
        let ahead = limit.map_or(MOST_AHEAD, |limit| (limit / AHEAD).min(MOST_AHEAD));
        let goal = missing.saturating_add(ahead);
        let mut removed = self.remove_unused.get().map_or(0, |remove| remove(goal));
        if removed < missing {
            removed += self.evict_spans(goal - removed, false);
        }
        if removed == 0 {
            removed = self.evict_spans(goal, true);
        }
        self.evicted_bytes.fetch_add(removed, Ordering::Relaxed);
        removed
    }

    /// Evicts the spans that were not used for the longest time.
    fn evict_spans(&self, goal: u64, wait: bool) -> u64 {
        let disks: Vec<_> = locked(&self.open)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        let mut oldest = Oldest::new(goal);
        let now = self.budget.now();
        for (index, disk) in disks.iter().enumerate() {
            disk.candidates(now, &mut |age, span, bytes| {
                oldest.add(SpanOfDisk {
                    age,
                    disk: index,
                    span,
                    bytes,
                });
            });
        }
        let mut removed = 0;
        for (index, spans) in oldest.by_disk() {
            match disks[index].evict(&spans, wait) {
                Ok(0) => {}
                Ok(bytes) => {
                    removed += bytes;
                    let count = spans.len() as u64;
                    self.evicted_spans.fetch_add(count, Ordering::Relaxed);
                }
                Err(error) => tracing::warn!("spans cannot be evicted: {error}"),
            }
        }
        removed
    }
}

/// Compares the limits with the file system from time to time, as long as the space exists.
pub(crate) fn watch(space: &Arc<Space>) -> io::Result<()> {
    let space = Arc::downgrade(space);
    let work = move || {
        while let Some(space) = space.upgrade() {
            space.budget.tick();
            space.shrink();
            drop(space);
            thread::sleep(INTERVAL);
        }
    };
    let builder = thread::Builder::new().name("space".to_owned());
    builder.spawn(work).map(drop)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SpanOfDisk {
    age: u32,
    disk: usize,
    span: SpanId,
    bytes: u64,
}

/// The oldest of all added spans, as few as have `goal` bytes together.
struct Oldest {
    goal: u64,
    bytes: u64,
    /// The youngest is on top.
    spans: BinaryHeap<Reverse<SpanOfDisk>>,
}

impl Oldest {
    fn new(goal: u64) -> Self {
        Self {
            goal,
            bytes: 0,
            spans: BinaryHeap::new(),
        }
    }

    fn add(&mut self, span: SpanOfDisk) {
        self.bytes = self.bytes.saturating_add(span.bytes);
        self.spans.push(Reverse(span));
        while let Some(Reverse(youngest)) = self.spans.peek()
            && self.bytes - youngest.bytes >= self.goal
        {
            self.bytes -= youngest.bytes;
            self.spans.pop();
        }
    }

    /// The spans of each disk, ascending.
    fn by_disk(self) -> Vec<(usize, Vec<SpanId>)> {
        let spans = self.spans.into_iter().map(|Reverse(span)| span);
        let mut spans: Vec<_> = spans.map(|span| (span.disk, span.span)).collect();
        spans.sort_unstable();
        let disks = spans.chunk_by(|(one, _), (other, _)| one == other);
        disks
            .map(|spans| (spans[0].0, spans.iter().map(|(_, span)| *span).collect())) // no group is empty
            .collect()
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(age: u32, disk: usize, number: u32, bytes: u64) -> SpanOfDisk {
        SpanOfDisk {
            age,
            disk,
            span: SpanId(number),
            bytes,
        }
    }

    #[test]
    fn as_few_as_needed_of_the_oldest_are_taken() {
        let mut oldest = Oldest::new(100);
        for added in [
            span(5, 0, 1, 60),
            span(9, 1, 7, 50),
            span(1, 0, 2, 200),
            span(7, 1, 6, 50),
            span(8, 0, 3, 10),
        ] {
            oldest.add(added);
        }
        // 9 and 8 have 60 bytes, and 7 is needed
        let taken = oldest.by_disk();
        assert_eq!(
            taken,
            [(0, vec![SpanId(3)]), (1, vec![SpanId(6), SpanId(7)])]
        );
        assert_eq!(Oldest::new(1).by_disk(), []);
    }

    #[test]
    fn a_single_old_span_may_be_enough() {
        let mut oldest = Oldest::new(10);
        for number in 0..1000 {
            oldest.add(span(number, 0, number, 10));
        }
        assert_eq!(oldest.by_disk(), [(0, vec![SpanId(999)])]);
    }
}
