//! The loop of a kept connection: from the journal's slots to the pipe, and from the pipe to the socket.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, ErrorKind},
    ops::Range,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::RecvFlags,
};
use tokio::runtime::Handle;
use zerocopy::IntoBytes as _;

use super::{
    control::Control,
    journal::{Journal, REQUEST, SLOTS, is_cut},
    replies::{Replies, Step, largest_read},
};
use crate::{
    kernel::kept::KeptPipe,
    layer::{ReadAttempts, ServedDisk},
    nbd::{
        MAX_PAYLOAD,
        content::{ReadFailure, Source, Wait},
        errno_of,
        error::ConnectionError,
        pending::Pending,
        protocol::*,
    },
    units::DiskOffset,
};

/// From this length on data goes from the page cache to the pipe by reference. For less, copying costs fewer system calls.
const SPLICE_FROM: usize = 16 << 10;

/// How long the thread waits at most before it makes another turn.
const TURN: Duration = Duration::from_secs(1);

/// The server of one connection.
pub(super) struct Server<'a, S> {
    socket: &'a UnixStream,
    journal: &'a Journal,
    control: &'a Control,
    disk: &'a Arc<dyn ServedDisk>,
    runtime: &'a Handle,
    largest_read: u32,
    /// Slots to be looked at.
    fresh: VecDeque<usize>,
    /// Slots that wait for the local disk.
    delayed: VecDeque<usize>,
    pending: Pending<usize>,
    /// The attempts of reads whose range was evicted before the thread came to it, by slot.
    evicted: HashMap<usize, ReadAttempts>,
    replies: Replies<'a, S>,
}

/// Whether the kernel sends more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    Disconnect,
}

/// The result of a wait.
enum ConnectionEvent {
    Requests,
    Completions,
    HungUp,
    Nothing,
}

impl<'a, S: Fn(Step)> Server<'a, S> {
    pub(super) fn new(
        socket: &'a UnixStream,
        pipe: &'a KeptPipe,
        journal: &'a Journal,
        control: &'a Control,
        disk: &'a Arc<dyn ServedDisk>,
        runtime: &'a Handle,
        step: S,
    ) -> Result<Self, ConnectionError> {
        socket
            .set_nonblocking(false)
            .and_then(|()| socket.set_read_timeout(Some(TURN)))
            .map_err(ConnectionError::io("setting up the socket"))?;
        Ok(Self {
            socket,
            journal,
            control,
            disk,
            runtime,
            largest_read: largest_read(pipe),
            fresh: VecDeque::new(),
            delayed: VecDeque::new(),
            evicted: HashMap::new(),
            pending: Pending::new(runtime).map_err(ConnectionError::io("making an eventfd"))?,
            replies: Replies::new(socket, pipe, journal, step),
        })
    }

    /// Serves until the kernel ends the connection.
    pub(super) fn run(&mut self) -> Result<(), ConnectionError> {
        self.recover()?;
        loop {
            if self.serve_fresh()? == Flow::Disconnect {
                return Ok(());
            }
            self.replies.send()?;
            self.replies.rest();
            let delayed = self.delayed.pop_front();
            self.control.turn();
            let event = match delayed {
                // without waiting: the disk can also work on new requests while this thread waits
                Some(_) => self.wait(Duration::ZERO)?,
                None if self.pending.is_empty() => ConnectionEvent::Requests,
                None => self.wait(TURN)?,
            };
            match event {
                ConnectionEvent::Requests if self.receive()? == Flow::Disconnect => {
                    return Ok(());
                }
                ConnectionEvent::HungUp => return Ok(()),
                ConnectionEvent::Requests | ConnectionEvent::Nothing => {}
                ConnectionEvent::Completions => self.finish_ready()?,
            }
            if let Some(slot) = delayed {
                if self.serve_fresh()? == Flow::Disconnect {
                    return Ok(());
                }
                self.replies.send()?;
                self.reply(slot, Wait::ForDisk)?;
            }
        }
    }

