//! A kept connection: made new, or from the descriptors that another process has left.

use std::{
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use rustix::{
    fs::FileType,
    net::{AddressFamily, SocketType, sockopt},
};
use tokio::runtime::Handle;

use super::{
    control::Control,
    journal::{Identity, Journal},
    replies::{MORE_PAGES, Step, largest_read},
    server::Server,
};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{
        kept::{KeptPipe, inode},
        nbd::socket_pair,
    },
    layer::ServedDisk,
    nbd::{MAX_PART, error::ConnectionError},
};

/// Capacity of the pipe: the largest reply, in the next power of two.
const CAPACITY: usize = 2 * MAX_PART as usize;

/// A connection to the kernel's driver that survives its process, if its descriptors do.
#[derive(Debug)]
pub struct KeptConnection {
    socket: UnixStream,
    pipe: KeptPipe,
    journal: Journal,
    control: Arc<Control>,
}

impl KeptConnection {
    /// A new connection, and the kernel's end of it.
    pub fn new() -> Result<(Self, OwnedFd)> {
        let (kernel, socket) = socket_pair()?;
        let pipe = KeptPipe::new(CAPACITY)?;
        let journal = Journal::create(identity(&socket, &pipe)?)?;
        Ok((Self::of(socket, pipe, journal)?, kernel))
    }

    /// The descriptors that a successor needs, in any order.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.socket.as_fd(), self.pipe.as_fd(), self.journal.as_fd()]
    }

    /// The connection of the [`KeptConnection::descriptors`] of another process, which must have ended. Everything is checked before
    /// anything is read or sent, so after an error the descriptors are as they were for a process that can use them. Only this process's own copies are closed.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Result<Self> {
        let (mut sockets, mut pipes, mut journals) = (Vec::new(), Vec::new(), Vec::new());
        for descriptor in descriptors {
            let stat = rustix::fs::fstat(&descriptor)
                .or_kind(Kind::Io, || "looking at a kept descriptor".into())?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Socket => sockets.push(descriptor),
                FileType::Fifo => pipes.push(descriptor),
                FileType::RegularFile => journals.push(descriptor),
                other => {
                    let why = format!("a kept descriptor of a connection is a {other:?}");
                    return Err(Error::new(Kind::Corrupt, why));
                }
            }
        }
        let journal = the_one(journals, "journal")?;
        let (journal, expected) = Journal::open(journal)?;
        let socket = the_one(sockets, "socket")?;
        let is_stream = sockopt::socket_type(&socket) == Ok(SocketType::STREAM)
            && sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
        if !is_stream {
            let why = "the kept socket of a connection is not a Unix stream socket";
            return Err(Error::new(Kind::Corrupt, why));
        }
        let pipe = KeptPipe::from_descriptor(the_one(pipes, "pipe")?)?;
        let socket = UnixStream::from(socket);
        if identity(&socket, &pipe)? != expected {
            let why = "the kept descriptors are of different connections";
            return Err(Error::new(Kind::Corrupt, why));
        }
        Self::of(socket, pipe, journal)
    }

    fn of(socket: UnixStream, pipe: KeptPipe, journal: Journal) -> Result<Self> {
        let pages = pipe.buffers();
        if pages <= MORE_PAGES {
            let why = format!("a pipe has {pages} pages, which is too few for a reply");
            return Err(Error::new(Kind::Io, why));
        }
        Ok(Self {
            socket,
            pipe,
            journal,
            control: Arc::default(),
        })
    }

    /// Bytes of the largest read whose reply survives: what the pipe holds, up to 1 MiB. A device should not be asked for more. Without
    /// CAP_SYS_RESOURCE a pipe has 1 MiB in all (`/proc/sys/fs/pipe-max-size`), and this is 16 KiB less.
    pub fn largest_read(&self) -> u32 {
        largest_read(&self.pipe)
    }

    /// What a watchdog sees of the connection.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Finishes first what another process has left; then serves until the kernel ends the connection. Blocks;
    /// not for a thread of the async runtime. Afterwards the connection is shut down.
    pub fn serve(
        &mut self,
        disk: &Arc<dyn ServedDisk>,
        runtime: &Handle,
    ) -> Result<(), ConnectionError> {
        self.serve_in_steps(disk, runtime, |_| ())
    }

    /// As [`KeptConnection::serve`]; `step` is called at each step, for tests that end the process there.
    pub fn serve_in_steps(
        &mut self,
        disk: &Arc<dyn ServedDisk>,
        runtime: &Handle,
        step: impl Fn(Step),
    ) -> Result<(), ConnectionError> {
        let server = Server::new(
            &self.socket,
            &self.pipe,
            &self.journal,
            &self.control,
            disk,
            runtime,
            step,
        );
        let end = server.and_then(|mut server| server.run());
        self.control.turn();
        // for the kept descriptors of the socket too: the kernel shall notice
        let _ = self.socket.shutdown(Shutdown::Both);
        end
    }
}

fn identity(socket: &UnixStream, pipe: &KeptPipe) -> Result<Identity> {
    let context = || "looking at the descriptors of a connection".to_owned();
    Ok(Identity {
        socket: inode(socket).or_kind(Kind::Io, context)?,
        pipe: inode(pipe).or_kind(Kind::Io, context)?,
    })
}

fn the_one(descriptors: Vec<OwnedFd>, what: &str) -> Result<OwnedFd> {
    let count = descriptors.len();
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| {
        let why = format!("the kept descriptors of a connection have {count} {what}s and not one");
        Error::new(Kind::Corrupt, why)
    })?;
    Ok(descriptor)
}
