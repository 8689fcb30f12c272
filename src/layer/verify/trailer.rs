//! The bytes after the end of the tar that a layer's table states: padding of any length. It belongs to the layer's diff ID, but to no
//! span's length.
//!
//! Up to [`MAX_TAIL`] bytes are stored in the file `rest`. The length of a longer tail is bounded by deflate's ratio only. So then the
//! compressed last span is stored with its window in the file `last`, and the check of the layer decodes its tail once more, piece by
//! piece.

use std::{io, ops::ControlFlow};

use super::non_file_bytes::{MAX_TAIL, NonFileBytes};
use crate::{
    error::{Kind, Result, ResultExt as _},
    gzip::{WINDOW_SIZE, inflate::SpanDecoder},
    layer::{
        read::reader::SpanReader,
        stored::{
            directory::{self, DiskDirectory},
            seal::{self, Damage},
            span_record::{SpanCheck, SpanRecord},
        },
    },
    units::SpanId,
    ztoc::{Compression, Span},
};

/// Size of one piece.
const PIECE: usize = 1 << 20;

/// The tail of a layer whose last span is present.
pub(crate) enum Tail<'a> {
    Short(&'a NonFileBytes),
    Long(Box<LastSpan>),
}

/// The last span as it was fetched.
pub(crate) struct LastSpan {
    record: Span,
    compression: Compression,
    window: Vec<u8>,
    compressed: Vec<u8>,
}

/// Stores the last span if its tail is too long for `rest`.
pub(crate) fn keep_last(
    directory: &DiskDirectory,
    window: Option<&[u8]>,
    compressed: &[u8],
) -> Result<()> {
    let mut bytes = window.map_or_else(|| vec![0; WINDOW_SIZE], <[u8]>::to_vec);
    bytes.extend_from_slice(compressed);
    directory.replace(directory::LAST, &seal::seal(bytes))
}

/// Whether a tail is too long for `rest`. At most one byte more than fits there was decoded.
pub(crate) fn is_long(tail: &[u8]) -> bool {
    tail.len() > MAX_TAIL
}

impl<'a> Tail<'a> {
    /// The stored tail. An error that is [`Damage`]: the last span has to be fetched again.
    pub(crate) fn open(
        directory: &DiskDirectory,
        reader: &SpanReader,
        rest: &'a NonFileBytes,
    ) -> Result<Self> {
        let unread = || "the stored end of the layer cannot be read".to_owned();
        let last = SpanId(reader.layout().spans().count().saturating_sub(1));
        let record = reader
            .presence()
            .bitmap()
            .record(last)
            .or_kind(Kind::Io, unread)?;
        let SpanRecord::Present(SpanCheck { has_last: true, .. }) = record else {
            return Ok(Self::Short(rest));
        };
        let record = reader
            .layout()
            .spans()
            .read(last)
            .or_kind(Kind::Io, unread)?
            .span;
        let bytes = directory.read(directory::LAST)?;
        let stored = seal::unseal(&bytes).and_then(|bytes| bytes.split_at_checked(WINDOW_SIZE));
        let (window, compressed) = stored
            .ok_or_else(|| Damage::check(directory::LAST))
            .or_kind(Kind::Io, unread)?;
        Ok(Self::Long(Box::new(LastSpan {
            record,
            compression: reader.layout().spans().compression(),
            window: window.to_vec(),
            compressed: compressed.to_vec(),
        })))
    }

    /// Passes all of it, in order, piece by piece, until `take` breaks.
    pub(crate) fn each(&self, mut take: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()> {
        match self {
            Self::Short(rest) => {
                let end = rest.length()?;
                let mut buffer = vec![0; PIECE.min(MAX_TAIL)];
                let mut position = rest.end();
                while position < end {
                    let length = buffer.len().min((end - position) as usize);
                    rest.read(position, &mut buffer[..length])?;
                    if take(&buffer[..length]).is_break() {
                        break;
                    }
                    position += length as u64;
                }
                Ok(())
            }
            Self::Long(last) => last.each(take),
        }
    }
}

impl LastSpan {
    fn each(&self, mut take: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()> {
        match self.compression {
            Compression::Uncompressed => {
                let span = &self.record.uncompressed;
                let length = (span.end.get() - span.start.get()) as usize; // its length is that of decoded bytes
                let tail = self.compressed.get(length..).unwrap_or_default();
                // `take` may have ended it early
                let _ = tail.chunks(PIECE).try_for_each(take);
                Ok(())
            }
            Compression::Gzip => SpanDecoder::default()
                .pass_beyond(
                    &self.record,
                    &self.compressed,
                    Some(&self.window),
                    &mut take,
                )
                .map_err(io::Error::other),
        }
    }
}
