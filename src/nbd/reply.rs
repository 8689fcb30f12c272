//! Replies before they are sent: headers and data are in one buffer, so data is read from the disk to the place that it is sent from, and
//! several replies leave in one system call.

use zerocopy::IntoBytes;

use super::{error::ConnectionError, protocol::*, stream::Stream};
use crate::buffer::Buffer;

/// Bytes that are gathered before they are sent. More gains nothing, and falls out of the processor's cache.
const FLUSH_AT: usize = 256 << 10;

/// Bytes of an error's text.
const MAX_MESSAGE: usize = 1024;

/// The buffer of replies of one connection.
pub(super) struct Replies<'a> {
    stream: &'a Stream,
    structured: bool,
    /// Replies take its first `filled` bytes; it is empty as long as there are no replies.
    buffer: Option<Buffer>,
    filled: usize,
}

impl<'a> Replies<'a> {
    pub(super) fn new(stream: &'a Stream, structured: bool) -> Self {
        Self {
            stream,
            structured,
            buffer: None,
            filled: 0,
        }
    }

    /// Sends the gathered replies.
    pub(super) fn flush(&mut self) -> Result<(), ConnectionError> {
        self.send()?;
        self.buffer = None;
        Ok(())
    }

    fn send(&mut self) -> Result<(), ConnectionError> {
        let filled = std::mem::take(&mut self.filled);
        match &mut self.buffer {
            Some(buffer) if filled > 0 => self
                .stream
                .write_all(buffer.of_length(filled))
                .map_err(ConnectionError::io("sending a reply")),
            _ => Ok(()),
        }
    }

    /// Done, without data.
    pub(super) fn success(&mut self, request: &Request) -> Result<(), ConnectionError> {
        // allowed beside structured replies, to all but reads
        self.put(simple(request, 0).as_bytes())
    }

    /// A read of no bytes: "unspecified", but an answer is better than none.
    pub(super) fn no_data(&mut self, request: &Request) -> Result<(), ConnectionError> {
        if self.structured {
            let (flags, kind) = (NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE);
            self.put(structured(request, flags, kind, 0).as_bytes())
        } else {
            self.put(simple(request, 0).as_bytes())
        }
    }

    /// An error, with a message if the protocol has a place for it.
    pub(super) fn error(
        &mut self,
        request: &Request,
        error: u32,
        message: &str,
    ) -> Result<(), ConnectionError> {
        if !self.structured {
            return self.put(simple(request, error).as_bytes());
        }
        let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
        let payload = ErrorPayload {
            error: error.into(),
            // at most MAX_MESSAGE
            message_length: (message.len() as u16).into(),
        };
        let length = (size_of::<ErrorPayload>() + message.len()) as u32;
        let (flags, kind) = (NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR);
        self.put(structured(request, flags, kind, length).as_bytes())?;
        self.put(payload.as_bytes())?;
        self.put(message.as_bytes())
    }

    /// A part of the reply to a read: `length` bytes at `offset`, which `fill` reads. If it fails, nothing is added.
    ///
    /// In a simple reply, the first part has the header (`first`). In a structured reply, each part is a chunk of its own, and `last` ends
    /// the reply.
    pub(super) fn data<E>(
        &mut self,
        request: &Request,
        part: Part,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ConnectionError> {
        let length = part.length as usize;
        let offset = part.offset.to_be_bytes();
        let (simple, structured) = (
            simple(request, 0),
            structured(
                request,
                if part.last { NBD_REPLY_FLAG_DONE } else { 0 },
                NBD_REPLY_TYPE_OFFSET_DATA,
                part.length + size_of_val(&offset) as u32,
            ),
        );
        let header: [&[u8]; 2] = match (self.structured, part.first) {
            (true, _) => [structured.as_bytes(), &offset],
            (false, true) => [simple.as_bytes(), &[]],
            (false, false) => [&[], &[]],
        };
        let header_length = header[0].len() + header[1].len();
        let space = self.space(header_length + length)?;
        let (head, data) = space.split_at_mut(header_length);
        if let Err(error) = fill(data) {
            return Ok(Err(error));
        }
        let (magic, rest) = head.split_at_mut(header[0].len());
        magic.copy_from_slice(header[0]);
        rest.copy_from_slice(header[1]);
        self.filled += header_length + length;
        Ok(Ok(()))
    }

    /// A hole in the reply to a structured read.
    pub(super) fn hole(&mut self, request: &Request, part: Part) -> Result<(), ConnectionError> {
        let hole = OffsetHole {
            offset: part.offset.into(),
            hole_size: part.length.into(),
        };
        let flags = if part.last { NBD_REPLY_FLAG_DONE } else { 0 };
        let (kind, length) = (NBD_REPLY_TYPE_OFFSET_HOLE, size_of::<OffsetHole>() as u32);
        self.put(structured(request, flags, kind, length).as_bytes())?;
        self.put(hole.as_bytes())
    }

    /// The extents of a range.
    pub(super) fn extents(
        &mut self,
        request: &Request,
        context: u32,
        extents: &[BlockDescriptor],
    ) -> Result<(), ConnectionError> {
        let context = context.to_be_bytes();
        let length = (context.len() + size_of_val(extents)) as u32;
        let (flags, kind) = (NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS);
        self.put(structured(request, flags, kind, length).as_bytes())?;
        self.put(&context)?;
        self.put(extents.as_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.space(bytes.len())?.copy_from_slice(bytes);
        self.filled += bytes.len();
        Ok(())
    }

    /// The next `count` bytes of the buffer; bytes before them may be sent to make room.
    fn space(&mut self, count: usize) -> Result<&mut [u8], ConnectionError> {
        if self.filled > 0 && self.filled + count > FLUSH_AT {
            self.send()?;
        }
        let buffer = self.buffer.get_or_insert_with(Buffer::lend);
        Ok(&mut buffer.of_length(self.filled + count)[self.filled..])
    }
}

/// A part of a read's reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) first: bool,
    pub(super) last: bool,
}

fn simple(request: &Request, error: u32) -> SimpleReply {
    SimpleReply {
        magic: NBD_SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: request.cookie,
    }
}

fn structured(request: &Request, flags: u16, reply_type: u16, length: u32) -> StructuredReply {
    StructuredReply {
        magic: NBD_STRUCTURED_REPLY_MAGIC.into(),
        flags: flags.into(),
        reply_type: reply_type.into(),
        cookie: request.cookie,
        length: length.into(),
    }
}
