//! Reads of ranges that are present.

use std::{io, ops::Range, os::fd::BorrowedFd};

use super::Disk;
use crate::units::DiskOffset;

impl Disk {
    /// Reads a range that is present, without leaving it in the page cache where the kernel can do that.
    pub fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        let held = self.held(&range)?;
        self.notice(offset, buffer.len());
        let read = self.file.read(offset.get(), buffer);
        read.inspect_err(|error| self.cannot_be_read(offset, error))?;
        self.lay_over(&held, &range, buffer);
        Ok(())
    }

    /// As [`Self::read_present`], where that need not wait for the local disk. False where it must: then nothing is read, but the
    /// kernel has begun to, so that the waits of several reads overlap.
    pub fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let range = offset..DiskOffset(offset.get().saturating_add(buffer.len() as u64));
        let held = self.held(&range)?;
        let Some(done) = self.file.try_read(offset.get(), buffer) else {
            return Ok(false);
        };
        self.notice(offset, buffer.len());
        let read = self.file.finish(offset.get(), buffer, done);
        read.inspect_err(|error| self.cannot_be_read(offset, error))?;
        self.lay_over(&held, &range, buffer);
        Ok(true)
    }

    /// Whether a read of a range that is present would have to wait for the local disk. Then the kernel has begun with it.
    pub fn would_wait(&self, range: &Range<DiskOffset>) -> bool {
        let length = range.end.get().saturating_sub(range.start.get());
        self.file.would_wait(range.start.get(), length)
    }

    /// Moves a range that is present into a pipe, as references to the page cache. False where that cannot be done: for a file system that
    /// has no splice, and for spans that are in memory only.
    pub fn splice_present(
        &self,
        range: &Range<DiskOffset>,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        if !self.held(range)?.is_empty() {
            return Ok(false);
        }
        let (start, length) = (range.start.get(), range.end.get() - range.start.get());
        self.notice(range.start, length as usize); // of one request
        let spliced = self.file.splice(start, length, pipe);
        spliced.inspect_err(|error| self.cannot_be_read(range.start, error))
    }

    /// Tells a read to the recording and to the read-ahead.
    fn notice(&self, offset: DiskOffset, length: usize) {
        if self.services.recording().is_some() {
            let end = offset.get().saturating_add(length as u64);
            self.record(&(offset..DiskOffset(end)));
        }
        if !self.bitmap.is_full() {
            let range = offset..DiskOffset(offset.get().saturating_add(length as u64));
            if self.readahead.reaches(&range) {
                // it is not dropped while it is used
                if let Some(me) = self.me.upgrade() {
                    me.read_ahead(&range, None);
                }
            }
        }
    }

    /// Reads from `disk.ext4`, past the page cache where the kernel can.
    pub(in crate::layer) fn read_file(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, buffer)
    }
}
