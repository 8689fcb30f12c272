//! Replies on their way: in messages to the socket, or, if one of them is too long for a message, into the pipe and from there to the socket.

use std::{
    convert::Infallible,
    io::{self, ErrorKind, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
};

use zerocopy::IntoBytes as _;

use super::journal::{Journal, Left, MESSAGES, Phase, SLOTS};
use crate::{
    buffer::Buffer,
    kernel::kept::{KeptPipe, largest_message},
    nbd::{MAX_PART, error::ConnectionError, protocol::SimpleReply},
};

/// Bytes of replies that are gathered before they are sent.
const SEND_AT: usize = 256 << 10;

/// Pages that a reply takes at most beside those of its data: its header, an end that is not aligned, and bytes that were gathered before it.
pub(super) const MORE_PAGES: usize = 4;

/// A moment at which a test can end the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Requests were received.
    Received,
    /// The pipe is said to be filling.
    Filling,
    /// A reply's header is in the pipe, and its data is not.
    Header,
    /// A reply's data is in the pipe, and not yet said to be.
    Data,
    /// All replies are in messages, and nothing is sent.
    Messages,
    /// All replies are in the pipe.
    Whole,
    /// They are said to be.
    Sending,
    /// Something was sent.
    SentSome,
    /// All was sent.
    Sent,
    /// A slot is free.
    Freed,
    /// All slots are free.
    AllFreed,
    /// The pipe is said to be empty.
    Empty,
    /// The pipe is drained, because a reply could not be made.
    Drained,
}

const _: () = assert!(SLOTS == u128::BITS as usize);

/// The replies of one connection that are not sent yet.
pub(super) struct Replies<'a, S> {
    socket: &'a UnixStream,
    pipe: &'a KeptPipe,
    journal: &'a Journal,
    step: S,
    /// A bit for each slot that has a request.
    pub(super) used: u128,
    /// Bytes of the longest message; zero if there are none.
    largest_message: usize,
    /// Slots whose replies are in the pipe or in the buffer. They are marked.
    slots: Vec<usize>,
    /// Bytes and pages in the pipe.
    piped: usize,
    pages: usize,
    /// Replies that are sent or go into the pipe next: the first `gathered` bytes.
    buffer: Option<Buffer>,
    gathered: usize,
    /// Lengths of the messages that they make, each of whole replies.
    messages: Vec<usize>,
}

impl<'a, S: Fn(Step)> Replies<'a, S> {
    pub(super) fn new(
        socket: &'a UnixStream,
        pipe: &'a KeptPipe,
        journal: &'a Journal,
        step: S,
    ) -> Self {
        journal.prepare();
        Self {
            socket,
            pipe,
            journal,
            step,
            used: 0,
            largest_message: match journal.has_messages() {
                true => largest_message(socket),
                false => 0,
            },
            slots: Vec::new(),
            piped: 0,
            pages: 0,
            buffer: None,
            gathered: 0,
            messages: Vec::new(),
        }
    }

    pub(super) fn step(&self, step: Step) {
        (self.step)(step);
    }

    /// Finishes what another process has left. The slots without a reply.
    pub(super) fn finish(&mut self, left: Left) -> Result<Vec<usize>, ConnectionError> {
        self.slots = left.marked;
        let mut unanswered = left.received;
        match left.phase {
            Phase::Sending => {
                let rest = self.pipe.held().map_err(pipe_error)?;
                self.send_all(usize::try_from(rest).unwrap_or(usize::MAX))?;
                self.free_sent();
            }
            Phase::Messages => {
                let slots = std::mem::take(&mut self.slots);
                let (sent, rest): (Vec<_>, _) = slots
                    .into_iter()
                    .partition(|slot| self.journal.was_sent(*slot));
                rest.iter().for_each(|slot| self.journal.unmark(*slot));
                unanswered.extend(rest);
                self.slots = sent;
                self.free_sent();
            }
            // no process finds the last one: it is an error to open such a journal
            Phase::Filling | Phase::Empty | Phase::Direct => unanswered.extend(self.abandon()?),
        }
        Ok(unanswered)
    }