    /// Finishes what the process before this one has left in the pipe, and takes over its requests.
    fn recover(&mut self) -> Result<(), ConnectionError> {
        let left = self
            .journal
            .left()
            .map_err(|error| ConnectionError::io("reading the journal")(io::Error::other(error)))?;
        self.fresh.extend(self.replies.finish(left)?);
        let mut next = [0; REQUEST];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = rustix::net::recv(self.socket, &mut next[..], flags);
        let has_next = peeked.is_ok_and(|(count, _)| count == REQUEST);
        let journal = self.journal;
        self.fresh.retain(|slot| {
            let request = journal.request(*slot);
            let bytes = <&[u8; REQUEST]>::try_from(request.as_bytes());
            let is_request = request.magic.get() == NBD_REQUEST_MAGIC
                && !(has_next && bytes.is_ok_and(|bytes| is_cut(bytes, &next)));
            if !is_request {
                journal.free(*slot);
            }
            is_request
        });
        self.replies.used = self.fresh.iter().fold(0, |used, slot| used | 1 << slot);
        // what a process that was killed there has left of a request
        let free = (0..SLOTS).filter(|slot| self.replies.used & 1 << slot == 0);
        free.for_each(|slot| journal.free(slot));
        Ok(())
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        self.replies.used != u128::MAX && self.pending.has_room()
    }

    /// Receives into the first free slots, and waits for a request for one turn at most.
    fn receive(&mut self) -> Result<Flow, ConnectionError> {
        let first = self.replies.used.trailing_ones() as usize;
        // a shift by all bits is the case of no free slot
        let count = self
            .replies
            .used
            .checked_shr(self.replies.used.trailing_ones());
        let count = count.map_or(0, |rest| rest.trailing_zeros() as usize);
        let count = count.min(SLOTS - first);
        match self.journal.receive(self.socket, first, count) {
            Ok(0) => return Ok(Flow::Disconnect),
            Ok(bytes) if bytes % REQUEST == 0 => {
                self.replies.step(Step::Received);
                for slot in first..first + bytes / REQUEST {
                    self.replies.used |= 1 << slot;
                    self.fresh.push_back(slot);
                }
            }
            // the kernel sends a request as one message, so this is another client
            Ok(_) => {
                let cut = ErrorKind::UnexpectedEof.into();
                return Err(ConnectionError::io("reading a request")(cut));
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
                ErrorKind::ConnectionReset => return Ok(Flow::Disconnect),
                _ => return Err(ConnectionError::io("reading a request")(error)),
            },
        }
        Ok(Flow::Continue)
    }

