//! Makes the kernel read file system metadata in large requests.
//!
//! A directory takes one or two blocks, and listing it is one small request each. The blocks of the next directory are usually adjacent,
//! but the kernel does not know that. A request through a socket or a FUSE file costs several times as much as one to a plain disk. All
//! metadata of our disks is contiguous, after the files' data, and always present. So on the second read within a window of the metadata,
//! the kernel is asked (`posix_fadvise(2)`) to read the whole window into its page cache. The reads that this causes can trigger the same
//! request again; that ends by itself, because the kernel does not read cached pages again.

use std::{
    io,
    ops::Range,
    os::fd::BorrowedFd,
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

/// Size of a window in bytes.
const READAHEAD_WINDOW: u64 = 256 << 10;

/// The disk of a device. It observes the reads of metadata.
pub(crate) struct WatchedDisk {
    disk: Arc<Disk>,
    windows: Arc<ReadaheadWindows>,
    runtime: Handle,
}

impl WatchedDisk {
    /// Wraps a disk whose device does not exist yet.
    pub(crate) fn new(disk: Arc<Disk>, runtime: Handle) -> Self {
        Self {
            windows: Arc::new(ReadaheadWindows::of(disk.metadata())),
            disk,
            runtime,
        }
    }

    /// Sets the device. From now on the kernel is asked to read ahead.
    pub(crate) fn set_device(&self, device: &Arc<Node>) {
        *self.windows.device() = Some(Arc::clone(device));
    }

    /// Closes the device, because it is about to be released.
    pub(super) fn close_device(&self) {
        *self.windows.device() = None;
    }

    fn notice(&self, offset: DiskOffset, length: usize) {
        if let Some(window) = self.windows.wanted(offset.get(), length as u64) {
            let windows = Arc::clone(&self.windows);
            // Not on the thread that serves the device: the kernel may wait for a reply of that thread first.
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

    fn would_wait(&self, range: Range<DiskOffset>) -> bool {
        self.disk.would_wait(&range)
    }

    fn splice_present(&self, range: Range<DiskOffset>, pipe: BorrowedFd<'_>) -> io::Result<bool> {
        let is_spliced = self.disk.splice_present(&range, pipe)?;
        if is_spliced {
            let length = range.end.get().saturating_sub(range.start.get());
            self.notice(range.start, length as usize); // of one request
        }
        Ok(is_spliced)
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

/// Read counts for the windows of a disk's metadata.
struct ReadaheadWindows {
    metadata: Range<u64>,
    /// Number of reads, per window.
    reads: Box<[AtomicU32]>,
    /// Locked while the kernel is asked, which uses the open device.
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

    /// Counts a read. Returns the window that the kernel should read now.
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

    /// Asks the kernel to read a window, unless another request is in progress. Blocks until the kernel has submitted its reads.
    fn ask(&self, window: Range<u64>) {
        let Ok(device) = self.device.try_lock() else {
            return;
        };
        if let Some(device) = &*device
            && let Err(error) = blockdev::will_need(device, &window)
        {
            // the device works without read-ahead
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
