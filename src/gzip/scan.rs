//! One pass over a gzip blob: its bytes as they inflate, and checkpoints where deflate blocks end.
//!
//! Checkpoints stand where AWS's tool puts them (zlib's `Z_BLOCK` loop): at the end of the first member's header, and then at each end
//! of a block, or of a later member's header, that lies more than the span size behind the checkpoint before.

use flate2::Crc;

use super::{
    TRAILER_SIZE, WINDOW_SIZE,
    header::{self, HeaderReader, MAGIC},
    zlib::{BlockInflater, Stop},
};
use crate::units::{CompressedOffset, LayerOffset};

/// Output that is made before the window is moved to the buffer's front again.
const ROOM: usize = 256 * 1024;

/// Below so much free room the window is moved.
const LEAST_ROOM: usize = 32 * 1024;

/// What the next bytes are.
#[derive(Debug)]
pub enum Event<'a> {
    /// The next bytes of the uncompressed stream. Never empty.
    Data(&'a [u8]),
    /// A span starts here: all bytes taken from the input so far lie before [`Checkpoint::input`].
    Checkpoint(Checkpoint<'a>),
}

/// Where inflating can start anew.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint<'a> {
    /// The blob's first whole byte behind it.
    pub input: CompressedOffset,
    /// Its place in the uncompressed stream.
    pub output: LayerOffset,
    /// So many high bits (0 to 7) of the byte before `input` belong to the block that starts here.
    pub bits: u8,
    /// The 32 KiB of output before it, oldest first; zeros before the stream's start.
    pub window: &'a [u8],
    /// For which of the scanner's span sizes it stands here.
    pub due: [bool; 2],
}

/// Takes a gzip blob's bytes as they come. Its memory does not depend on the input.
///
/// Members may follow each other (RFC 1952, 2.2), and each is checked against its trailer. What follows the last member and does
/// not start with a member's first three bytes is ignored, padding as well as garbage: so do gzip and pigz, which containerd
/// unpacks with where they are installed.
#[derive(Debug)]
pub struct Scanner {
    rhythms: [Rhythm; 2],
    state: ScanState,
    inflater: BlockInflater,
    /// The last [`WINDOW_SIZE`] bytes of output or more, up to `end`; behind it free room.
    buffer: Box<[u8]>,
    end: usize,
    crc: Crc,
    /// Bytes taken.
    taken: u64,
    /// Bytes of output.
    output: u64,
    /// A checkpoint that stands here and has not been told: its bits, and what it is due for.
    pending: Option<(u8, [bool; 2])>,
    /// Bytes behind the last member.
    ignored: u64,
}

/// How often checkpoints stand.
#[derive(Debug)]
struct Rhythm {
    /// `None`: there are none.
    span_size: Option<u64>,
    /// The output before the latest one.
    last: Option<u64>,
}

impl Rhythm {
    fn new(span_size: Option<u64>) -> Self {
        Self {
            span_size,
            last: None,
        }
    }

    /// Whether one stands at the end of a block here. Strictly more, as zlib's loop has it. A second checkpoint at the stream's start
    /// (the first block or member is empty) is not made: AWS's tool makes it, and AWS's daemon then refuses the zTOC for its empty span.
    fn is_due(&self, output: u64) -> bool {
        self.span_size
            .is_some_and(|size| self.last.is_none_or(|last| output - last > size))
    }
}

#[derive(Debug)]
enum ScanState {
    Header(HeaderReader),
    Deflate,
    /// So many bytes of the trailer are here.
    Trailer([u8; TRAILER_SIZE], usize),
    /// Behind a member: so many bytes of [`MAGIC`] have been seen.
    Between(usize),
    /// Behind the last member.
    Ignored,
}

impl Scanner {
    /// At the start of a blob. `u64::MAX` makes one checkpoint only.
    pub fn new(span_size: u64) -> Self {
        Self::with_sizes([Some(span_size), None])
    }

