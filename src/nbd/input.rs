//! Requests, as they are read from the socket.

use std::ops::Range;

use zerocopy::FromBytes;

use super::{
    MAX_PAYLOAD,
    error::ConnectionError,
    protocol::{NBD_CMD_WRITE, NBD_REQUEST_MAGIC, Request},
    stream::Stream,
};

/// Size of the buffer for requests, in bytes: 146 requests. One system call reads all that a client has sent.
const INPUT: usize = 4 << 10;

/// Requests as they come from the socket.
pub(super) struct Input {
    bytes: Box<[u8]>,
    /// The bytes that are read and not yet taken.
    held: Range<usize>,
    /// A write whose data is being skipped, and how much of it is still to come.
    write: Option<(Request, usize)>,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; INPUT].into_boxed_slice(),
            held: 0..0,
            write: None,
        }
    }

    /// The next request, if the whole of it is here; a write comes when its data has been skipped.
    pub(super) fn next(&mut self) -> Result<Option<Request>, ConnectionError> {
        if let Some((request, left)) = self.write.take() {
            return Ok(self.skip_data(request, left));
        }
        let held = self.bytes.get(self.held.clone()).unwrap_or_default();
        let Ok((request, _)) = Request::read_from_prefix(held) else {
            return Ok(None);
        };
        self.held.start += size_of::<Request>();
        if request.magic.get() != NBD_REQUEST_MAGIC {
            return Err(ConnectionError::RequestMagic {
                found: request.magic.get(),
            });
        }
        if request.command.get() != NBD_CMD_WRITE {
            return Ok(Some(request));
        }
        let length = request.length.get();
        if length > MAX_PAYLOAD {
            return Err(ConnectionError::WriteLength { length });
        }
        Ok(self.skip_data(request, length as usize))
    }

    fn skip_data(&mut self, request: Request, left: usize) -> Option<Request> {
        let skipped = left.min(self.held.len());
        self.held.start += skipped;
        if skipped == left {
            return Some(request);
        }
        self.write = Some((request, left - skipped));
        None
    }

    /// Reads what the client has sent; blocks if there is nothing. False at the end of the stream.
    pub(super) fn fill(&mut self, stream: &Stream) -> Result<bool, ConnectionError> {
        if self.held.start > 0 {
            self.bytes.copy_within(self.held.clone(), 0);
            self.held = 0..self.held.len();
        }
        let free = self.bytes.get_mut(self.held.end..).unwrap_or_default();
        let count = stream
            .read(free)
            .map_err(ConnectionError::io("reading a request"))?;
        self.held.end += count;
        Ok(count > 0)
    }
}
