//! Memory that each process with its descriptor can map: a memfd whose length is sealed.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::AtomicU32,
};

use rustix::{
    fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals},
    io::Errno,
    mm::{MapFlags, ProtFlags, mlock, mmap, munmap},
};

use crate::error::{Error, Kind, Result, ResultExt};

/// The memory cannot become shorter, so that no access of a mapping gives SIGBUS; and no process can take these seals away.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// A mapped memfd with a sealed length. It is accessed as atomic words, because other processes may have it mapped too.
#[derive(Debug)]
pub struct SharedMemory {
    memory: OwnedFd,
    start: NonNull<AtomicU32>,
    words: usize,
}

// SAFETY: the mapping belongs to this value and stays until it is dropped; all access is atomic or by the kernel.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory of so many words, all zero. The name is for `/proc`.
    pub fn create(name: &str, words: usize) -> Result<Self> {
        let context = || "making shared memory".to_owned();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            // the flag is from Linux 6.3
            Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
            made => made,
        }
        .or_kind(Kind::Io, context)?;
        rustix::fs::ftruncate(&memory, (words * size_of::<u32>()) as u64)
            .and_then(|()| fcntl_add_seals(&memory, SEALS))
            .or_kind(Kind::Io, context)?;
        Self::map(memory, words)
    }

    /// Memory that another process has made. It must have this many words, and its seals.
    pub fn open(memory: OwnedFd, words: usize) -> Result<Self> {
        let context = || "opening shared memory".to_owned();
        let stat = rustix::fs::fstat(&memory).or_kind(Kind::Io, context)?;
        let seals = match fcntl_get_seals(&memory) {
            Ok(seals) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => seals,
            _ => return Err(Error::new(Kind::Corrupt, "the descriptor is not a memfd")),
        };
        if !seals.contains(SEALS) {
            let why = "the length of the shared memory is not sealed";
            return Err(Error::new(Kind::Corrupt, why));
        }
        let bytes = words * size_of::<u32>();
        if u64::try_from(stat.st_size).ok() != Some(bytes as u64) {
            let why = format!(
                "the shared memory has {} bytes and not {bytes}",
                stat.st_size
            );
            return Err(Error::new(Kind::Corrupt, why));
        }
        Self::map(memory, words)
    }

    fn map(memory: OwnedFd, words: usize) -> Result<Self> {
        let length = words * size_of::<u32>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a place that nothing else has; the length of the file is sealed.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                &memory,
                0,
            )
        }
        .or_kind(Kind::Io, || "mapping shared memory".into())?;
        // the mapping is not at address zero, for the kernel has chosen its place
        let start = NonNull::new(start.cast())
            .ok_or_else(|| Error::new(Kind::Io, "mapping shared memory: no address"))?;
        Ok(Self {
            memory,
            start,
            words,
        })
    }

    /// Its words.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: the mapping has this many words, is aligned to a page, and lives as long as this value; atomics may be shared.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// Receives from a socket or a device into these words; the number of bytes. A received message is at its place although this process
    /// ends directly after the system call.
    pub fn receive(&self, from: impl AsFd, words: Range<usize>) -> io::Result<usize> {
        let place = self.words().get(words).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the kernel writes to the mapping, inside these words, of which no reference but to atomics exists.
        let count = unsafe {
            libc::read(
                from.as_fd().as_raw_fd(),
                place.as_ptr().cast_mut().cast(),
                size_of_val(place),
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Keeps the pages of these words in memory and in the page tables, so that the kernel's access to them waits for nothing.
    pub fn lock(&self, words: Range<usize>) -> io::Result<()> {
        let place = self.words().get(words).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the pages are of this mapping, and stay what they are.
        unsafe { mlock(place.as_ptr().cast_mut().cast(), size_of_val(place)) }?;
        Ok(())
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by this value, and no reference to it is left.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * size_of::<u32>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Seek, Write},
        sync::atomic::Ordering,
    };

    use super::*;

    #[test]
    fn what_is_written_is_seen_through_another_descriptor() {
        let memory = SharedMemory::create("test", 2048).unwrap();
        memory.words()[2047].store(7, Ordering::Release);
        let other = memory.as_fd().try_clone_to_owned().unwrap();
        let other = SharedMemory::open(other, 2048).unwrap();
        drop(memory);
        assert_eq!(other.words()[2047].load(Ordering::Acquire), 7);
        assert_eq!(other.words().len(), 2048);
        rustix::fs::ftruncate(&other, 0).unwrap_err();
    }

    #[test]
    fn a_message_is_received_in_its_place() {
        let (mut peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        let memory = SharedMemory::create("test", 8).unwrap();
        peer.write_all(&[1; 12]).unwrap();
        assert_eq!(memory.receive(&socket, 2..4).unwrap(), 8);
        assert_eq!(memory.receive(&socket, 7..8).unwrap(), 4);
        let words: Vec<u32> = memory
            .words()
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect();
        let one = 0x0101_0101;
        assert_eq!(words, [0, 0, one, one, 0, 0, 0, one]);
        memory.receive(&socket, 7..9).unwrap_err();
        memory.lock(0..8).unwrap();
        memory.lock(7..9).unwrap_err();
    }

    #[test]
    fn other_descriptors_are_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 64]).unwrap();
        file.rewind().unwrap();
        SharedMemory::open(file.into(), 16).unwrap_err();
        let unsealed = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 64).unwrap();
        let error = SharedMemory::open(unsealed, 16).unwrap_err();
        assert!(error.report().contains("not sealed"), "{}", error.report());
        let short = SharedMemory::create("test", 15).unwrap();
        let short = short.as_fd().try_clone_to_owned().unwrap();
        SharedMemory::open(short, 16).unwrap_err();
    }
}
