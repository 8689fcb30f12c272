//! A file that must not be in the page cache, because the kernel already caches the device that is served from it.
//!
//! A random read uses `RWF_DONTCACHE` (Linux 6.14), which drops the read pages at once. For sequential reads that costs three to six times
//! the processor time of a plain read (`docs/performance.md`). So these are plain reads, and their pages are dropped later with
//! `POSIX_FADV_DONTNEED`, in aligned windows of the size of the largest folio: the kernel does not drop a folio that is only partly in the
//! range. The last few windows stay. On an older kernel random reads are handled in the same way: this works, but may wait for all
//! processors to release the pages.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    num::NonZeroU64,
    os::fd::BorrowedFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{Advice, FsWord},
    io::{Errno, ReadWriteFlags},
    pipe::{SpliceFlags, splice},
};

/// `RWF_DONTCACHE` of `linux/fs.h`, from Linux 6.14: what is read does not stay in the page cache.
const RWF_DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// Size of a window: a huge page, the largest size of a folio.
const WINDOW: u64 = 2 << 20;

/// Windows that stay: more than concurrent sequential readers.
const KEPT: usize = 8;

/// A file, open for reading, and what its kernel and file system support.
pub(crate) struct UncachedFile {
    file: File,
    /// Whether reads can bypass the page cache (`RWF_DONTCACHE`).
    drops_behind: AtomicBool,
    /// Whether the kernel can tell that a read would wait (`RWF_NOWAIT`).
    knows_waits: AtomicBool,
    /// Whether the file system can move pages into a pipe.
    can_splice: AtomicBool,
    /// Whether the file is in memory only (tmpfs).
    is_memory: bool,
    recent: Mutex<RecentReads>,
}

/// The windows of the last reads. The oldest is the next to be replaced.
#[derive(Default)]
struct RecentReads {
    windows: [Option<ReadWindow>; KEPT],
    oldest: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReadWindow {
    /// Index of the window in the file.
    number: u64,
    /// Reads of it were cached.
    cached: bool,
}

impl RecentReads {
    /// Whether a read of this window continues others.
    fn is_near(&self, number: u64) -> bool {
        let mut windows = self.windows.iter().flatten();
        windows.any(|window| window.number == number || window.number + 1 == number)
    }

    /// Records a read. Returns the window that it replaces.
    fn note(&mut self, read: ReadWindow) -> Option<ReadWindow> {
        let mut windows = self.windows.iter_mut().flatten();
        if let Some(window) = windows.find(|window| window.number == read.number) {
            window.cached |= read.cached;
            return None;
        }
        let place = &mut self.windows[self.oldest]; // below KEPT
        self.oldest = (self.oldest + 1) % KEPT;
        place.replace(read)
    }
}

impl UncachedFile {
    pub(crate) fn new(file: File) -> Self {
        Self {
            is_memory: rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC),
            file,
            drops_behind: AtomicBool::new(true),
            knows_waits: AtomicBool::new(true),
            can_splice: AtomicBool::new(true),
            recent: Mutex::default(),
        }
    }

    /// The file itself.
    pub(crate) fn get(&self) -> &File {
        &self.file
    }

