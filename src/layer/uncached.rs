//! A file whose content is cached by whoever reads the device, and shall not be in the page cache a second time.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    num::NonZeroU64,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{Advice, FsWord},
    io::{Errno, ReadWriteFlags},
};

/// `RWF_DONTCACHE` of `linux/fs.h`, from Linux 6.14: what is read does not stay in the page cache.
const RWF_DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// A file, open for reading, and what its kernel and file system have been seen to do.
pub(super) struct UncachedFile {
    file: File,
    /// Whether the kernel can read the file and not keep it in the page cache.
    drops_behind: AtomicBool,
    /// Whether the kernel can say that a read would wait.
    knows_waits: AtomicBool,
    /// Whether the file's page cache is all that there is of it.
    is_memory: bool,
}

impl UncachedFile {
    pub(super) fn new(file: File) -> Self {
        Self {
            is_memory: rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC),
            file,
            drops_behind: AtomicBool::new(true),
            knows_waits: AtomicBool::new(true),
        }
    }

    /// The file itself.
    pub(super) fn get(&self) -> &File {
        &self.file
    }

    /// Reads past the page cache where the kernel can. Data that is not on the disk yet is served from there all the same.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() && self.drops_behind.load(Ordering::Relaxed) {
            let rest = &mut [IoSliceMut::new(&mut buffer[done..])];
            let position = offset + done as u64;
            match rustix::io::preadv2(&self.file, rest, position, RWF_DONTCACHE) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // an older kernel, or a file system that cannot
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                    self.drops_behind.store(false, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if done == buffer.len() {
            return Ok(());
        }
        self.file
            .read_exact_at(&mut buffer[done..], offset + done as u64)?;
        self.forget(offset, buffer.len() as u64);
        Ok(())
    }

    /// The first half of a read that need not wait for the local disk, for [`Self::finish`] to end: so many bytes have come. `None`
    /// where it must wait: then nothing is read, but the kernel has begun to.
    pub(super) fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        if !self.knows_waits.load(Ordering::Relaxed) {
            return Some(0);
        }
        let drops_behind = self.drops_behind.load(Ordering::Relaxed);
        let mut flags = ReadWriteFlags::NOWAIT;
        flags.set(RWF_DONTCACHE, drops_behind);
        let length = buffer.len();
        let whole = &mut [IoSliceMut::new(buffer)];
        let done = match rustix::io::preadv2(&self.file, whole, offset, flags) {
            Err(Errno::AGAIN) => return None,
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            // a kernel or a file system that knows no such flag, or a disk that fails: waiting shows which
            Err(_) => {
                self.knows_waits.store(drops_behind, Ordering::Relaxed);
                0
            }
        };
        if done == length && !drops_behind {
            self.forget(offset, length as u64);
        }
        Some(done)
    }

    /// Reads what [`Self::try_read`] has not: what came is dropped behind and must not be read twice, the rest is waited for.
    pub(super) fn finish(&self, offset: u64, buffer: &mut [u8], done: usize) -> io::Result<()> {
        if done < buffer.len() {
            self.read(offset + done as u64, &mut buffer[done..])?;
        }
        Ok(())
    }

    /// Drops a range from the page cache.
    pub(super) fn forget(&self, offset: u64, length: u64) {
        if self.is_memory {
            return;
        }
        // advice: what cannot be dropped stays
        let length = NonZeroU64::new(length);
        let _ = rustix::fs::fadvise(&self.file, offset, length, Advice::DontNeed);
    }
}