    /// As [`Self::new`], with checkpoints for two sizes of spans, each as if it were alone; `None`: none.
    pub fn with_sizes(span_sizes: [Option<u64>; 2]) -> Self {
        Self {
            rhythms: span_sizes.map(Rhythm::new),
            state: ScanState::Header(HeaderReader::default()),
            inflater: BlockInflater::new(),
            buffer: vec![0; WINDOW_SIZE + ROOM].into_boxed_slice(),
            end: WINDOW_SIZE,
            crc: Crc::new(),
            taken: 0,
            output: 0,
            pending: None,
            ignored: 0,
        }
    }

    /// The next event in `input`, which is moved past what was taken; `None` when all is taken and more is needed. After an error
    /// the scanner is of no more use.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Event<'_>>, Error> {
        if let Some((bits, due)) = self.pending.take() {
            for (rhythm, due) in self.rhythms.iter_mut().zip(due) {
                if due {
                    rhythm.last = Some(self.output);
                }
            }
            return Ok(Some(Event::Checkpoint(Checkpoint {
                input: CompressedOffset(self.taken),
                output: LayerOffset(self.output),
                bits,
                window: &self.buffer[self.end - WINDOW_SIZE..self.end],
                due,
            })));
        }
        while !input.is_empty() {
            if let ScanState::Deflate = self.state {
                let written = self.inflate(input)?;
                if written > 0 {
                    return Ok(Some(Event::Data(
                        &self.buffer[self.end - written..self.end],
                    )));
                }
            } else {
                self.frame(input)?;
            }
            if self.pending.is_some() {
                return self.next(input); // once: the pending one is told first
            }
        }
        Ok(None)
    }

    /// The end of the blob: an error when it is in the middle of a member.
    pub fn finish(self) -> Result<Finished, Error> {
        match self.state {
            ScanState::Between(seen) => Ok(Finished {
                compressed_size: self.taken,
                uncompressed_size: self.output,
                ignored: seen as u64,
            }),
            ScanState::Ignored => Ok(Finished {
                compressed_size: self.taken,
                uncompressed_size: self.output,
                ignored: self.ignored,
            }),
            ScanState::Header(_) | ScanState::Deflate | ScanState::Trailer(..) => {
                Err(Error::Truncated {
                    compressed_offset: self.taken,
                })
            }
        }
    }

    /// Inflates some of the input; returns how much came out.
    fn inflate(&mut self, input: &mut &[u8]) -> Result<usize, Error> {
        if self.buffer.len() - self.end < LEAST_ROOM {
            self.buffer.copy_within(self.end - WINDOW_SIZE..self.end, 0);
            self.end = WINDOW_SIZE;
        }
        let step = self
            .inflater
            .inflate(input, &mut self.buffer[self.end..])
            .map_err(|message| Error::Deflate {
                compressed_offset: self.taken,
                layer_offset: self.output,
                message,
            })?;
        if step.taken == 0 && step.written == 0 && step.stop == Stop::Buffers {
            // there is input and there is room: zlib goes on, or it is broken, and then this must not spin
            return Err(Error::Deflate {
                compressed_offset: self.taken,
                layer_offset: self.output,
                message: "no progress",
            });
        }
        self.take(input, step.taken);
        self.crc
            .update(&self.buffer[self.end..self.end + step.written]);
        self.end += step.written;
        self.output += step.written as u64;
        match step.stop {
            Stop::Buffers => {}
            Stop::Block { bits } => self.boundary(bits),
            Stop::End => self.state = ScanState::Trailer([0; TRAILER_SIZE], 0),
        }
        Ok(step.written)
    }

    /// Takes some of what stands between deflate streams.
    fn frame(&mut self, input: &mut &[u8]) -> Result<(), Error> {
        match &mut self.state {
            ScanState::Header(reader) => {
                let start = self.taken;
                let taken = reader.read(input).map_err(|source| Error::Header {
                    compressed_offset: start,
                    source,
                })?;
                let done = reader.is_done();
                self.take(input, taken);
                if done {
                    self.inflater.reset();
                    self.crc.reset();
                    self.state = ScanState::Deflate;
                    self.boundary(0);
                }
            }
            ScanState::Trailer(bytes, have) => {
                let taken = input.len().min(TRAILER_SIZE - *have);
                bytes[*have..*have + taken].copy_from_slice(&input[..taken]);
                *have += taken;
                let [a, b, c, d, e, f, g, h] = *bytes;
                let complete = *have == TRAILER_SIZE;
                self.take(input, taken);
                if complete {
                    self.check_trailer(
                        u32::from_le_bytes([a, b, c, d]),
                        u32::from_le_bytes([e, f, g, h]),
                    )?;
                    self.state = ScanState::Between(0);
                }
            }
            ScanState::Between(seen) => {
                let seen = *seen;
                if input.first() != MAGIC.get(seen) {
                    self.ignored = seen as u64;
                    self.state = ScanState::Ignored;
                    return Ok(());
                }
                self.take(input, 1);
                self.state = if seen + 1 < MAGIC.len() {
                    ScanState::Between(seen + 1)
                } else {
                    let mut reader = HeaderReader::default();
                    reader.read(&MAGIC).map_err(|source| Error::Header {
                        compressed_offset: self.taken,
                        source,
                    })?;
                    ScanState::Header(reader)
                };
            }
            ScanState::Ignored => {
                let rest = input.len();
                self.ignored += rest as u64;
                self.take(input, rest);
            }
            ScanState::Deflate => {}
        }
        Ok(())
    }

    /// Between two blocks, or before a member's first.
    fn boundary(&mut self, bits: u8) {
        let due = [0, 1].map(|rhythm: usize| self.rhythms[rhythm].is_due(self.output));
        if due.contains(&true) {
            self.pending = Some((bits, due));
        }
    }

    fn check_trailer(&self, crc: u32, size: u32) -> Result<(), Error> {
        let compressed_offset = self.taken - TRAILER_SIZE as u64;
        if crc != self.crc.sum() {
            return Err(Error::Crc {
                compressed_offset,
                stored: crc,
                computed: self.crc.sum(),
            });
        }
        if size != self.crc.amount() {
            return Err(Error::Size {
                compressed_offset,
                stored: size,
                computed: self.crc.amount(),
            });
        }
        Ok(())
    }

    fn take(&mut self, input: &mut &[u8], count: usize) {
        *input = &input[count..];
        self.taken += count as u64;
    }
}

