//! The spans of a blob, collected in one pass: checkpoints and digests.

use crate::{
    gzip::scan::Checkpoint,
    oci::{Digest, digest::Hasher},
    ztoc::{CheckpointsBuilder, Compression, TarInfo, WINDOW_SIZE},
};

/// The size, about, above which no zTOC is made. FlatBuffers end at 2 GiB, and a builder doubles its memory to get there.
pub(super) const MAX_ZTOC_SIZE: u64 = 1 << 30;

/// More spans than this make no zTOC: their windows alone would pass [`MAX_ZTOC_SIZE`].
const MAX_CHECKPOINTS: usize = (MAX_ZTOC_SIZE / WINDOW_SIZE as u64) as usize;

/// More spans of a plain tar than this make no zTOC: a digest is a string of 71 bytes.
const MAX_FIXED: usize = (MAX_ZTOC_SIZE / 128) as usize;

/// The mode of collection.
pub(super) enum Spans {
    /// Nothing is collected: no zTOC is wanted, or none is possible.
    None,
    /// More spans than a zTOC can hold.
    TooMany,
    /// Spans between checkpoints of a gzip blob.
    Checkpoints(Checkpoints),
    /// Spans of one size in a plain tar.
    Fixed(Fixed),
}

/// See [`Spans::Checkpoints`].
pub(super) struct Checkpoints {
    builder: CheckpointsBuilder,
    /// The complete spans.
    digests: Vec<Digest>,
    /// The current span; bytes before the first checkpoint are in no span.
    hasher: Option<Hasher>,
    /// The latest byte: two spans share it when the second starts in its middle.
    last_byte: u8,
}

/// See [`Spans::Fixed`].
pub(super) struct Fixed {
    span_size: u64,
    digests: Vec<Digest>,
    hasher: Hasher,
    /// Bytes of the passing span.
    have: u64,
}

impl Spans {
    /// For a gzip blob.
    pub(super) fn checkpoints(span_size: u64) -> Self {
        Self::Checkpoints(Checkpoints {
            builder: CheckpointsBuilder::new(span_size),
            digests: Vec::new(),
            hasher: None,
            last_byte: 0,
        })
    }

    /// For a plain tar.
    pub(super) fn fixed(span_size: u64) -> Self {
        if span_size == 0 {
            return Self::TooMany;
        }
        Self::Fixed(Fixed {
            span_size,
            digests: Vec::new(),
            hasher: Hasher::default(),
            have: 0,
        })
    }

    /// Bytes of the blob.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        match self {
            Self::None | Self::TooMany => {}
            Self::Checkpoints(spans) => {
                if let Some(hasher) = &mut spans.hasher {
                    hasher.update(bytes);
                }
                if let Some(&last) = bytes.last() {
                    spans.last_byte = last;
                }
            }
            Self::Fixed(spans) => {
                spans.take(bytes);
                if spans.digests.len() > MAX_FIXED {
                    *self = Self::TooMany;
                }
            }
        }
    }

    /// A span starts after the bytes that were taken.
    pub(super) fn start(&mut self, at: &Checkpoint<'_>) {
        let Self::Checkpoints(spans) = self else {
            return;
        };
        if spans.builder.len() >= MAX_CHECKPOINTS {
            *self = Self::TooMany;
            return;
        }
        if let Some(hasher) = spans.hasher.take() {
            spans.digests.push(hasher.finish());
        }
        let mut hasher = Hasher::default();
        if at.bits != 0 {
            hasher.update(&[spans.last_byte]);
        }
        spans.hasher = Some(hasher);
        spans.builder.push(at.input, at.output, at.bits, at.window);
    }

    /// The end of the blob, which has `size` bytes: the spans in the form of a zTOC.
    pub(super) fn finish(self, size: u64) -> Result<(Compression, Vec<u8>, Vec<Digest>), String> {
        match self {
            Self::None => Err("no spans were collected".to_owned()),
            Self::TooMany => {
                Err("it has more spans than a zTOC can hold; use a larger span size".to_owned())
            }
            Self::Checkpoints(mut spans) => {
                if let Some(hasher) = spans.hasher.take() {
                    spans.digests.push(hasher.finish());
                }
                Ok((Compression::Gzip, spans.builder.finish(), spans.digests))
            }
            Self::Fixed(mut spans) => {
                if spans.have > 0 {
                    spans.digests.push(spans.hasher.finish());
                }
                let span_size = spans.span_size;
                let info = TarInfo { span_size, size };
                Ok((Compression::Uncompressed, info.to_bytes(), spans.digests))
            }
        }
    }
}

impl Fixed {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = self.span_size - self.have;
            let count = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (now, rest) = bytes.split_at(count);
            self.hasher.update(now);
            self.have += count as u64;
            bytes = rest;
            if self.have == self.span_size {
                self.digests.push(std::mem::take(&mut self.hasher).finish());
                self.have = 0;
            }
        }
    }
}
