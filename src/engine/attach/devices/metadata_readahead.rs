//! Metadata that a program goes through is read by the kernel in large pieces.
//!
//! A directory is a block or two, and a request of its own when a program lists it; the blocks of the next one lie beside it, but the
//! kernel does not know that. Through a socket or a FUSE file a request costs several times what it costs on a plain disk. On ours all
//! metadata stands together, behind the files' data, and is present. So the second read of a window of it has the kernel read all of
//! the window into its page cache, as `posix_fadvise(2)` asks it to. What it has there already it does not read again: that this is a read
//! too, and may ask for the same window, ends by itself.

use std::{
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;

use crate::{
    error::Error,
    kernel::blockdev::{self, Node},
    layer::{Allocation, Disk, ServedDisk},
    units::DiskOffset,
};

/// Bytes that the kernel is asked to read together.
const READAHEAD_WINDOW: u64 = 256 << 10;

/// A disk behind a device, whose reads of metadata are noticed.
pub(crate) struct WatchedDisk {
    disk: Arc<Disk>,
    windows: Arc<ReadaheadWindows>,
    runtime: Handle,
}

impl WatchedDisk {
    /// A disk whose device is not there yet.
    pub(crate) fn new(disk: Arc<Disk>, runtime: Handle) -> Self {
        Self {
            windows: Arc::new(ReadaheadWindows::of(disk.metadata())),
            disk,
            runtime,
        }
    }

    /// Names the device: from now on the kernel is asked.
    pub(crate) fn serves(&self, device: &Arc<Node>) {
        *self.windows.device() = Some(Arc::clone(device));
    }

    /// The device is about to go: from now on nothing here has it open.
    pub(super) fn serves_no_more(&self) {
        *self.windows.device() = None;
    }

    fn notice(&self, offset: DiskOffset, length: usize) {
        if let Some(window) = self.windows.wanted(offset.get(), length as u64) {
            let windows = Arc::clone(&self.windows);
            // not on a thread that answers the device: the kernel may wait for an answer first
            self.runtime.spawn_blocking(move || windows.ask(window));
        }
    }
}

impl ServedDisk for WatchedDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.disk.is_present(range)
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.read_present(offset, buffer)?;
        self.notice(offset, buffer.len());
        Ok(())
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let is_read = self.disk.try_read_present(offset, buffer)?;
        if is_read {
            self.notice(offset, buffer.len());
        }
        Ok(is_read)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        ServedDisk::make_present(Arc::clone(&self.disk), range)
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        self.disk.allocation(range)
    }
}

/// The windows of a disk's metadata.
struct ReadaheadWindows {
    metadata: Range<u64>,
    /// For each window how often it was read.
    reads: Box<[AtomicU32]>,
    /// Locked while the kernel is being asked, with the device open.
    device: Mutex<Option<Arc<Node>>>,
}

impl ReadaheadWindows {
    fn of(metadata: Range<DiskOffset>) -> Self {
        let metadata = metadata.start.get()..metadata.end.get();
        let count = (metadata.end - metadata.start).div_ceil(READAHEAD_WINDOW);
        Self {
            reads: (0..count).map(|_| AtomicU32::new(0)).collect(),
            metadata,
            device: Mutex::default(),
        }
    }

    /// Takes note of a read; gives the window that the kernel should read now.
    fn wanted(&self, offset: u64, length: u64) -> Option<Range<u64>> {
        if !self.metadata.contains(&offset) || length >= READAHEAD_WINDOW / 2 {
            return None;
        }
        let number = (offset - self.metadata.start) / READAHEAD_WINDOW;
        let reads = self.reads.get(number as usize)?;
        let is_second = reads.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        is_second.then(|| {
            let start = self.metadata.start + number * READAHEAD_WINDOW;
            start..self.metadata.end.min(start + READAHEAD_WINDOW)
        })
    }

    /// Asks the kernel, unless it is being asked; blocks until its requests are on their way.
    fn ask(&self, window: Range<u64>) {
        let Ok(device) = self.device.try_lock() else {
            return;
        };
        if let Some(device) = &*device
            && let Err(error) = blockdev::will_need(device, &window)
        {
            // it is none the worse for that
            tracing::debug!("metadata is not read ahead: {}", error.report());
        }
    }

    fn device(&self) -> MutexGuard<'_, Option<Arc<Node>>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 5000;

    fn windows() -> ReadaheadWindows {
        ReadaheadWindows::of(DiskOffset(START)..DiskOffset(START + 2 * READAHEAD_WINDOW + 100))
    }

    #[test]
    fn the_second_read_of_a_window_asks_for_it() {
        let windows = windows();
        let read = |offset| windows.wanted(offset, 4096);
        assert_eq!(read(START), None);
        assert_eq!(read(START + READAHEAD_WINDOW), None, "another window");
        assert_eq!(
            read(START + READAHEAD_WINDOW - 1),
            Some(START..START + READAHEAD_WINDOW)
        );
        assert_eq!(read(START + 4096), None, "once");
        assert_eq!(
            read(START + 8192),
            Some(START..START + READAHEAD_WINDOW),
            "dropped since"
        );
        let last = START + 2 * READAHEAD_WINDOW;
        assert_eq!(read(last), None);
        assert_eq!(read(last + 99), Some(last..last + 100), "to the end");
        for other in [0, START - 1, last + 100, u64::MAX] {
            assert_eq!((read(other), read(other)), (None, None), "no metadata");
        }
    }

    #[test]
    fn large_reads_do_not_count() {
        let windows = windows();
        for _ in 0..4 {
            assert_eq!(windows.wanted(START, READAHEAD_WINDOW / 2), None);
        }
        assert_eq!(windows.wanted(START, 4096), None);
        assert!(windows.wanted(START, 4096).is_some());
    }
}
