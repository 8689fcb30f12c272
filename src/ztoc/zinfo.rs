//! The `checkpoints` blob of a zTOC: for gzip soci's "zinfo", for plain tars a FlatBuffer of their sizes.

use super::{
    Error,
    flatbuffer::Table,
    slots::tar_zinfo,
    write::{signed, voffset},
};
use crate::units::{CompressedOffset, LayerOffset};

/// Bytes of a checkpoint's window: deflate's whole history.
pub const WINDOW_SIZE: usize = 32 * 1024;

/// `i32 have`, `i64 span_size`.
const HEADER_SIZE: usize = 12;
/// `i64 in`, `i64 out`, `u8 bits`.
const FIXED_SIZE: usize = 17;
/// A checkpoint with its window.
const CHECKPOINT_SIZE: usize = FIXED_SIZE + WINDOW_SIZE;

/// A checkpoint as it is stored. Nothing in it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// The compressed offset of the first whole byte after it.
    pub(super) input: i64,
    /// The uncompressed offset.
    pub(super) output: i64,
    /// Bits of the byte before `input` that belong to the block that starts here.
    pub(super) bits: u8,
    /// Where its window starts in the blob; version 1 has none for the first.
    pub(super) window: Option<usize>,
}

/// The gzip form: a header, and checkpoints without padding, all little-endian. Version 1 leaves the first checkpoint out; which
/// version a blob has follows from its length.
#[derive(Debug)]
pub(super) struct GzipInfo<'a> {
    pub(super) span_size: i64,
    /// Checkpoints in all.
    pub(super) count: usize,
    /// Whether the first one is implied.
    pub(super) is_version_1: bool,
    stored: &'a [u8],
}

impl<'a> GzipInfo<'a> {
    pub(super) fn parse(blob: &'a [u8]) -> Result<Self, Error> {
        let bad = Error::CheckpointsLength { length: blob.len() };
        let (Some(have), Some(span_size), Some(stored)) = (
            blob.first_chunk::<4>(),
            blob.get(4..).and_then(<[u8]>::first_chunk::<8>),
            blob.get(HEADER_SIZE..),
        ) else {
            return Err(bad);
        };
        let Ok(count) = usize::try_from(i32::from_le_bytes(*have)) else {
            return Err(bad);
        };
        let whole = stored.len() / CHECKPOINT_SIZE;
        // a zTOC with no checkpoint at all cannot be read by anyone
        if !stored.len().is_multiple_of(CHECKPOINT_SIZE) || count == 0 {
            return Err(bad);
        }
        let is_version_1 = match count.checked_sub(whole) {
            Some(0) => false,
            Some(1) => true,
            _ => return Err(bad),
        };
        Ok(Self {
            span_size: i64::from_le_bytes(*span_size),
            count,
            is_version_1,
            stored,
        })
    }

    /// The checkpoints, the implied one too.
    pub(super) fn checkpoints(&self) -> impl Iterator<Item = Checkpoint> {
        let implied = self.is_version_1.then_some(Checkpoint {
            input: 10, // the shortest gzip header
            output: 0,
            bits: 0,
            window: None,
        });
        let stored = self.stored.chunks_exact(CHECKPOINT_SIZE).enumerate();
        implied.into_iter().chain(stored.filter_map(|(at, bytes)| {
            let number = |from: usize| {
                bytes
                    .get(from..)
                    .and_then(<[u8]>::first_chunk)
                    .map(|bytes| i64::from_le_bytes(*bytes))
            };
            Some(Checkpoint {
                input: number(0)?,
                output: number(8)?,
                bits: *bytes.get(16)?,
                // within the blob, which is in memory
                window: Some(
                    at.wrapping_mul(CHECKPOINT_SIZE)
                        .wrapping_add(HEADER_SIZE)
                        .wrapping_add(FIXED_SIZE),
                ),
            })
        }))
    }
}

/// Collects the checkpoints of a gzip layer in their stored form (version 2), so that a builder keeps each window once.
#[derive(Clone, Debug)]
pub struct CheckpointsBuilder {
    blob: Vec<u8>,
    count: usize,
    last_output: Option<LayerOffset>,
}

impl CheckpointsBuilder {
    /// No checkpoint yet. `span_size` is the one that was asked for.
    pub fn new(span_size: u64) -> Self {
        let mut blob = vec![0; 4];
        blob.extend_from_slice(&signed(span_size).to_le_bytes());
        Self {
            blob,
            count: 0,
            last_output: None,
        }
    }

    /// Adds a checkpoint. `input` is the blob's first whole byte after it, `bits` (0 to 7) how many bits of the byte before belong to
    /// the block that starts here; `window` the last output before it, at most [`WINDOW_SIZE`], oldest first (a shorter one is
    /// zero-filled at its front). A checkpoint with the same `output` as the last one replaces it: AWS's daemon refuses empty spans.
    pub fn push(&mut self, input: CompressedOffset, output: LayerOffset, bits: u8, window: &[u8]) {
        if self.last_output == Some(output) {
            let kept = self.blob.len().saturating_sub(CHECKPOINT_SIZE);
            self.blob.truncate(kept);
            self.count = self.count.saturating_sub(1);
        }
        self.last_output = Some(output);
        self.count = self.count.saturating_add(1);
        let excess = window.len().saturating_sub(WINDOW_SIZE);
        let window = window.get(excess..).unwrap_or_default();
        self.blob
            .extend_from_slice(&signed(input.get()).to_le_bytes());
        self.blob
            .extend_from_slice(&signed(output.get()).to_le_bytes());
        self.blob.push(bits);
        let missing = WINDOW_SIZE.saturating_sub(window.len());
        self.blob.resize(self.blob.len().saturating_add(missing), 0);
        self.blob.extend_from_slice(window);
    }

