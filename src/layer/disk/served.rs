//! The interface of a disk for its servers: NBD and FUSE.

use std::{
    io,
    ops::Range,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use super::Disk;
use crate::{error::Error, layer::types::Allocation, units::DiskOffset};

/// A disk whose bytes are served; some have to be fetched first.
pub trait ServedDisk: Send + Sync + 'static {
    /// Size of the disk; it does not change.
    fn size(&self) -> u64;

    /// Whether a read of this range needs no fetch. It is called for every request, is fast and does not block.
    fn is_present(&self, range: Range<DiskOffset>) -> bool;

    /// Reads a range that is present. It may wait for the local disk, but not for the network. An error of kind `Interrupted`: a part of
    /// the range is not present any more.
    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()>;

    /// As [`ServedDisk::read_present`], if the read need not wait for the local disk. Else it returns false: nothing was read, but the
    /// kernel may have started to read, so that the waits of several reads overlap.
    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_present(offset, buffer).map(|()| true)
    }

    /// Whether a read of a range that is present would wait for the local disk. Then the kernel has started to read it.
    fn would_wait(&self, _range: Range<DiskOffset>) -> bool {
        false
    }

    /// Moves a range that is present into a pipe with room for it, as references to the page cache. It returns false if that is not
    /// possible. After false or an error the pipe may have a part of the range. It may wait for the local disk. Errors are those of
    /// [`ServedDisk::read_present`].
    fn splice_present(&self, _range: Range<DiskOffset>, _pipe: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(false)
    }

    /// Makes a range present. The future is dropped when no request waits any more.
    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>>;

    /// The extents of a range that is not empty: ascending, none empty, together as long as the range.
    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)>;
}

/// The attempts of one read to make its range present and to read it. It needs more than one only if its spans are evicted, or removed from
/// memory, before it comes to them. Then other readers get theirs, so it goes on for as long as a read waits for a registry.
pub struct ReadAttempts {
    began: Instant,
    made: u32,
}

impl ReadAttempts {
    /// Attempts that a read has whatever time they take.
    const LEAST: u32 = 4;
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Those of a read that begins now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
            made: 0,
        }
    }

    /// Whether the read may make another attempt.
    pub fn another(&mut self) -> bool {
        self.made = self.made.saturating_add(1);
        self.made <= Self::LEAST || self.began.elapsed() < Self::PATIENCE
    }
}

impl ServedDisk for Disk {
    fn size(&self) -> u64 {
        Disk::size(self)
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        Disk::is_present(self, range)
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        Disk::read_present(self, offset, buffer)
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        Disk::try_read_present(self, offset, buffer)
    }

    fn would_wait(&self, range: Range<DiskOffset>) -> bool {
        Disk::would_wait(self, &range)
    }

    fn splice_present(&self, range: Range<DiskOffset>, pipe: BorrowedFd<'_>) -> io::Result<bool> {
        Disk::splice_present(self, &range, pipe)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move { Disk::make_present(&self, range).await })
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        Disk::allocation(self, range)
    }
}
