//! A pipe with one descriptor for both ends. What is in it stays there when the process that put it there ends.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
    pipe::{PipeFlags, SpliceFlags},
};

use crate::error::{Error, Kind, Result, ResultExt};

/// The capacity that every process may give a pipe (`/proc/sys/fs/pipe-max-size`), unless an administrator has changed it.
const USUAL_LARGEST: usize = 1 << 20;

/// A pipe, open for reading and writing with one descriptor. No system call waits for room or for content.
#[derive(Debug)]
pub struct KeptPipe {
    pipe: OwnedFd,
    /// Pages that it can hold; a page that is not full takes one too.
    buffers: usize,
}

impl KeptPipe {
    /// A new pipe with this capacity in bytes, or, if the kernel does not permit that, with the largest that it does.
    pub fn new(capacity: usize) -> Result<Self> {
        let (ours, _) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .or_kind(Kind::Io, || "making a pipe".into())?;
        let path = format!("/proc/self/fd/{}", ours.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let pipe = rustix::fs::open(&path, flags, Mode::empty())
            .or_kind(Kind::Io, || format!("opening a pipe at {path}"))?;
        for capacity in [capacity, USUAL_LARGEST] {
            if rustix::pipe::fcntl_setpipe_size(&pipe, capacity).is_ok() {
                break;
            }
        }
        Self::with_capacity(pipe)
    }

    /// A pipe that another process has made.
    pub fn from_descriptor(pipe: OwnedFd) -> Result<Self> {
        let context = || "opening a pipe".to_owned();
        let stat = rustix::fs::fstat(&pipe).or_kind(Kind::Io, context)?;
        let flags = rustix::fs::fcntl_getfl(&pipe).or_kind(Kind::Io, context)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo
            || !flags.contains(OFlags::RDWR | OFlags::NONBLOCK)
        {
            let why = "the descriptor is not a pipe that is open for reading and writing and non-blocking";
            return Err(Error::new(Kind::Corrupt, why));
        }
        Self::with_capacity(pipe)
    }

    fn with_capacity(pipe: OwnedFd) -> Result<Self> {
        let capacity = rustix::pipe::fcntl_getpipe_size(&pipe)
            .or_kind(Kind::Io, || "asking for a pipe's capacity".into())?;
        Ok(Self {
            pipe,
            buffers: capacity / rustix::param::page_size(),
        })
    }

    /// Pages that it can hold, full or not.
    pub fn buffers(&self) -> usize {
        self.buffers
    }

    /// Bytes in it.
    pub fn held(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(&self.pipe)?)
    }

    /// Copies bytes into it; an error if there is no room for all of them.
    pub fn put(&self, bytes: &[u8]) -> io::Result<()> {
        let count = rustix::io::retry_on_intr(|| rustix::io::write(&self.pipe, bytes))?;
        match count == bytes.len() {
            true => Ok(()),
            false => Err(Errno::AGAIN.into()),
        }
    }

    /// Moves up to so many bytes on to a socket; waits for the socket. The number of moved bytes.
    pub fn send(&self, socket: impl AsFd, most: usize) -> io::Result<usize> {
        let flags = SpliceFlags::empty();
        let count = rustix::io::retry_on_intr(|| {
            rustix::pipe::splice(&self.pipe, None, &socket, None, most, flags)
        })?;
        Ok(count)
    }

    /// Takes all bytes out.
    pub fn drain(&self) -> io::Result<()> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            match rustix::io::read(&self.pipe, &mut bytes[..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for KeptPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn the_content_outlives_the_descriptor_that_put_it_there() {
        let pipe = KeptPipe::new(2 << 20).unwrap();
        assert!(pipe.buffers() >= 256, "{}", pipe.buffers());
        pipe.put(b"hello world").unwrap();
        let other = pipe.as_fd().try_clone_to_owned().unwrap();
        drop(pipe);
        let pipe = KeptPipe::from_descriptor(other).unwrap();
        assert_eq!(pipe.held().unwrap(), 11);
        let (mut peer, socket) = UnixStream::pair().unwrap();
        assert_eq!(pipe.send(&socket, 5).unwrap(), 5);
        assert_eq!(pipe.held().unwrap(), 6);
        let mut bytes = [0; 5];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        pipe.drain().unwrap();
        assert_eq!(pipe.held().unwrap(), 0);
        pipe.drain().unwrap();
    }

    #[test]
    fn what_has_no_room_is_an_error() {
        let pipe = KeptPipe::new(1 << 20).unwrap();
        let bytes = vec![1; pipe.buffers() * rustix::param::page_size()];
        pipe.put(&bytes).unwrap();
        let error = pipe.put(&[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        KeptPipe::from_descriptor(reader).unwrap_err();
        KeptPipe::from_descriptor(writer).unwrap_err();
        let (socket, _) = UnixStream::pair().unwrap();
        KeptPipe::from_descriptor(socket.into()).unwrap_err();
        let file = tempfile::tempfile().unwrap();
        KeptPipe::from_descriptor(file.into()).unwrap_err();
    }
}
