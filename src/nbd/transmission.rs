//! The transmission phase: requests in, replies out, until the client disconnects.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::runtime::Handle;

use super::{
    MAX_PART, MAX_PAYLOAD,
    content::{Content, MIN_HOLE, ReadFailure, Source, Wait, status},
    counters::Counts,
    errno_of,
    error::ConnectionError,
    export::Shared,
    handshake::{ALLOCATION_CONTEXT, Session},
    input::Input,
    pending::Pending,
    protocol::*,
    reply::{Part, Replies},
    stream::Stream,
};
use crate::units::DiskOffset;

/// Maximum number of extents in one reply to `NBD_CMD_BLOCK_STATUS`; a client asks again from the end of the last one.
const MAX_EXTENTS: usize = 16 << 10;

/// Reads of one connection that may wait for the local disk at one time.
const MAX_DELAYED: usize = 128;

/// How long requests that still wait when the client disconnects properly are waited for.
const DISCONNECT_LIMIT: Duration = Duration::from_secs(30);

/// How long the waits of a connection that has ended may take to notice it.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(1);

/// One connection in transmission.
pub(super) struct Transmission<'a> {
    stream: &'a Stream,
    session: Session,
    runtime: &'a Handle,
    shared: &'a Shared,
    input: Input,
    replies: Replies<'a>,
    pending: Pending<Request>,
    /// Reads that wait for the local disk. The kernel has begun with them; this thread waits for one after the other.
    delayed: VecDeque<Request>,
    counts: Counts,
}

/// Whether the client sends more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    Disconnect,
}

/// The result of a poll.
enum ConnectionEvent {
    Requests,
    Completions,
    HungUp,
    TimedOut,
}

impl<'a> Transmission<'a> {
    pub(super) fn new(
        stream: &'a Stream,
        session: Session,
        shared: &'a Shared,
        runtime: &'a Handle,
    ) -> Result<Self, ConnectionError> {
        Ok(Self {
            stream,
            runtime,
            shared,
            input: Input::new(),
            replies: Replies::new(stream, session.structured),
            pending: Pending::new(runtime).map_err(ConnectionError::io("making an eventfd"))?,
            delayed: VecDeque::new(),
            counts: Counts::default(),
            session,
        })
    }

    /// Serves requests until the client ends the session.
    pub(super) fn run(mut self) -> Result<(), ConnectionError> {
        loop {
            if self.serve_input()? == Flow::Disconnect {
                return self.finish_all();
            }
            self.shared.counters.add(&mut self.counts);
            self.replies.flush()?;
            let delayed = self.delayed.pop_front();
            let event = if delayed.is_some() {
                // without waiting: the disk can also work on new requests while this thread waits
                self.wait(self.listens(), Some(Duration::ZERO))?
            } else if self.pending.is_empty() {
                ConnectionEvent::Requests
            } else {
                self.wait(self.listens(), None)?
            };
            match event {
                ConnectionEvent::Requests if self.input.fill(self.stream)? => {}
                ConnectionEvent::Completions => self.finish_ready()?,
                ConnectionEvent::TimedOut if delayed.is_some() => {}
                ConnectionEvent::Requests | ConnectionEvent::HungUp | ConnectionEvent::TimedOut => {
                    self.delayed.extend(delayed);
                    self.give_up()?;
                    return Err(ConnectionError::Disconnected);
                }
            }
            if let Some(request) = delayed {
                if self.serve_input()? == Flow::Disconnect {
                    self.delayed.push_front(request);
                    return self.finish_all();
                }
                self.replies.flush()?;
                self.send_data(&request, Wait::ForDisk)?;
            }
        }
    }

    /// Serves the requests that are here.
    fn serve_input(&mut self) -> Result<Flow, ConnectionError> {
        while self.has_room() {
            let Some(request) = self.input.next()? else {
                break;
            };
            if self.serve(&request)? == Flow::Disconnect {
                return Ok(Flow::Disconnect);
            }
        }
        Ok(Flow::Continue)
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        self.pending.has_room() && self.delayed.len() < MAX_DELAYED
    }

    /// The events of the socket that matter now.
    fn listens(&self) -> PollFlags {
        if self.has_room() {
            PollFlags::IN
        } else {
            PollFlags::RDHUP
        }
    }

    /// Called after the end of the client's stream, because the client has ended it or because the server stops: waiting requests are
    /// failed.
    fn give_up(&mut self) -> Result<(), ConnectionError> {
        self.pending.abort();
        for request in std::mem::take(&mut self.delayed) {
            self.error(&request, NBD_ESHUTDOWN, "the server is stopping")?;
        }
        while !self.pending.is_empty() {
            match self.wait(PollFlags::empty(), Some(GIVE_UP_LIMIT))? {
                ConnectionEvent::Completions => {
                    for (request, _) in self.pending.take_ready() {
                        self.error(&request, NBD_ESHUTDOWN, "the server is stopping")?;
                    }
                }
                ConnectionEvent::Requests | ConnectionEvent::HungUp | ConnectionEvent::TimedOut => {
                    break;
                }
            }
        }
        self.replies.flush()
    }