    /// Adds a reply without data.
    pub(super) fn add(&mut self, slot: usize, reply: &SimpleReply) -> Result<(), ConnectionError> {
        let Ok(()) = self.copy(slot, reply, 0, |_| Ok::<_, Infallible>(()))?;
        Ok(())
    }

    /// Adds a reply with so many bytes of data, which `fill` copies. If it fails, nothing is added.
    pub(super) fn copy<E>(
        &mut self,
        slot: usize,
        reply: &SimpleReply,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ConnectionError> {
        let header = reply.as_bytes();
        let length = header.len() + length;
        self.make_room(length)?;
        let buffer = self.buffer.get_or_insert_with(Buffer::lend);
        let space = &mut buffer.of_length(self.gathered + length)[self.gathered..];
        let (head, data) = space.split_at_mut(header.len());
        head.copy_from_slice(header);
        let filled = fill(data);
        if filled.is_ok() {
            self.gathered += length;
            self.claim(slot, length);
        }
        Ok(filled)
    }

    /// Adds a reply with so many bytes of data, which `splice` moves into the pipe. False if it does not; then all is to be abandoned.
    pub(super) fn splice(
        &mut self,
        slot: usize,
        reply: &SimpleReply,
        length: usize,
        splice: impl FnOnce(BorrowedFd<'_>) -> bool,
    ) -> Result<bool, ConnectionError> {
        self.make_room(reply.as_bytes().len() + length)?;
        self.add(slot, reply)?;
        self.fill_pipe()?;
        self.step(Step::Header);
        let is_spliced = splice(self.pipe.as_fd());
        if is_spliced {
            self.piped += length;
            self.pages += pages(length);
            self.step(Step::Data);
        }
        Ok(is_spliced)
    }

    /// Sends a reply that the pipe has no room for: in parts, without the pipe, so that no successor can go on with it. `fill` copies the
    /// data at an offset of it. If it fails at once, nothing is sent.
    pub(super) fn directly<E>(
        &mut self,
        slot: usize,
        reply: &SimpleReply,
        length: usize,
        mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ConnectionError> {
        self.send()?;
        let mut buffer = Buffer::lend();
        let send = |mut socket: &UnixStream, bytes: &[u8]| {
            let sent = socket.write_all(bytes);
            sent.map_err(ConnectionError::io("sending a reply"))
        };
        let mut at = 0;
        while at < length {
            let part = buffer.of_length((length - at).min(MAX_PART as usize));
            match fill(at, part) {
                Ok(()) => {}
                Err(error) if at == 0 => return Ok(Err(error)),
                Err(_) => return Err(ConnectionError::Torn { offset: at as u64 }),
            }
            if at == 0 {
                self.journal.set_phase(Phase::Direct);
                send(self.socket, reply.as_bytes())?;
            }
            send(self.socket, part)?;
            at += part.len();
        }
        self.journal.free(slot);
        self.used &= !(1 << slot);
        self.journal.set_phase(Phase::Empty);
        Ok(Ok(()))
    }

    /// Sends the replies that are there, if they and another one of this length are too much.
    fn make_room(&mut self, length: usize) -> Result<(), ConnectionError> {
        let bytes = self.piped + self.gathered + length;
        let needed = self.pages + pages(self.gathered) + pages(length);
        if bytes > SEND_AT || needed > self.pipe.buffers() {
            self.send()?;
        }
        Ok(())
    }

    /// A reply to this slot begins, with so many gathered bytes.
    fn claim(&mut self, slot: usize, length: usize) {
        if self.slots.is_empty() {
            self.journal.set_phase(Phase::Filling);
            self.step(Step::Filling);
        }
        match self.messages.last_mut() {
            Some(last) if *last + length <= self.largest_message => *last += length,
            _ => self.messages.push(length),
        }
        self.journal.mark(slot, self.messages.len() - 1);
        self.slots.push(slot);
    }

    /// Copies the gathered bytes into the pipe.
    fn fill_pipe(&mut self) -> Result<(), ConnectionError> {
        let gathered = std::mem::take(&mut self.gathered);
        self.messages.clear();
        if let Some(buffer) = self.buffer.as_mut().filter(|_| gathered > 0) {
            let bytes = buffer.of_length(gathered);
            self.pipe.put(bytes).map_err(pipe_error)?;
            self.piped += gathered;
            self.pages += pages(gathered);
        }
        Ok(())
    }

    /// Gives the buffer back, as long as there is nothing to do. All is sent.
    pub(super) fn rest(&mut self) {
        self.buffer = None;
    }

    /// Sends the replies that are there, and frees their slots.
    pub(super) fn send(&mut self) -> Result<(), ConnectionError> {
        if self.slots.is_empty() {
            return Ok(());
        }
        if self.are_messages() {
            self.send_messages()?;
        } else {
            self.fill_pipe()?;
            self.step(Step::Whole);
            self.journal.set_phase(Phase::Sending);
            self.step(Step::Sending);
            self.send_all(self.piped)?;
        }
        self.step(Step::Sent);
        self.free_sent();
        Ok(())
    }

    /// Whether all replies are in the buffer, and short enough for messages.
    fn are_messages(&self) -> bool {
        let is_short = |length: &usize| *length <= self.largest_message;
        self.piped == 0 && self.messages.len() <= MESSAGES && self.messages.iter().all(is_short)
    }

    fn send_messages(&mut self) -> Result<(), ConnectionError> {
        let Some(buffer) = &mut self.buffer else {
            return Ok(()); // nothing was gathered
        };
        let mut rest: &[u8] = buffer.of_length(self.gathered);
        let messages: Vec<&[u8]> = self
            .messages
            .iter()
            .filter_map(|length| rest.split_off(..*length))
            .collect();
        let begin = || {
            self.journal.set_phase(Phase::Messages);
            (self.step)(Step::Messages);
        };
        let sent = self.journal.send(self.socket, &messages, begin);
        sent.map_err(ConnectionError::io("sending replies"))?;
        (self.step)(Step::SentSome);
        Ok(())
    }

    fn send_all(&self, mut left: usize) -> Result<(), ConnectionError> {
        while left > 0 {
            let sent = match self.pipe.send(self.socket, left) {
                Ok(0) => Err(ErrorKind::WriteZero.into()),
                sent => sent,
            };
            left -= sent.map_err(ConnectionError::io("sending a reply"))?;
            self.step(Step::SentSome);
        }
        Ok(())
    }

    fn free_sent(&mut self) {
        for slot in std::mem::take(&mut self.slots) {
            self.journal.free(slot);
            self.used &= !(1 << slot);
            self.step(Step::Freed);
        }
        self.step(Step::AllFreed);
        self.is_empty();
    }

    /// Takes the replies that were begun out of the pipe; their slots.
    pub(super) fn abandon(&mut self) -> Result<Vec<usize>, ConnectionError> {
        self.pipe.drain().map_err(pipe_error)?;
        self.step(Step::Drained);
        let slots = std::mem::take(&mut self.slots);
        slots.iter().for_each(|slot| self.journal.unmark(*slot));
        self.is_empty();
        Ok(slots)
    }

    /// The pipe is empty, and no slot is marked.
    fn is_empty(&mut self) {
        (self.piped, self.pages, self.gathered) = (0, 0, 0);
        self.messages.clear();
        self.journal.set_phase(Phase::Empty);
        self.step(Step::Empty);
    }
}

/// Bytes of the largest read that the pipe has room for.
pub(super) fn largest_read(pipe: &KeptPipe) -> u32 {
    let bytes = pipe.buffers().saturating_sub(MORE_PAGES) * rustix::param::page_size();
    u32::try_from(bytes).map_or(MAX_PART, |most| most.min(MAX_PART))
}

/// Pages that so many bytes take, wherever they start.
fn pages(bytes: usize) -> usize {
    bytes.div_ceil(rustix::param::page_size()) + usize::from(bytes > 0)
}

fn pipe_error(source: io::Error) -> ConnectionError {
    ConnectionError::io("using the pipe of replies")(source)
}
