//! Reads of ranges that are present.

use std::{io, ops::Range, os::fd::BorrowedFd, time::Instant};

use super::Disk;
use crate::units::DiskOffset;

impl Disk {
    /// Reads a range that is present, without leaving it in the page cache if the kernel supports that.
    pub fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.observe(offset, buffer.len());
        let began = self.activity.begin_read();
        let read = self.reader.read(offset, buffer);
        self.reader.used(&range(offset, buffer.len()));
        read.inspect_err(|error| self.report_read_error(offset, error))?;
        self.has_read(buffer.len() as u64, began);
        Ok(())
    }

    /// As [`Self::read_present`], if the read need not wait for the local disk. Else it returns false: nothing was read, but the kernel has
    /// started to read, so that the waits of several reads overlap.
    pub fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let began = self.activity.begin_read();
        let read = self.reader.try_read(offset, buffer);
        let is_read = read.inspect_err(|error| self.report_read_error(offset, error))?;
        if is_read {
            self.reader.used(&range(offset, buffer.len()));
            self.observe(offset, buffer.len());
            self.has_read(buffer.len() as u64, began);
        }
        Ok(is_read)
    }

    /// Whether a read of a range that is present would wait for the local disk. Then the kernel has started to read it.
    pub fn would_wait(&self, range: &Range<DiskOffset>) -> bool {
        let length = range.end.get().saturating_sub(range.start.get());
        self.reader.file().would_wait(range.start.get(), length)
    }

    /// Moves a range that is present into a pipe, as references to the page cache. Returns false if that is not possible: on a file system
    /// without splice, or if a span of the range is held in memory.
    pub fn splice_present(
        &self,
        range: &Range<DiskOffset>,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        let length = range.end.get().saturating_sub(range.start.get());
        self.observe(range.start, length as usize); // the length is that of one request
        let began = self.activity.begin_read();
        let spliced = self.reader.splice(range, pipe);
        let is_spliced = spliced.inspect_err(|error| self.report_read_error(range.start, error))?;
        if is_spliced {
            self.has_read(length, began);
        }
        Ok(is_spliced)
    }

    /// Counts a read that was answered.
    fn has_read(&self, length: u64, began: Option<Instant>) {
        self.activity.has_read(length, began);
        self.services().traffic().has_served();
    }

    /// Passes a read to the recording and to the read-ahead.
    fn observe(&self, offset: DiskOffset, length: usize) {
        let range = range(offset, length);
        self.record_touch(&range);
        if self.activity.awaits_first_read()
            && self.layout().regions().in_disk(&range).next().is_some()
        {
            self.activity.has_read_data();
        }
        if !self.is_full() && self.ahead.is_reached(&range) {
            // it succeeds: the caller has a reference
            if let Some(me) = self.me.upgrade() {
                me.read_ahead(&range, None);
            }
        }
    }
}

fn range(offset: DiskOffset, length: usize) -> Range<DiskOffset> {
    offset..DiskOffset(offset.get().saturating_add(length as u64))
}