    /// How many checkpoints there are: the spans of the layer.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The blob.
    pub fn finish(mut self) -> Vec<u8> {
        let have = i32::try_from(self.count).unwrap_or(i32::MAX).to_le_bytes();
        for (to, from) in self.blob.iter_mut().zip(have) {
            *to = from;
        }
        self.blob
    }
}

/// The `TarZinfo` of a plain tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TarInfo {
    /// Bytes a span; not 0.
    pub span_size: u64,
    /// The tar's size.
    pub size: u64,
}

impl TarInfo {
    /// Reads the blob. Its `version` is not looked at: AWS's reader does not either, and there has been one layout only.
    pub(super) fn parse(blob: &[u8]) -> Result<Self, Error> {
        let table = Table::root(blob).map_err(|_| Error::TarInfo)?;
        let number = |slot| {
            let number = table.i64(slot).map_err(|_| Error::TarInfo)?;
            u64::try_from(number).map_err(|_| Error::TarInfo)
        };
        let info = Self {
            span_size: number(tar_zinfo::SPAN_SIZE)?,
            size: number(tar_zinfo::SIZE)?,
        };
        if info.span_size == 0 {
            return Err(Error::TarInfo);
        }
        Ok(info)
    }

    /// How many spans the tar has.
    pub fn spans(self) -> u64 {
        self.size.div_ceil(self.span_size.max(1))
    }

    /// The blob.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut to = flatbuffers::FlatBufferBuilder::new();
        let table = to.start_table();
        to.push_slot(voffset(tar_zinfo::VERSION), tar_zinfo::CURRENT_VERSION, 0);
        to.push_slot(voffset(tar_zinfo::SPAN_SIZE), signed(self.span_size), 0);
        to.push_slot(voffset(tar_zinfo::SIZE), signed(self.size), 0);
        let root = to.end_table(table);
        to.finish_minimal(root);
        to.finished_data().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(have: i32, stored: usize) -> Vec<u8> {
        let mut blob = have.to_le_bytes().to_vec();
        blob.extend_from_slice(&4096_i64.to_le_bytes());
        blob.resize(HEADER_SIZE + stored, 0);
        blob
    }

    fn count(have: i32, stored: usize) -> Option<(usize, bool)> {
        GzipInfo::parse(&blob(have, stored))
            .ok()
            .map(|info| (info.count, info.is_version_1))
    }

    #[test]
    fn the_version_follows_from_the_length() {
        assert_eq!(count(2, 2 * CHECKPOINT_SIZE), Some((2, false)));
        assert_eq!(count(2, CHECKPOINT_SIZE), Some((2, true)));
        assert_eq!(count(1, 0), Some((1, true)));
        assert_eq!(count(0, 0), None);
        assert_eq!(count(2, 0), None);
        assert_eq!(count(1, 2 * CHECKPOINT_SIZE), None);
        assert_eq!(count(1, 1), None);
        assert_eq!(count(-1, 0), None);
        // 131005 * 32785 is 31629 more than 2^32: AWS's reader takes this blob for one of 131005 checkpoints
        assert_eq!(count(131_005, 31_629), None);
        assert!(GzipInfo::parse(&[0; 11]).is_err());
    }

    #[test]
    fn what_is_built_is_read_and_equal_outputs_are_replaced() {
        let mut builder = CheckpointsBuilder::new(4096);
        builder.push(CompressedOffset(10), LayerOffset(0), 0, &[]);
        builder.push(CompressedOffset(15), LayerOffset(0), 3, &[]);
        builder.push(CompressedOffset(99), LayerOffset(5000), 0, &[7; 40_000]);
        assert_eq!(builder.len(), 2);
        let blob = builder.finish();
        let info = GzipInfo::parse(&blob).expect("it was just built");
        assert_eq!((info.span_size, info.is_version_1), (4096, false));
        let found: Vec<_> = info.checkpoints().collect();
        let numbers: Vec<_> = found.iter().map(|c| (c.input, c.output, c.bits)).collect();
        assert_eq!(numbers, [(15, 0, 3), (99, 5000, 0)]);
        let window = found[1].window.expect("version 2 stores all windows");
        assert_eq!(blob[window..window + WINDOW_SIZE], [7; WINDOW_SIZE]);
        assert_eq!(window + WINDOW_SIZE, blob.len());
    }

    #[test]
    fn a_tar_s_sizes_come_back() {
        let info = TarInfo {
            span_size: 8192,
            size: 25_088,
        };
        assert_eq!(TarInfo::parse(&info.to_bytes()).ok(), Some(info));
        assert_eq!(info.spans(), 4);
        assert!(
            TarInfo::parse(
                &TarInfo {
                    span_size: 0,
                    size: 1
                }
                .to_bytes()
            )
            .is_err()
        );
        assert!(TarInfo::parse(&[]).is_err());
    }
}
