//! What stands behind the end that a layer's table states: padding, of any length. It belongs to the layer's diff ID and to no span's length.
//!
//! As much as [`MAX_TAIL`] is kept in the file `rest`. Where there is more, its length is bounded by nothing but deflate's ratio: so the last
//! span is kept as it came, with the window before it, in a file of its own; and when the layer is checked the tail is decoded once more,
//! piece by piece.

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

/// Bytes of one piece.
const PIECE: usize = 1 << 20;

/// The tail of a layer whose last span has come.
pub(crate) enum Tail<'a> {
    Kept(&'a NonFileBytes),
    Long(Box<LastSpan>),
}

/// The last span as it came.
pub(crate) struct LastSpan {
    record: Span,
    compression: Compression,
    window: Vec<u8>,
    compressed: Vec<u8>,
}

/// Keeps the last span where its tail is too long for `rest`.
pub(crate) fn keep_last(
    directory: &DiskDirectory,
    window: Option<&[u8]>,
    compressed: &[u8],
) -> Result<()> {
    let mut bytes = window.map_or_else(|| vec![0; WINDOW_SIZE], <[u8]>::to_vec);
    bytes.extend_from_slice(compressed);
    directory.replace(directory::LAST, &seal::seal(bytes))
}

/// Whether a tail, of which at most one byte more was decoded than is kept, is too long for that.
pub(crate) fn is_long(tail: &[u8]) -> bool {
    tail.len() > MAX_TAIL
}

impl<'a> Tail<'a> {
    /// The tail as it is kept. An error that is [`Damage`]: the last span has to come again.
    pub(crate) fn open(
        directory: &DiskDirectory,
        reader: &SpanReader,
        rest: &'a NonFileBytes,
    ) -> Result<Self> {
        let unread = || "what is kept of the layer cannot be read".to_owned();
        let last = SpanId(reader.layout().spans().count().saturating_sub(1));
        let record = reader
            .presence()
            .bitmap()
            .record(last)
            .or_kind(Kind::Io, unread)?;
        let SpanRecord::Present(SpanCheck { has_last: true, .. }) = record else {
            return Ok(Self::Kept(rest));
        };
        let record = reader
            .layout()
            .spans()
            .read(last)
            .or_kind(Kind::Io, unread)?
            .span;
        let bytes = directory.read(directory::LAST)?;
        let kept = seal::unseal(&bytes).and_then(|bytes| bytes.split_at_checked(WINDOW_SIZE));
        let (window, compressed) = kept
            .ok_or_else(|| Damage::check(directory::LAST))
            .or_kind(Kind::Io, unread)?;
        Ok(Self::Long(Box::new(LastSpan {
            record,
            compression: reader.layout().spans().compression(),
            window: window.to_vec(),
            compressed: compressed.to_vec(),
        })))
    }

    /// Gives all of it, in order, piece by piece. Ends early when `take` says so.
    pub(crate) fn each(&self, mut take: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()> {
        match self {
            Self::Kept(rest) => {
                let end = rest.length()?;
                let mut buffer = vec![0; PIECE.min(MAX_TAIL)];
                let mut place = rest.end();
                while place < end {
                    let length = buffer.len().min((end - place) as usize);
                    rest.read(place, &mut buffer[..length])?;
                    if take(&buffer[..length]).is_break() {
                        break;
                    }
                    place += length as u64;
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
                let length = (span.end.get() - span.start.get()) as usize; // it was decoded
                let tail = self.compressed.get(length..).unwrap_or_default();
                // all pieces, or up to the one that is enough
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