    /// Waits for requests or completions.
    fn wait(&self, limit: Duration) -> Result<ConnectionEvent, ConnectionError> {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        let listens = match self.has_room() {
            true => PollFlags::IN,
            false => PollFlags::empty(),
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.pending.wake_fd(), PollFlags::IN),
            PollFd::new(self.socket, listens | PollFlags::RDHUP),
        ];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(ConnectionEvent::Nothing),
            Ok(_) => {}
            Err(error) => return Err(ConnectionError::io("polling")(error.into())),
        }
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
        Ok(match [fds[0].revents(), fds[1].revents()] {
            [_, socket] if socket.intersects(gone) => ConnectionEvent::HungUp,
            [wake, _] if wake.contains(PollFlags::IN) => ConnectionEvent::Completions,
            _ => ConnectionEvent::Requests,
        })
    }

    fn serve_fresh(&mut self) -> Result<Flow, ConnectionError> {
        while let Some(slot) = self.fresh.pop_front() {
            if self.serve(slot)? == Flow::Disconnect {
                return Ok(Flow::Disconnect);
            }
        }
        Ok(Flow::Continue)
    }

    fn serve(&mut self, slot: usize) -> Result<Flow, ConnectionError> {
        let request = self.journal.request(slot);
        if request.magic.get() != NBD_REQUEST_MAGIC {
            let found = request.magic.get();
            return Err(ConnectionError::RequestMagic { found });
        }
        let range = self.range(&request);
        match (request.command.get(), range) {
            (NBD_CMD_DISC, _) => return Ok(Flow::Disconnect),
            // its data would be taken for requests; the kernel does not write to a device that is read-only
            (NBD_CMD_WRITE, _) => {
                let length = request.length.get();
                return Err(ConnectionError::WriteLength { length });
            }
            (NBD_CMD_READ, Some(range)) if self.disk.is_present(range.clone()) => {
                self.reply(slot, Wait::Not)?;
            }
            (NBD_CMD_READ, Some(range)) => {
                let fetch = Arc::clone(self.disk).make_present(range);
                self.pending.push(slot, request.length.get(), fetch);
            }
            (NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES, _) => self.error(slot, NBD_EPERM)?,
            _ => self.error(slot, NBD_EINVAL)?,
        }
        Ok(Flow::Continue)
    }

    /// The range of a request that can be answered.
    fn range(&self, request: &Request) -> Option<Range<DiskOffset>> {
        let start = DiskOffset(request.offset.get());
        let length = request.length.get();
        let end = start.checked_add(u64::from(length))?;
        let is_good = request.flags.get() == 0
            && length > 0
            && length <= MAX_PAYLOAD
            && end.get() <= self.disk.size();
        is_good.then_some(start..end)
    }

    /// Answers the reads whose data has come.
    fn finish_ready(&mut self) -> Result<(), ConnectionError> {
        for (slot, result) in self.pending.take_ready() {
            match result {
                // fresh from the network: it is in memory still
                Ok(()) => self.reply(slot, Wait::ForDisk)?,
                Err(error) => self.error(slot, errno_of(&error))?,
            }
        }
        Ok(())
    }

    /// Answers a read of a range that is present and was checked. If that must not wait for the disk and would, the slot is put aside.
    fn reply(&mut self, slot: usize, wait: Wait) -> Result<(), ConnectionError> {
        let request = self.journal.request(slot);
        let length = request.length.get() as usize;
        if length < SPLICE_FROM {
            return self.copy(slot, &request, wait);
        }
        if request.length.get() > self.largest_read {
            return self.send_directly(slot, &request);
        }
        let start = DiskOffset(request.offset.get());
        let range = start..DiskOffset(start.get().saturating_add(length as u64));
        if wait == Wait::Not && self.disk.would_wait(range.clone()) {
            self.delayed.push_back(slot);
            return Ok(());
        }
        let disk = self.disk;
        let splice = |pipe: BorrowedFd<'_>| {
            let spliced = disk.splice_present(range.clone(), pipe);
            matches!(spliced, Ok(true)) && disk.is_present(range)
        };
        let reply = simple(&request, 0);
        if self.replies.splice(slot, &reply, length, splice)? {
            self.evicted.remove(&slot);
            return Ok(());
        }
        for other in self.replies.abandon()?.into_iter().rev() {
            if other != slot {
                self.fresh.push_front(other);
            }
        }
        self.copy(slot, &request, Wait::ForDisk)?;
        // before another one can take it out again
        self.replies.send()
    }

    /// Answers a read by a copy of the data.
    fn copy(&mut self, slot: usize, request: &Request, wait: Wait) -> Result<(), ConnectionError> {
        let source = Source {
            export: self.disk,
            runtime: self.runtime,
        };
        let length = request.length.get() as usize;
        let read = |data: &mut [u8]| source.read_once(request.offset.get(), data, wait);
        match self.replies.copy(slot, &simple(request, 0), length, read)? {
            Ok(()) => {
                self.evicted.remove(&slot);
                Ok(())
            }
            Err(ReadFailure::WouldWait) => {
                self.delayed.push_back(slot);
                Ok(())
            }
            Err(ReadFailure::Evicted) => self.fetch_again(slot, request),
            Err(failure) => self.error(slot, errno_of(&failure.into_error())),
        }
    }

    /// A read waits once more, because a part of its range was evicted before the thread came to it.
    fn fetch_again(&mut self, slot: usize, request: &Request) -> Result<(), ConnectionError> {
        let attempts = self.evicted.entry(slot);
        let may_wait = attempts.or_insert_with(ReadAttempts::begin).another();
        match self.range(request) {
            Some(range) if may_wait => {
                let fetch = Arc::clone(self.disk).make_present(range);
                self.pending.push(slot, request.length.get(), fetch);
                Ok(())
            }
            _ => self.error(slot, errno_of(&ReadFailure::Evicted.into_error())),
        }
    }

    /// Answers a read that the pipe has no room for.
    fn send_directly(&mut self, slot: usize, request: &Request) -> Result<(), ConnectionError> {
        let source = Source {
            export: self.disk,
            runtime: self.runtime,
        };
        let (offset, length) = (request.offset.get(), request.length.get() as usize);
        let read = |at, part: &mut [u8]| source.read(offset + at as u64, part, Wait::ForDisk);
        let sent = self
            .replies
            .directly(slot, &simple(request, 0), length, read)?;
        match sent {
            Err(failure) => self.error(slot, errno_of(&failure.into_error())),
            Ok(()) => Ok(()),
        }
    }

    fn error(&mut self, slot: usize, error: u32) -> Result<(), ConnectionError> {
        self.evicted.remove(&slot);
        let reply = simple(&self.journal.request(slot), error);
        self.replies.add(slot, &reply)
    }
}

fn simple(request: &Request, error: u32) -> SimpleReply {
    SimpleReply {
        magic: NBD_SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: request.cookie,
    }
}
