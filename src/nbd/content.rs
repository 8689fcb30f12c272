//! The content of replies: the bytes of a range, and their block status.

use std::{io::ErrorKind, ops::Range, sync::Arc};

use tokio::runtime::Handle;

use super::protocol::{BlockDescriptor, NBD_STATE_HOLE, NBD_STATE_ZERO};
use crate::{
    error::{Error, Kind},
    layer::{Allocation, ReadAttempts, ServedDisk},
    units::DiskOffset,
};

/// Zeroes from this length on are sent as a hole where the client understands that. For fewer it costs more than it saves: on both
/// sides a part has a header to be made and parsed.
pub(super) const MIN_HOLE: u64 = 32 << 10;

/// Maximum number of bytes of one step of `NBD_CMD_BLOCK_STATUS`, to bound the work for one reply.
const EXTENTS_STEP: u64 = 256 << 20;

/// How an extent of a read is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Data,
    Zero,
}

/// Whether a read may wait for the local disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    ForDisk,
    Not,
}

/// Why a range was not read.
pub(super) enum ReadFailure {
    /// It would have to wait.
    WouldWait,
    /// A part of it is not present any more, whenever the read comes to it.
    Evicted,
    Error(Error),
}

impl ReadFailure {
    /// The error for the client.
    pub(super) fn into_error(self) -> Error {
        let why = match self {
            Self::Error(error) => return error,
            Self::WouldWait => "the local disk does not answer at once",
            Self::Evicted => {
                "the range is evicted before it can be read: the limit of the local disk is too low"
            }
        };
        Error::new(Kind::Io, why)
    }
}

/// The source of the data of replies.
pub(super) struct Source<'a> {
    pub(super) export: &'a Arc<dyn ServedDisk>,
    pub(super) runtime: &'a Handle,
}

impl Source<'_> {
    /// Reads a range that was present a moment ago. If it is not any more, this thread waits until it is present again.
    pub(super) fn read(
        &self,
        offset: u64,
        buffer: &mut [u8],
        wait: Wait,
    ) -> Result<(), ReadFailure> {
        let range = DiskOffset(offset)..DiskOffset(offset + buffer.len() as u64);
        let mut attempts = ReadAttempts::begin();
        while attempts.another() {
            match self.read_once(offset, buffer, wait) {
                Err(ReadFailure::Evicted) => {}
                read => return read,
            }
            let fetch = Arc::clone(self.export).make_present(range.clone());
            self.runtime.block_on(fetch).map_err(|error| {
                ReadFailure::Error(Error::with_source(error.kind(), error.to_string(), error))
            })?;
        }
        Err(ReadFailure::Evicted)
    }

    /// Reads a range that was present a moment ago.
    ///
    /// Eviction clears the bit of a span before it removes the bytes, so the bytes are right if their bits are set after the read.
    pub(super) fn read_once(
        &self,
        offset: u64,
        buffer: &mut [u8],
        wait: Wait,
    ) -> Result<(), ReadFailure> {
        let start = DiskOffset(offset);
        let range = start..DiskOffset(offset + buffer.len() as u64);
        if !self.export.is_present(range.clone()) {
            return Err(ReadFailure::Evicted);
        }
        let read = match wait {
            Wait::ForDisk => self.export.read_present(start, buffer).map(|()| true),
            Wait::Not => self.export.try_read_present(start, buffer),
        };
        match read {
            Ok(true) if self.export.is_present(range) => Ok(()),
            Ok(true) => Err(ReadFailure::Evicted),
            Ok(false) => Err(ReadFailure::WouldWait),
            Err(source) if source.kind() == ErrorKind::Interrupted => Err(ReadFailure::Evicted),
            Err(source) => {
                let why = "the local disk cannot be read";
                Err(ReadFailure::Error(Error::with_source(
                    Kind::Io,
                    why,
                    source,
                )))
            }
        }
    }

    /// The extents of a read: zeroes where a hole pays, data elsewhere.
    pub(super) fn extents(&self, range: Range<u64>) -> Vec<(u64, Content)> {
        let length = range.end - range.start;
        let mut extents: Vec<(u64, Content)> = Vec::new();
        let mut sum = 0;
        for (length, allocation) in self
            .export
            .allocation(DiskOffset(range.start)..DiskOffset(range.end))
        {
            sum += length;
            let content = match allocation {
                Allocation::Zero if length >= MIN_HOLE => Content::Zero,
                Allocation::Zero | Allocation::Present | Allocation::Absent => Content::Data,
            };
            match extents.last_mut() {
                Some((last, Content::Data)) if content == Content::Data => *last += length,
                _ => extents.push((length, content)),
            }
        }
        if sum != length {
            debug_assert!(false, "extents of {range:?} are {sum} bytes long");
            return vec![(length, Content::Data)];
        }
        extents
    }
}

/// The first extents of a range for `base:allocation`; adjacent extents with the same flags are merged.
///
/// An absent range is data that has not been fetched yet, not a hole: a client that took it for a hole would read zeroes.
pub(super) fn status(
    export: &dyn ServedDisk,
    range: Range<DiskOffset>,
    limit: usize,
) -> Vec<BlockDescriptor> {
    let (mut at, end) = (range.start.get(), range.end.get());
    let mut extents: Vec<BlockDescriptor> = Vec::new();
    while at < end {
        let step_end = end.min(at.saturating_add(EXTENTS_STEP));
        for (length, allocation) in export.allocation(DiskOffset(at)..DiskOffset(step_end)) {
            let flags = match allocation {
                Allocation::Present | Allocation::Absent => 0,
                Allocation::Zero => NBD_STATE_HOLE | NBD_STATE_ZERO,
            };
            at += length;
            let full = extents.len() == limit;
            match (extents.last_mut(), u32::try_from(length)) {
                // the sum is the length of a part of the range, and that has 32 bits
                (Some(last), Ok(length)) if last.status_flags.get() == flags => {
                    last.length += length;
                }
                (_, Ok(length)) if length > 0 && !full => extents.push(BlockDescriptor {
                    length: length.into(),
                    status_flags: flags.into(),
                }),
                (_, Ok(0)) => {}
                _ => return extents,
            }
        }
        if at != step_end {
            debug_assert!(false, "the extents up to {step_end} end at {at}");
            return extents;
        }
    }
    extents
}
