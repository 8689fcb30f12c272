//! The interface of a disk for its servers: NBD, and FUSE.

use std::{io, ops::Range, os::fd::BorrowedFd, sync::Arc};

use futures_util::future::BoxFuture;

use super::Disk;
use crate::{error::Error, layer::types::Allocation, units::DiskOffset};

/// What is served: a disk's bytes, of which some have to be fetched first.
pub trait ServedDisk: Send + Sync + 'static {
    /// Bytes of the disk; does not change.
    fn size(&self) -> u64;

    /// Whether a read of this range needs no fetch. Called for every request: cheap, and does not block.
    fn is_present(&self, range: Range<DiskOffset>) -> bool;

    /// Reads a range that is present. May block on the local disk, not on the network. An error of
    /// kind `Interrupted`: a part of it has gone since it was made present.
    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()>;

    /// As [`ServedDisk::read_present`] where that need not wait for the local disk; false where it must, and then nothing is read. The
    /// reading may begin with this, so that the waits of several overlap.
    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_present(offset, buffer).map(|()| true)
    }

    /// Whether a read of a range that is present would have to wait for the local disk. Then the reading has begun.
    fn would_wait(&self, _range: Range<DiskOffset>) -> bool {
        false
    }

    /// Moves a range that is present into a pipe with room for it, as references to the page cache. False where that cannot be done, and
    /// after an error, the pipe may have a part of it. May block on the local disk. An error as in [`ServedDisk::read_present`].
    fn splice_present(&self, _range: Range<DiskOffset>, _pipe: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(false)
    }

    /// Makes a range present. Dropped when nobody waits any more.
    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>>;

    /// The extents of a range that is not empty, in order, none empty, together as long as the range.
    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)>;
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
