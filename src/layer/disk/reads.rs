//! Reads of ranges that are present.

use std::io;

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