    /// After `NBD_CMD_DISC`: "the server MUST handle all outstanding requests".
    fn finish_all(&mut self) -> Result<(), ConnectionError> {
        let deadline = Instant::now() + DISCONNECT_LIMIT;
        while let Some(request) = self.delayed.pop_front() {
            self.send_data(&request, Wait::ForDisk)?;
        }
        self.replies.flush()?;
        while !self.pending.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wait(PollFlags::empty(), Some(left))? {
                ConnectionEvent::Completions => self.finish_ready()?,
                ConnectionEvent::Requests | ConnectionEvent::HungUp | ConnectionEvent::TimedOut => {
                    break;
                }
            }
            self.replies.flush()?;
        }
        Ok(())
    }

    /// Waits for completions, and for these events of the socket; its errors and hang-ups are always reported.
    fn wait(
        &self,
        socket: PollFlags,
        limit: Option<Duration>,
    ) -> Result<ConnectionEvent, ConnectionError> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let wake = self.pending.wake_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            PollFd::new(self.stream, socket),
        ];
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(error) => return Err(ConnectionError::io("polling")(error.into())),
                Ok(0) => return Ok(ConnectionEvent::TimedOut),
                Ok(_) => {}
            }
            let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
            return Ok(match [fds[0].revents(), fds[1].revents()] {
                // requests that are not read here need no answer: the client is gone
                [_, socket] if socket.intersects(gone) => ConnectionEvent::HungUp,
                [wake, _] if wake.contains(PollFlags::IN) => ConnectionEvent::Completions,
                _ => ConnectionEvent::Requests,
            });
        }
    }

    fn serve(&mut self, request: &Request) -> Result<Flow, ConnectionError> {
        self.counts.requests += 1;
        let flags = request.flags.get();
        match request.command.get() {
            NBD_CMD_READ => self.read(request, flags)?,
            NBD_CMD_DISC => return Ok(Flow::Disconnect),
            // the data of the write has been skipped
            NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES => {
                self.error(request, NBD_EPERM, "the export is read-only")?;
            }
            NBD_CMD_FLUSH => self.flush(request, flags)?,
            NBD_CMD_CACHE => self.cache(request, flags)?,
            NBD_CMD_BLOCK_STATUS => self.block_status(request, flags)?,
            _ => self.error(request, NBD_EINVAL, "unknown command")?,
        }
        Ok(Flow::Continue)
    }

    fn read(&mut self, request: &Request, flags: u16) -> Result<(), ConnectionError> {
        // NBD_CMD_FLAG_DF is offered only with structured replies
        let known = if self.session.structured {
            NBD_CMD_FLAG_DF
        } else {
            0
        };
        let Some(range) = self.checked_range(request, flags, known)? else {
            return Ok(());
        };
        let length = request.length.get();
        if length > MAX_PAYLOAD || (flags & NBD_CMD_FLAG_DF != 0 && length > MAX_PART) {
            // NBD_EOVERFLOW is for clients that know of structured replies
            let error = if self.session.structured {
                NBD_EOVERFLOW
            } else {
                NBD_EINVAL
            };
            return self.error(request, error, "the read is too long for one reply");
        }
        if length == 0 {
            return self.replies.no_data(request);
        }
        if self.session.export.is_present(range.clone()) {
            return self.send_data(request, Wait::Not);
        }
        self.counts.waits += 1;
        let fetch = Arc::clone(&self.session.export).make_present(range);
        self.pending.push(*request, length, fetch);
        Ok(())
    }

    /// Answers the reads whose data has come.
    fn finish_ready(&mut self) -> Result<(), ConnectionError> {
        for (request, result) in self.pending.take_ready() {
            match result {
                // fresh from the network: it is in memory still
                Ok(()) => self.send_data(&request, Wait::ForDisk)?,
                Err(error) => self.error(&request, errno_of(&error), &error.to_string())?,
            }
        }
        Ok(())
    }

    /// Sends the data of a read whose range is present and checked. If that would have to wait for the disk, and must not, the request is
    /// put aside.
    fn send_data(&mut self, request: &Request, wait: Wait) -> Result<(), ConnectionError> {
        let mut at = request.offset.get();
        let end = at + u64::from(request.length.get());
        let fragments = self.session.structured && request.flags.get() & NBD_CMD_FLAG_DF == 0;
        let source = Source {
            export: &self.session.export,
            runtime: self.runtime,
        };
        let mut extents = if fragments && end - at >= MIN_HOLE {
            source.extents(at..end)
        } else {
            vec![(end - at, Content::Data)]
        };
        extents.reverse();
        while let Some((left, content)) = extents.pop() {
            let length = u32::try_from(left).unwrap_or(u32::MAX);
            let length = match content {
                Content::Data => length.min(MAX_PART),
                Content::Zero => length,
            };
            if u64::from(length) < left {
                extents.push((left - u64::from(length), content));
            }
            let part = Part {
                offset: at,
                length,
                first: at == request.offset.get(),
                last: extents.is_empty(),
            };
            if content == Content::Zero {
                self.replies.hole(request, part)?;
            } else {
                // after a part has been sent, the rest must follow
                let wait = if part.first { wait } else { Wait::ForDisk };
                let fill = |buffer: &mut [u8]| source.read(at, buffer, wait);
                match self.replies.data(request, part, fill)? {
                    Ok(()) => {}
                    Err(ReadFailure::WouldWait) => {
                        self.delayed.push_back(*request);
                        return Ok(());
                    }
                    Err(_) if !self.session.structured && !part.first => {
                        return Err(ConnectionError::Torn { offset: at });
                    }
                    Err(failure) => {
                        let error = failure.into_error();
                        return self.error(request, errno_of(&error), &error.to_string());
                    }
                }
            }
            at += u64::from(length);
        }
        self.counts.reads += 1;
        self.counts.read_bytes += u64::from(request.length.get());
        Ok(())
    }

    /// Not offered, for there is nothing to flush; and so it succeeds where a client sends it all the same.
    fn flush(&mut self, request: &Request, flags: u16) -> Result<(), ConnectionError> {
        if flags != 0 || request.offset.get() != 0 || request.length.get() != 0 {
            return self.error(request, NBD_EINVAL, "a flush has no flags and no range");
        }
        self.replies.success(request)
    }

    /// Starts the fetch of a range without waiting for it.
    fn cache(&mut self, request: &Request, flags: u16) -> Result<(), ConnectionError> {
        let Some(range) = self.checked_range(request, flags, 0)? else {
            return Ok(());
        };
        if !self.session.export.is_present(range.clone()) {
            // a hint over the limit is ignored: "there is no guarantee of an actual performance gain"
            if let Ok(permit) = Arc::clone(&self.shared.prefetches).try_acquire_owned() {
                let export = Arc::clone(&self.session.export);
                self.runtime.spawn(async move {
                    // a later read of the range reports why it failed
                    let _ = export.make_present(range).await;
                    drop(permit);
                });
            }
        }
        self.replies.success(request)
    }

    fn block_status(&mut self, request: &Request, flags: u16) -> Result<(), ConnectionError> {
        if !self.session.allocation {
            let why = "no metadata context was chosen for this export";
            return self.error(request, NBD_EINVAL, why);
        }
        let Some(range) = self.checked_range(request, flags, NBD_CMD_FLAG_REQ_ONE)? else {
            return Ok(());
        };
        if request.length.get() == 0 {
            return self.error(request, NBD_EINVAL, "block status of an empty range");
        }
        let limit = if flags & NBD_CMD_FLAG_REQ_ONE != 0 {
            1
        } else {
            MAX_EXTENTS
        };
        let extents = status(&*self.session.export, range, limit);
        if extents.is_empty() {
            return self.error(
                request,
                NBD_EIO,
                "the export cannot report the status of the range",
            );
        }
        self.replies.extents(request, ALLOCATION_CONTEXT, &extents)
    }

    /// The request's range, or an error to the client where it is not in the export or has flags that mean nothing here.
    fn checked_range(
        &mut self,
        request: &Request,
        flags: u16,
        known: u16,
    ) -> Result<Option<Range<DiskOffset>>, ConnectionError> {
        if flags & !known != 0 {
            self.error(
                request,
                NBD_EINVAL,
                "a flag that this command does not support",
            )?;
            return Ok(None);
        }
        let start = DiskOffset(request.offset.get());
        match start.checked_add(u64::from(request.length.get())) {
            Some(end) if end.get() <= self.session.export.size() => Ok(Some(start..end)),
            _ => {
                self.error(request, NBD_EINVAL, "the range is outside the export")?;
                Ok(None)
            }
        }
    }

    fn error(
        &mut self,
        request: &Request,
        error: u32,
        message: &str,
    ) -> Result<(), ConnectionError> {
        self.counts.errors += 1;
        self.replies.error(request, error, message)
    }
}

impl Drop for Transmission<'_> {
    fn drop(&mut self) {
        self.shared.counters.add(&mut self.counts);
    }
}
