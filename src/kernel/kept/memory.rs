//! Memory that each process with its descriptor can map: a memfd whose length is sealed.

use std::{
    io,
    mem::{self, offset_of},
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU32, Ordering},
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

/// Words that [`SharedMemory::send`] needs for each message.
pub const MESSAGE_WORDS: usize = size_of::<libc::mmsghdr>() / size_of::<u32>();
/// In the words of a message: where the kernel writes the length of one that was sent.
pub const SENT_WORD: usize = offset_of!(libc::mmsghdr, msg_len) / size_of::<u32>();

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

    /// Sends messages to a Unix stream socket, and waits for the socket. Each message has [`MESSAGE_WORDS`] at `first` and after it. `begin` is
    /// called when all their [`SENT_WORD`]s are zero and nothing is sent; then the kernel sends each message and writes its length there, in one
    /// system call, which a kill does not interrupt in between. The messages must be as short as [`largest_message`] says: the kernel sends such
    /// a message as a whole or not at all.
    pub fn send(
        &self,
        socket: impl AsFd,
        first: usize,
        messages: &[&[u8]],
        begin: impl FnOnce(),
    ) -> io::Result<()> {
        let words = messages.len() * MESSAGE_WORDS;
        let place = self
            .words()
            .get(first..first + words)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let headers: *mut libc::mmsghdr = place.as_ptr().cast_mut().cast();
        if !headers.is_aligned() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut parts: Vec<libc::iovec> = messages
            .iter()
            .map(|message| libc::iovec {
                iov_base: message.as_ptr().cast_mut().cast(),
                iov_len: message.len(),
            })
            .collect();
        for (number, part) in parts.iter_mut().enumerate() {
            // SAFETY: numbers and pointers, for all of which zero is a value; some libraries have private fields here.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            // SAFETY: inside `place`, aligned. What another process writes there meanwhile can make the kernel send other bytes of this process, and
            // does not change its memory.
            unsafe { headers.add(number).write_volatile(header) };
        }
        begin();
        let mut done = 0;
        while done < messages.len() {
            let count = u32::try_from(messages.len() - done).unwrap_or(u32::MAX);
            // SAFETY: the headers, the parts and the messages live until the call returns; the kernel only reads the messages.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_fd().as_raw_fd(),
                    headers.add(done),
                    count,
                    libc::MSG_NOSIGNAL as _,
                )
            };
            match usize::try_from(sent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => done += sent,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        let sent = place.chunks_exact(MESSAGE_WORDS);
        let mut lengths = sent.map(|words| words[SENT_WORD].load(Ordering::Acquire) as usize);
        match messages
            .iter()
            .all(|message| lengths.next() == Some(message.len()))
        {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Keeps the pages of these words in memory and in the page tables, so that the kernel's access to them waits for nothing.
    pub fn lock(&self, words: Range<usize>) -> io::Result<()> {
        let place = self.words().get(words).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the pages are of this mapping, and stay what they are.
        unsafe { mlock(place.as_ptr().cast_mut().cast(), size_of_val(place)) }?;
        Ok(())
    }
}

/// Bytes of the longest message that the kernel sends to this Unix stream socket as a whole or not at all (`unix_stream_sendmsg`: one buffer has
/// 32 KiB at least, and at most half of the socket's send buffer). Zero if that is unknown.
pub fn largest_message(socket: impl AsFd) -> usize {
    let buffer = rustix::net::sockopt::socket_send_buffer_size(socket).unwrap_or(0);
    (buffer / 2).saturating_sub(64).min(32 << 10)
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
    use std::io::{Read, Seek, Write};

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
    fn what_was_sent_is_recorded() {
        let (mut peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        let memory = SharedMemory::create("test", 2 + 3 * MESSAGE_WORDS).unwrap();
        let lengths = || {
            let all = 0..3;
            all.map(|number| {
                memory.words()[2 + number * MESSAGE_WORDS + SENT_WORD].load(Ordering::Acquire)
            })
            .collect::<Vec<_>>()
        };
        let largest = vec![7; largest_message(&socket)];
        assert_eq!(largest.len(), 32 << 10);
        for _ in 0..2 {
            let messages: [&[u8]; 3] = [b"hello", &largest, b"world!"];
            let mut has_begun = false;
            let begin = || {
                assert_eq!(lengths(), [0; 3]);
                has_begun = true;
            };
            memory.send(&socket, 2, &messages, begin).unwrap();
            assert!(has_begun);
            assert_eq!(lengths(), [5, 32 << 10, 6]);
            let mut received = vec![0; 11 + largest.len()];
            peer.read_exact(&mut received).unwrap();
            assert!(received == messages.concat());
        }
        memory.send(&socket, 1, &[b"a"], || ()).unwrap_err(); // not aligned
        memory
            .send(&socket, 4, &[b"a".as_slice(); 3], || ())
            .unwrap_err();
        drop(peer);
        let error = memory.send(&socket, 2, &[b"a"], || ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(lengths()[0], 0);
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
