//! What is read from a disk and fetched for it: counted for the disk, and for the process ([`crate::metrics`]).

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    layer::{locked::locked, types::DiskCounters},
    metrics::{Counter, METRICS, SAMPLED},
};

/// The counters of one disk.
#[derive(Default)]
pub(crate) struct DiskActivity {
    reads: Counter,
    read_bytes: Counter,
    waits: Counter,
    wait_ns: Counter,
    fetches: Counter,
    fetched_bytes: Counter,
    first_reads: FirstReads,
}

/// The first read of file data after an attach, which ends the wait of its user. Shared by the disks of the attachment.
pub struct FirstRead {
    began: Instant,
    is_done: AtomicBool,
}

impl FirstRead {
    /// Of an attach that began at this time.
    pub fn since(began: Instant) -> Arc<Self> {
        Arc::new(Self {
            began,
            is_done: AtomicBool::new(false),
        })
    }

    fn done(&self) {
        if !self.is_done.swap(true, Ordering::Relaxed) {
            METRICS.attach_first_byte.observe(self.began.elapsed());
        }
    }
}

/// The attachments that wait for the first read of a disk.
#[derive(Default)]
struct FirstReads {
    are_awaited: AtomicBool,
    attachments: Mutex<Vec<Weak<FirstRead>>>,
}

impl DiskActivity {
    pub(super) fn counters(&self) -> DiskCounters {
        DiskCounters {
            reads: self.reads.get(),
            read_bytes: self.read_bytes.get(),
            waits: self.waits.get(),
            wait_ms: self.wait_ns.get() / 1_000_000,
            fetches: self.fetches.get(),
            fetched_bytes: self.fetched_bytes.get(),
        }
    }

    /// The start of a read of present data, if this read is timed.
    pub(super) fn begin_read(&self) -> Option<Instant> {
        self.reads.get().is_multiple_of(SAMPLED).then(Instant::now)
    }

    /// A read of present data was answered.
    pub(super) fn has_read(&self, length: u64, began: Option<Instant>) {
        self.reads.add(1);
        self.read_bytes.add(length);
        METRICS.reads.add(1);
        METRICS.read_bytes.add(length);
        if let Some(began) = began {
            METRICS.present.observe(began.elapsed());
        }
    }

    /// Waits for the first read of file data.
    pub(super) fn await_first_read(&self, first_read: &Arc<FirstRead>) {
        let mut attachments = locked(&self.first_reads.attachments);
        // those that have ended without a read
        attachments.retain(|attachment| attachment.strong_count() > 0);
        attachments.push(Arc::downgrade(first_read));
        self.first_reads.are_awaited.store(true, Ordering::Release);
    }

    /// Whether [`Self::has_read_data`] is to be called when file data was read.
    pub(super) fn awaits_first_read(&self) -> bool {
        self.first_reads.are_awaited.load(Ordering::Relaxed)
    }

    pub(super) fn has_read_data(&self) {
        let mut attachments = locked(&self.first_reads.attachments);
        self.first_reads.are_awaited.store(false, Ordering::Release);
        let alive = attachments.drain(..).filter_map(|it| it.upgrade());
        alive.for_each(|first_read| first_read.done());
    }

    /// A read has waited for absent data.
    pub(crate) fn waited(&self, time: Duration, is_ok: bool) {
        if !is_ok {
            METRICS.read_errors.count();
        }
        self.waits.add(1);
        self.wait_ns
            .add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        METRICS.absent.observe(time);
    }

    /// So many requests were made, and so many compressed bytes have arrived.
    pub(crate) fn fetched(&self, requests: u64, bytes: u64) {
        self.fetches.add(requests);
        self.fetched_bytes.add(bytes);
        METRICS.fetches.add(requests);
        METRICS.fetched_bytes.add(bytes);
    }
}