    /// Reads, and leaves no more than the last windows in the page cache. Data that is not synced yet is read from there, and stays.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.finish(offset, buffer, 0)
    }

    /// The first part of a read that need not wait for the local disk, to be completed by [`Self::finish`]: the number of bytes read.
    /// `None`: it would wait. Then nothing was read, but the kernel has started to read.
    pub(crate) fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        if !self.knows_waits.load(Ordering::Relaxed) {
            return Some(0);
        }
        let flags = self.flags(offset);
        let whole = &mut [IoSliceMut::new(buffer)];
        match rustix::io::preadv2(&self.file, whole, offset, flags | ReadWriteFlags::NOWAIT) {
            Err(Errno::AGAIN) => None,
            Ok(count) => Some(count),
            Err(Errno::INTR) => Some(0),
            // a kernel or file system without this flag, or a failing disk: the waiting read shows which
            Err(_) => {
                self.knows_waits.store(!flags.is_empty(), Ordering::Relaxed);
                Some(0)
            }
        }
    }

    /// Reads the bytes that [`Self::try_read`] has not read: its pages may be dropped already, and are not read twice.
    pub(crate) fn finish(&self, offset: u64, buffer: &mut [u8], mut done: usize) -> io::Result<()> {
        let mut flags = self.flags(offset);
        while done < buffer.len() {
            let rest = &mut [IoSliceMut::new(&mut buffer[done..])];
            match rustix::io::preadv2(&self.file, rest, offset + done as u64, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // an older kernel or a file system without this flag
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) if !flags.is_empty() => {
                    self.drops_behind.store(false, Ordering::Relaxed);
                    flags = ReadWriteFlags::empty();
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.drop_behind(offset, buffer.len() as u64, flags.is_empty());
        Ok(())
    }

    /// Whether moving a range into a pipe would wait for the local disk. Then the kernel has started to read it.
    pub(crate) fn would_wait(&self, offset: u64, length: u64) -> bool {
        if !self.knows_waits.load(Ordering::Relaxed) || !self.can_splice.load(Ordering::Relaxed) {
            return false;
        }
        let byte = &mut [0];
        let byte = &mut [IoSliceMut::new(byte)];
        match rustix::io::preadv2(&self.file, byte, offset, ReadWriteFlags::NOWAIT) {
            Err(Errno::AGAIN) => {
                // for sequential reads the kernel has its own read-ahead, which is longer than this range
                if !self.recent().is_near(offset / WINDOW) {
                    let advice = Advice::WillNeed;
                    let _ =
                        rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), advice);
                }
                true
            }
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                self.knows_waits.store(false, Ordering::Relaxed);
                false
            }
            // `splice` returns the error
            Ok(_) | Err(_) => false,
        }
    }

    /// Moves a range into a pipe with room for it, as references to the page cache, and drops the pages of an old read. Returns false if the
    /// file system cannot do that; then the pipe has nothing of the range.
    pub(crate) fn splice(
        &self,
        offset: u64,
        length: u64,
        pipe: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        if !self.can_splice.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut at = offset;
        let end = offset + length;
        while at < end {
            let (left, flags) = ((end - at) as usize, SpliceFlags::NONBLOCK); // of one request
            match splice(&self.file, Some(&mut at), pipe, None, left, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) if at == offset => {
                    self.can_splice.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.drop_behind(offset, length, true);
        Ok(true)
    }

    /// The flags of a read at this offset.
    fn flags(&self, offset: u64) -> ReadWriteFlags {
        let near = || self.recent().is_near(offset / WINDOW);
        if !self.drops_behind.load(Ordering::Relaxed) || near() {
            ReadWriteFlags::empty()
        } else {
            RWF_DONTCACHE
        }
    }

    /// Records a read, and drops the pages of an old one.
    fn drop_behind(&self, offset: u64, length: u64, cached: bool) {
        if self.is_memory || length == 0 {
            return;
        }
        for number in offset / WINDOW..=(offset + (length - 1)) / WINDOW {
            let before = self.recent().note(ReadWindow { number, cached });
            if let Some(before) = before.filter(|before| before.cached) {
                self.forget(before.number * WINDOW, WINDOW);
            }
        }
    }

    fn recent(&self) -> MutexGuard<'_, RecentReads> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops a range from the page cache, with the rest of the windows at its ends. Data that is not synced yet stays.
    pub(crate) fn forget(&self, offset: u64, length: u64) {
        if self.is_memory {
            return;
        }
        let start = offset - offset % WINDOW;
        let end = offset.saturating_add(length);
        let length = NonZeroU64::new(end.checked_next_multiple_of(WINDOW).unwrap_or(end) - start);
        // advisory: pages that cannot be dropped stay
        let _ = rustix::fs::fadvise(&self.file, start, length, Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn the_last_windows_are_kept() {
        let read = |number, cached| ReadWindow { number, cached };
        let mut recent = RecentReads::default();
        for number in (0..KEPT as u64).map(|index| index * 10) {
            assert!(!recent.is_near(number));
            assert_eq!(recent.note(read(number, false)), None);
            assert!(recent.is_near(number) && recent.is_near(number + 1));
        }
        assert_eq!(recent.note(read(10, true)), None);
        assert_eq!(recent.note(read(101, true)), Some(read(0, false)));
        assert!(!recent.is_near(0));
        assert_eq!(recent.note(read(101, false)), None);
        assert_eq!(recent.note(read(102, false)), Some(read(10, true)));
    }

    #[test]
    fn what_is_read_in_any_way_is_the_files_content() {
        let bytes: Vec<u8> = (0..5_000_000_u32)
            .map(|number| (number % 253) as u8)
            .collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let uncached = UncachedFile::new(file.reopen().unwrap());
        let mut buffer = vec![0; 700_001];
        for start in (0..4_300_000).step_by(345_679) {
            let expected = &bytes[start..start + buffer.len()];
            uncached.read(start as u64, &mut buffer).unwrap();
            assert!(buffer == expected);
            buffer.fill(0);
            let done = uncached.try_read(start as u64, &mut buffer).unwrap_or(0);
            uncached.finish(start as u64, &mut buffer, done).unwrap();
            assert!(buffer == expected);
        }
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut reader = File::from(reader);
        for start in (0..4_900_000).step_by(345_679) {
            let _ = uncached.would_wait(start, 40_001);
            assert!(uncached.splice(start, 40_001, writer.as_fd()).unwrap());
            let mut buffer = [0; 40_001];
            reader.read_exact(&mut buffer).unwrap();
            assert!(buffer[..] == bytes[start as usize..][..40_001]);
        }
        let past_the_end = uncached.splice(4_990_000, 40_001, writer.as_fd());
        assert_eq!(
            past_the_end.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let past_the_end = uncached.read(4_900_000, &mut buffer).unwrap_err();
        assert_eq!(past_the_end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