/// A blob that has ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Bytes of the blob.
    pub compressed_size: u64,
    /// Bytes of the uncompressed stream.
    pub uncompressed_size: u64,
    /// Bytes of the blob behind the last member, ignored.
    pub ignored: u64,
}

/// Why a gzip blob could not be read. Offsets are of the blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A member's header is wrong.
    #[error("bad gzip header at {compressed_offset} of the blob")]
    Header {
        /// Where it went wrong, at the latest.
        compressed_offset: u64,
        /// What is wrong.
        source: header::Error,
    },
    /// The compressed data are wrong.
    #[error(
        "bad deflate data at {compressed_offset} of the blob ({layer_offset} of the layer): {message}"
    )]
    Deflate {
        /// Where in the blob, at the earliest.
        compressed_offset: u64,
        /// Where in the layer, at the earliest.
        layer_offset: u64,
        /// zlib's words.
        message: &'static str,
    },
    /// A member's bytes do not have the CRC-32 of its trailer.
    #[error(
        "the gzip member that ends at {compressed_offset} of the blob has CRC {computed:08x}, and its trailer says {stored:08x}"
    )]
    Crc {
        /// Where the trailer starts.
        compressed_offset: u64,
        /// By the trailer.
        stored: u32,
        /// By the bytes.
        computed: u32,
    },
    /// A member is not so long as its trailer says.
    #[error(
        "the gzip member that ends at {compressed_offset} of the blob has {computed} bytes modulo 2^32, and its trailer says {stored}"
    )]
    Size {
        /// Where the trailer starts.
        compressed_offset: u64,
        /// By the trailer.
        stored: u32,
        /// By the bytes.
        computed: u32,
    },
    /// The blob ends in a member.
    #[error("the gzip blob ends at {compressed_offset}, in the middle of a member")]
    Truncated {
        /// The blob's size.
        compressed_offset: u64,
    },
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compress, Compression, FlushCompress, write::GzEncoder};

    use super::*;

    /// Owned copies of all events.
    #[derive(Debug, Default, PartialEq)]
    struct Scan {
        data: Vec<u8>,
        /// input, output, bits, window
        checkpoints: Vec<(u64, u64, u8, Vec<u8>)>,
    }

    fn scan(blob: &[u8], span_size: u64, piece: usize) -> Result<(Scan, Finished), Error> {
        let mut scanner = Scanner::new(span_size);
        let mut scan = Scan::default();
        for piece in blob.chunks(piece) {
            let mut rest = piece;
            while let Some(event) = scanner.next(&mut rest)? {
                match event {
                    Event::Data(bytes) => scan.data.extend(bytes),
                    Event::Checkpoint(at) => scan.checkpoints.push((
                        at.input.get(),
                        at.output.get(),
                        at.bits,
                        at.window.to_vec(),
                    )),
                }
            }
            assert!(rest.is_empty());
        }
        Ok((scan, scanner.finish()?))
    }

    fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn text(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.extend(format!("{} {}\n", state >> 8, bytes.len()).bytes());
        }
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn however_the_blob_is_cut_the_events_are_the_same() {
        let bytes = text(900_000);
        let mut blob = gzip(&bytes[..500_000], 6);
        blob.extend(gzip(&bytes[500_000..], 1));
        let whole = scan(&blob, 0, usize::MAX).unwrap();
        assert!(whole.0.data == bytes);
        assert!(whole.0.checkpoints.len() > 8);
        assert!(whole.0.checkpoints.iter().any(|(_, _, bits, _)| *bits != 0));
        for (_, output, _, window) in &whole.0.checkpoints {
            let known = bytes[..*output as usize].iter().rev();
            let padded = known.chain(std::iter::repeat(&0)).take(WINDOW_SIZE);
            assert!(window.iter().rev().eq(padded), "window at {output}");
        }
        for piece in [1, 7, 4096, 65_536] {
            assert!(scan(&blob, 0, piece).unwrap() == whole, "pieces of {piece}");
        }
    }

    #[test]
    fn two_sizes_are_as_each_alone() {
        let bytes = text(900_000);
        let blob = gzip(&bytes, 6);
        let places = |sizes: [Option<u64>; 2], which: usize| {
            let mut scanner = Scanner::with_sizes(sizes);
            let mut rest = &blob[..];
            let mut places = Vec::new();
            while let Some(event) = scanner.next(&mut rest).unwrap() {
                if let Event::Checkpoint(at) = event
                    && at.due[which]
                {
                    places.push((at.input, at.output, at.bits));
                }
            }
            places
        };
        let (coarse, fine) = (Some(200_000), Some(50_000));
        assert_eq!(places([coarse, fine], 0), places([coarse, None], 0));
        assert_eq!(places([coarse, fine], 1), places([fine, None], 0));
        assert_ne!(places([coarse, fine], 0), places([coarse, fine], 1));
        assert_eq!(places([None, coarse], 0), []);
    }

    #[test]
    fn spans_are_longer_than_asked_for() {
        let bytes = text(900_000);
        let blob = gzip(&bytes, 6);
        let outputs = |span_size| -> Vec<u64> {
            let (scan, _) = scan(&blob, span_size, 4096).unwrap();
            scan.checkpoints.iter().map(|at| at.1).collect()
        };
        let all = outputs(0);
        assert_eq!(outputs(u64::MAX), [0]);
        // "strictly more": a span size that is a block's length skips that block's end
        assert_eq!(outputs(all[1])[1], all[2]);
        assert_eq!(outputs(all[1] - 1)[1], all[1]);
    }

    #[test]
    fn empty_first_blocks_and_members_make_one_checkpoint() {
        let mut blob = gzip(b"", 6);
        blob.extend(gzip(b"x", 6));
        let (scan_, _) = scan(&blob, 0, 100).unwrap();
        assert_eq!(scan_.checkpoints.len(), 1);
        assert_eq!(scan_.checkpoints[0].0, 10);

        // an empty stored block first
        let mut compress = Compress::new(Compression::default(), false);
        let mut raw = Vec::with_capacity(100);
        compress
            .compress_vec(b"", &mut raw, FlushCompress::Full)
            .unwrap();
        compress
            .compress_vec(b"x", &mut raw, FlushCompress::Finish)
            .unwrap();
        let mut crc = Crc::new();
        crc.update(b"x");
        let mut blob = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        blob.extend(&raw);
        blob.extend(crc.sum().to_le_bytes());
        blob.extend(1u32.to_le_bytes());
        let (scan, _) = scan(&blob, 0, 100).unwrap();
        assert_eq!(scan.data, b"x");
        assert_eq!(scan.checkpoints.len(), 1);
    }

    #[test]
    fn what_follows_the_last_member_is_ignored() {
        let blob = gzip(b"data", 6);
        for (tail, members) in [
            (&b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], 1),
            (b"garbage", 1),
            (b"\x1f", 1),
            (b"\x1f\x8b", 1),
            (b"\x1f\x8b\x07garbage", 1),
            (&blob, 2),
        ] {
            let mut blob = blob.clone();
            blob.extend(tail);
            for piece in [1, 100] {
                let (scan, finished) = scan(&blob, 0, piece).unwrap();
                assert_eq!(scan.data, b"data".repeat(members));
                assert_eq!(finished.compressed_size, blob.len() as u64);
                let ignored = if members == 1 { tail.len() } else { 0 };
                assert_eq!(finished.ignored, ignored as u64);
            }
        }
        // but not what starts as a member does
        let mut blob = blob;
        let size = blob.len() as u64;
        blob.extend(b"\x1f\x8b\x08");
        assert_eq!(
            scan(&blob, 0, 100),
            Err(Error::Truncated {
                compressed_offset: size + 3
            })
        );
        blob.extend(b"\xff");
        assert_eq!(
            scan(&blob, 0, 100),
            Err(Error::Header {
                compressed_offset: size + 3,
                source: header::Error::ReservedFlags { flags: 0xff }
            })
        );
    }

    #[test]
    fn a_blob_that_is_cut_or_damaged_is_an_error() {
        let bytes = text(3000);
        let blob = gzip(&bytes, 6);
        for end in 0..blob.len() {
            assert_eq!(
                scan(&blob[..end], 0, 512),
                Err(Error::Truncated {
                    compressed_offset: end as u64
                })
            );
        }
        let trailer = blob.len() as u64 - 8;
        for at in 0..blob.len() {
            let mut wrong = blob.clone();
            // the deflate stream's last byte has unused bits, at its high end
            wrong[at] ^= if at < 4 { 0x20 } else { 1 };
            let result = scan(&wrong, 0, 512);
            match at {
                // MTIME, XFL and OS say nothing about the data
                4..10 => assert!(result.is_ok()),
                0..4 => assert!(matches!(result, Err(Error::Header { .. })), "{at}"),
                _ if (at as u64) < trailer => assert!(result.is_err(), "{at}"),
                _ if (at as u64) < trailer + 4 => assert!(
                    matches!(result, Err(Error::Crc { compressed_offset, .. }) if compressed_offset == trailer)
                ),
                _ => assert!(
                    matches!(result, Err(Error::Size { compressed_offset, .. }) if compressed_offset == trailer)
                ),
            }
        }
    }
}
