//! Reads of ranges that are present.

use std::{io, ops::Range, os::fd::BorrowedFd};

use super::Disk;
use crate::units::DiskOffset;

impl Disk {
    /// Reads a range that is present, without leaving it in the page cache where the kernel can do that.
    pub fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.notice(offset, buffer.len());
        let read = self.reader.read(offset, buffer);
        read.inspect_err(|error| self.cannot_be_read(offset, error))
    }

    /// As [`Self::read_present`] if the read need not wait for the local disk. Else false: nothing was read, but the kernel has begun to, so
    /// that the waits of several reads overlap.
    pub fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let read = self.reader.try_read(offset, buffer);
        let is_read = read.inspect_err(|error| self.cannot_be_read(offset, error))?;
        if is_read {
            self.notice(offset, buffer.len());
        }
        Ok(is_read)
    }

    /// Whether a read of a range that is present would have to wait for the local disk. Then the kernel has begun with it.
    pub fn would_wait(&self, range: &Range<DiskOffset>) -> bool {
        let length = range.end.get().saturating_sub(range.start.get());
        self.reader.file().would_wait(range.start.get(), length)
    }

    /// Moves a range that is present into a pipe, as references to the page cache. False where that cannot be done: for a file system that
    /// has no splice, and for spans that are in memory only.
    pub fn splice_present(
        &self,
        range: &Range<DiskOffset>,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        let length = range.end.get().saturating_sub(range.start.get());
        self.notice(range.start, length as usize); // of one request
        let spliced = self.reader.splice(range, pipe);
        spliced.inspect_err(|error| self.cannot_be_read(range.start, error))
    }

    /// Tells a read to the recording and to the read-ahead.
    fn notice(&self, offset: DiskOffset, length: usize) {
        let range: Range<_> = offset..DiskOffset(offset.get().saturating_add(length as u64));
        self.record_touch(&range);
        if !self.is_full() && self.ahead.is_reached(&range) {
            // it is not dropped while it is used
            if let Some(me) = self.me.upgrade() {
                me.read_ahead(&range, None);
            }
        }
    }
}
