//! What goes wrong, and when.

use std::time::Duration;

use bytes::Bytes;
use socinbd::oci::Digest;

use super::Kind;

/// Which requests a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All.
    Any,
    /// Those of one kind.
    Kind(Kind),
    /// Those that send a blob's bytes, from whichever listener: not the redirects.
    Data,
    /// As `Data`, of one blob.
    DataOf(Digest),
}

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// The next so many requests that match.
    Next(u64),
    /// Until [`Registry::heal`].
    UntilHealed,
    /// One request, after so many others that match.
    After(u64),
    /// All requests after so many others that match, until [`Registry::heal`].
    AllAfter(u64),
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The answer comes this much later.
    Delay(Duration),
    /// No answer ever comes.
    Hang,
    /// The connection ends without an answer.
    Close,
    /// The connection ends after this many bytes of the body.
    Cut {
        /// Bytes that still arrive.
        after: u64,
    },
    /// An upload: so many bytes of the request's body are kept, and the connection ends without an answer.
    TakePart {
        /// Bytes kept.
        bytes: u64,
    },
    /// The request does its work, and the connection ends without an answer.
    LoseAnswer,
    /// A body that is shorter than asked, in a well-formed answer that does not admit it.
    Truncate {
        /// Bytes that it has.
        to: u64,
    },
    /// More bytes than asked, without a length.
    TooLong {
        /// How many more.
        by: u64,
    },
    /// Other bytes of the blob than asked, with a `Content-Range` that says so.
    WrongRange {
        /// How much further on they start.
        shift: u64,
    },
    /// A part of the range only, as its `Content-Range` says.
    Part {
        /// Its bytes, at most.
        of: u64,
    },
    /// The right bytes, with this `Content-Range`; none when it is empty.
    ContentRange(String),
    /// `multipart/byteranges`, which nobody asked for.
    Multipart,
    /// One byte of the body is flipped.
    WrongByte {
        /// Which, from the body's start.
        at: u64,
    },
    /// So many bytes at a time, with a pause after each.
    Drip {
        /// Bytes at a time.
        bytes: u64,
        /// The pause.
        pause: Duration,
    },
    /// Nothing more comes after this many bytes; the connection stays.
    Stall {
        /// Bytes that still arrive.
        after: u64,
    },
    /// This status, with an OCI error body.
    Status {
        /// The code.
        code: u16,
        /// `Retry-After`, as it is to stand in the header.
        retry_after: Option<String>,
    },
    /// This status, these headers, this body.
    Answer {
        /// The code.
        code: u16,
        /// The headers.
        headers: Vec<(String, String)>,
        /// The body.
        body: Bytes,
    },
    /// 200 and the whole blob, whatever `Range` says.
    IgnoreRange,
    /// 416, although the range is right. With a length and no body, as `docker-registry` does it.
    Unsatisfiable,
    /// A redirect.
    Redirect {
        /// Where to; `{self}` stands for the request's own URL.
        location: String,
    },
    /// 200 with this instead.
    Replace {
        /// `Content-Type`.
        content_type: String,
        /// The body.
        body: Bytes,
        /// Further headers.
        headers: Vec<(String, String)>,
    },
}

impl Fault {
    /// A status without `Retry-After`.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            retry_after: None,
        }
    }
}

impl Times {
    /// Whether a request that matches is hit. It is counted.
    pub(super) fn hits(&mut self) -> bool {
        match self {
            Self::Next(0) => false,
            Self::Next(left) => {
                *left -= 1;
                true
            }
            Self::UntilHealed => true,
            Self::After(0) => {
                *self = Self::Next(0);
                true
            }
            Self::AllAfter(0) => true,
            Self::After(before) | Self::AllAfter(before) => {
                *before -= 1;
                false
            }
        }
    }
}

pub(super) struct Rule {
    pub(super) on: On,
    pub(super) fault: Fault,
    pub(super) times: Times,
}
