//! One span from its checkpoint.
//!
//! A span may start in the middle of a byte, and no safe inflater can be told so. So it is told something else: empty deflate
//! blocks ("filler"), as many bits as the byte's part that belongs to the span before, then the rest of that byte, then the span.
//! Empty blocks have no output and leave the window as it is.

use std::ops::ControlFlow;

use flate2::{Crc, Decompress, FlushDecompress, Status};

use super::{TRAILER_SIZE, WINDOW_SIZE, filler::FILLERS, header, header::HeaderReader};
use crate::ztoc::Span;

/// The longest span that is decoded, in bytes of the layer: it is held in memory whole.
pub const MAX_LENGTH: u64 = 1 << 30;

/// Deflate's densest code: 258 bytes for two bits.
const MAX_RATIO: u64 = 1032;

/// The buffer grows by at least so much, and only when the bytes before are there: a claim alone costs no memory.
const GROWTH: usize = 1 << 20;

/// A buffer above this size is given back when the next span is much smaller.
const KEEP: usize = 32 << 20;

/// The window of a layer's start.
static ZEROS: [u8; WINDOW_SIZE] = [0; WINDOW_SIZE];

/// Decodes spans of gzip layers (those of a plain tar are their own bytes); keeps its memory from one to the next, so that the
/// steady state allocates nothing. Not shared: one a thread.
#[derive(Debug)]
pub struct SpanDecoder {
    inflater: Decompress,
    /// Initialised memory; the span's bytes stand at its start.
    buffer: Vec<u8>,
    /// So many of them.
    length: usize,
    /// And so many behind them that the table does not know of.
    surplus: usize,
    #[cfg(feature = "libdeflater")]
    splicer: super::splice::Splicer,
    /// The last span's bytes are the splicer's, and not the buffer's.
    #[cfg(feature = "libdeflater")]
    spliced: bool,
}

impl Default for SpanDecoder {
    fn default() -> Self {
        Self {
            inflater: Decompress::new(false),
            buffer: Vec::new(),
            length: 0,
            surplus: 0,
            #[cfg(feature = "libdeflater")]
            splicer: super::splice::Splicer::default(),
            #[cfg(feature = "libdeflater")]
            spliced: false,
        }
    }
}

impl SpanDecoder {
    /// The layer's bytes of this span. `compressed` are the bytes of `span.compressed`, already checked against the span's digest;
    /// `window` the 32 KiB before the span (`None`: zeros). The result has exactly the length of `span.uncompressed`.
    ///
    /// A gzip member's end inside the span is passed: its trailer is skipped, the next member's header is read (RFC 1952, 2.2).
    /// Members that lie in the span whole are checked against their trailers.
    pub fn decode(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
    ) -> Result<&[u8], Error> {
        self.decode_with(span, compressed, window, 1)
    }

    /// As [`Self::decode`], and goes on behind the span's end for at most `limit` bytes, which [`Self::beyond`] then gives.
    pub fn decode_beyond(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
        limit: usize,
    ) -> Result<&[u8], Error> {
        self.decode_with(span, compressed, window, limit)
    }

    fn decode_with(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
        beyond: usize,
    ) -> Result<&[u8], Error> {
        (self.length, self.surplus) = (0, 0);
        let length = self.prepare(span, compressed, window)?;
        if length == 0 && beyond <= 1 {
            return Ok(&[]);
        }
        #[cfg(feature = "libdeflater")]
        {
            let window = window.unwrap_or(&ZEROS);
            self.spliced = beyond <= 1 && self.splicer.decode(span, compressed, window, length);
            if self.spliced {
                self.length = length;
                return Ok(self.bytes());
            }
        }
        let mut run = Inflation::new(span, compressed, length, beyond);
        run.restart(&mut self.inflater, span.bits, window.unwrap_or(&ZEROS))?;
        self.surplus = run.inflate(&mut self.inflater, &mut self.buffer)?;
        self.length = length;
        Ok(self.bytes())
    }

    /// All that stands behind the span's end, however much that is, in pieces that are not kept. Ends early when `take` says so.
    pub fn pass_beyond(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
        mut take: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        (self.length, self.surplus) = (0, 0);
        let length = self.prepare(span, compressed, window)?;
        let mut run = Inflation::new(span, compressed, length, GROWTH);
        run.restart(&mut self.inflater, span.bits, window.unwrap_or(&ZEROS))?;
        loop {
            let surplus = run.inflate(&mut self.inflater, &mut self.buffer)?;
            let piece = self.buffer.get(length..length + surplus);
            let flow = take(piece.unwrap_or_default()); // the buffer has grown to it
            if surplus < GROWTH || flow.is_break() {
                return Ok(());
            }
            // the next piece takes its place
            run.written = length;
        }
    }

    /// What the last [`Self::decode`] gave; nothing when it failed.
    pub fn bytes(&self) -> &[u8] {
        #[cfg(feature = "libdeflater")]
        if self.spliced {
            return self.splicer.bytes(self.length);
        }
        self.buffer.get(..self.length).unwrap_or_default() // the buffer has grown to it
    }

    /// Whether the last span's compressed bytes hold more than its length. Usual for a layer's last span (padding of the tar after
    /// its end blocks); in any other the table's offsets are wrong.
    pub fn surplus(&self) -> bool {
        self.surplus > 0
    }

    /// What [`Self::decode_beyond`] found behind the span's end.
    pub fn beyond(&self) -> &[u8] {
        self.buffer
            .get(self.length..self.length + self.surplus)
            .unwrap_or_default() // the buffer has grown to it
    }

    /// Checks what can be checked without inflating, and makes the buffer's size sensible. Returns the length of the output.
    fn prepare(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
    ) -> Result<usize, Error> {
        let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
        let length = end
            .checked_sub(start)
            .ok_or(Error::Reversed { start, end })?;
        let expected = span
            .compressed
            .end
            .get()
            .checked_sub(span.compressed.start.get());
        if expected != Some(compressed.len() as u64) {
            return Err(Error::CompressedLength {
                expected: expected.unwrap_or(0),
                found: compressed.len(),
            });
        }
        if span.bits > 7 {
            return Err(Error::Bits { bits: span.bits });
        }
        if let Some(window) = window.filter(|window| window.len() != WINDOW_SIZE) {
            return Err(Error::WindowLength {
                found: window.len(),
            });
        }
        if length > MAX_LENGTH {
            return Err(Error::TooLong { length });
        }
        // one more than it has: the bits of a byte before it
        if length > (compressed.len() as u64 + 1).saturating_mul(MAX_RATIO) {
            return Err(Error::Impossible {
                length,
                compressed: compressed.len(),
            });
        }
        let length = length as usize; // at most MAX_LENGTH
        if self.buffer.len() > KEEP && length < self.buffer.len() / 4 {
            self.buffer.truncate(length.max(KEEP));
            self.buffer.shrink_to_fit();
        }
        Ok(length)
    }
}

/// Whether the next checkpoint's window is what stands before it: the end of a span's bytes, and of its own window where they are
/// shorter than a window. A table's windows are under no digest but its own; where this is false, one of the two spans is not what
/// the table says.
pub fn window_follows(window: Option<&[u8]>, decoded: &[u8], next: &[u8]) -> bool {
    let window = window.unwrap_or(&ZEROS);
    let from_window = next.len().saturating_sub(decoded.len());
    let (old, new) = next.split_at(from_window);
    window.ends_with(old) && decoded.ends_with(new)
}

/// One span on its way.
struct Inflation<'a> {
    /// Where the span starts in the layer.
    start: u64,
    /// Where its compressed bytes start in the blob.
    compressed_start: u64,
    compressed: &'a [u8],
    /// So many of them are used.
    taken: usize,
    /// Bytes of output wanted.
    length: usize,
    /// And so many more if there are.
    beyond: usize,
    /// Bytes of output made.
    written: usize,
    /// The member that is being decoded, when its start was in this span.
    member: Option<Member>,
}

/// What a member's trailer is compared with.
struct Member {
    crc: Crc,
}

impl<'a> Inflation<'a> {
    fn new(span: &Span, compressed: &'a [u8], length: usize, beyond: usize) -> Self {
        Self {
            start: span.uncompressed.start.get(),
            compressed_start: span.compressed.start.get(),
            compressed,
            taken: 0,
            length,
            beyond,
            written: 0,
            member: None,
        }
    }

    /// Puts the inflater into the state that it had at the checkpoint.
    fn restart(&mut self, inflater: &mut Decompress, bits: u8, window: &[u8]) -> Result<(), Error> {
        inflater.reset(false);
        inflater
            .set_dictionary(window)
            .map_err(|source| self.deflate(&source))?;
        let filler = &FILLERS[usize::from(bits & 7)];
        if let (1.., Some(&shared)) = (filler.length, self.compressed.first()) {
            let mut bytes = filler.bytes;
            let last = filler.length - 1;
            bytes[last] |= shared & (0xff << (8 - bits));
            // nothing comes out: what follows the empty blocks is 7 bits at most, less than any code for a byte
            inflater
                .decompress(&bytes[..filler.length], &mut [0; 1], FlushDecompress::None)
                .map_err(|source| self.deflate(&source))?;
            self.taken = 1;
        }
        Ok(())
    }

    /// Fills the buffer up to the span's length, and tries for what is beyond; returns how much of it there was.
    fn inflate(&mut self, inflater: &mut Decompress, buffer: &mut Vec<u8>) -> Result<usize, Error> {
        let goal = self.length.saturating_add(self.beyond);
        loop {
            if self.written == buffer.len() {
                let more = (goal - self.written).min(self.written.max(GROWTH));
                buffer.reserve_exact(more);
                extend_by_zeroes(buffer, more);
            }
            let end = buffer.len().min(goal);
            let input = &self.compressed[self.taken..];
            let output = &mut buffer[self.written..end];
            let (before_in, before_out) = (inflater.total_in(), inflater.total_out());
            let result = inflater.decompress(input, output, FlushDecompress::None);
            // both are at most the slices' lengths
            let took = (inflater.total_in() - before_in) as usize;
            let made = (inflater.total_out() - before_out) as usize;
            if let Some(member) = &mut self.member {
                member
                    .crc
                    .update(&buffer[self.written..self.written + made]);
            }
            self.taken += took;
            self.written += made;
            let surplus = self.written.checked_sub(self.length);
            if let Some(surplus) = surplus.filter(|_| self.written == goal) {
                return Ok(surplus);
            }
            match result {
                Ok(Status::StreamEnd) => match self.next_member(inflater) {
                    Ok(true) => {}
                    // the layer's end, and what may stand behind it
                    Ok(false) => return surplus.ok_or_else(|| self.truncated()),
                    Err(error @ Error::Header { .. }) => return surplus.ok_or(error),
                    Err(error) => return Err(error),
                },
                // where all is there, the input ends where the next span starts, or what is behind the layer's end is no deflate
                Err(source) => return surplus.ok_or_else(|| self.deflate(&source)),
                Ok(_) if took == 0 && made == 0 => {
                    return surplus.ok_or_else(|| self.truncated());
                }
                Ok(_) => {}
            }
        }
    }

    /// Passes the trailer of one member and the header of the next; false when the span ends before there is a next.
    fn next_member(&mut self, inflater: &mut Decompress) -> Result<bool, Error> {
        let at = self.compressed_offset();
        let Some((trailer, rest)) = self
            .compressed
            .get(self.taken..)
            .and_then(|rest| rest.split_first_chunk::<TRAILER_SIZE>())
        else {
            return Ok(false);
        };
        if let Some(member) = self.member.take() {
            let [a, b, c, d, e, f, g, h] = *trailer;
            let (crc, size) = (
                u32::from_le_bytes([a, b, c, d]),
                u32::from_le_bytes([e, f, g, h]),
            );
            if crc != member.crc.sum() || size != member.crc.amount() {
                return Err(Error::Trailer {
                    compressed_offset: at,
                });
            }
        }
        let mut header = HeaderReader::default();
        let taken = header.read(rest).map_err(|source| Error::Header {
            compressed_offset: at + TRAILER_SIZE as u64,
            source,
        })?;
        self.taken += TRAILER_SIZE + taken;
        inflater.reset(false);
        self.member = Some(Member { crc: Crc::new() });
        Ok(header.is_done())
    }

    fn compressed_offset(&self) -> u64 {
        self.compressed_start.saturating_add(self.taken as u64)
    }

    fn layer_offset(&self) -> u64 {
        self.start.saturating_add(self.written as u64)
    }

    fn truncated(&self) -> Error {
        Error::Truncated {
            layer_offset: self.layer_offset(),
            missing: (self.length - self.written) as u64,
        }
    }

    fn deflate(&self, source: &flate2::DecompressError) -> Error {
        Error::Deflate {
            compressed_offset: self.compressed_offset(),
            layer_offset: self.layer_offset(),
            message: source.message().unwrap_or("invalid data").to_owned(),
        }
    }
}

/// Why a span does not decode.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The span's end lies before its start.
    #[error("the span ends at {end} of the layer, before its start at {start}")]
    Reversed {
        /// Offset in the layer.
        start: u64,
        /// Offset in the layer.
        end: u64,
    },
    /// The caller brought another number of bytes than the span has.
    #[error("{found} compressed bytes were given for a span of {expected}")]
    CompressedLength {
        /// By the table.
        expected: u64,
        /// As given.
        found: usize,
    },
    /// A byte has no more than 7 bits to share.
    #[error("the span starts with {bits} bits of a byte")]
    Bits {
        /// By the table.
        bits: u8,
    },
    /// A window is 32 KiB.
    #[error("the span's window has {found} bytes, and not {WINDOW_SIZE}")]
    WindowLength {
        /// As given.
        found: usize,
    },
    /// The span is longer than [`MAX_LENGTH`].
    #[error(
        "the span has {length} bytes, more than the {MAX_LENGTH} that are decoded at once; index the layer with a smaller span size"
    )]
    TooLong {
        /// By the table.
        length: u64,
    },
    /// Deflate cannot make so much of so little.
    #[error("the span claims {length} bytes, more than {compressed} compressed bytes can hold")]
    Impossible {
        /// By the table.
        length: u64,
        /// As given.
        compressed: usize,
    },
    /// The compressed bytes are no deflate stream from this checkpoint on.
    #[error(
        "bad deflate data at {compressed_offset} of the blob ({layer_offset} of the layer): {message}"
    )]
    Deflate {
        /// Where in the blob.
        compressed_offset: u64,
        /// Where in the layer.
        layer_offset: u64,
        /// The inflater's words.
        message: String,
    },
    /// The compressed bytes end before the span does.
    #[error("the span's data ends at {layer_offset} of the layer, {missing} bytes too early")]
    Truncated {
        /// Where in the layer.
        layer_offset: u64,
        /// So many bytes are missing.
        missing: u64,
    },
    /// A gzip member ended, and what follows is no member.
    #[error("after a gzip member, at {compressed_offset} of the blob")]
    Header {
        /// Where in the blob.
        compressed_offset: u64,
        /// What is wrong with it.
        source: header::Error,
    },
    /// A gzip member's bytes do not match its trailer.
    #[error("the gzip member that ends at {compressed_offset} of the blob fails its own checksum")]
    Trailer {
        /// Where the trailer starts in the blob.
        compressed_offset: u64,
    },
}

/// As `resize` does, which in a build without optimizations takes longer than to inflate so many bytes.
fn extend_by_zeroes(buffer: &mut Vec<u8>, mut count: usize) {
    static ZEROES: [u8; 32 << 10] = [0; 32 << 10];
    while count > 0 {
        let part = count.min(ZEROES.len());
        buffer.extend_from_slice(&ZEROES[..part]);
        count -= part;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compress, Compression, FlushCompress};

    use super::*;
    use crate::{
        oci::Digest,
        units::{CompressedOffset, LayerOffset},
    };

    fn span(compressed: usize, uncompressed: usize, bits: u8) -> Span {
        Span {
            compressed: CompressedOffset(1000)..CompressedOffset(1000 + compressed as u64),
            uncompressed: LayerOffset(5000)..LayerOffset(5000 + uncompressed as u64),
            digest: Digest::new([0; 32]),
            bits,
            end_bits: 0,
            window: None,
        }
    }

    /// Text that compresses, and differs everywhere.
    fn text(length: usize, seed: u32) -> Vec<u8> {
        let mut state = seed | 1;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.extend(format!("line {} of {}\n", bytes.len(), state >> 20).bytes());
        }
        bytes.truncate(length);
        bytes
    }

    /// A raw deflate stream that refers back into `window`.
    fn deflate(window: &[u8], bytes: &[u8]) -> Vec<u8> {
        let mut compress = Compress::new(Compression::default(), false);
        compress.set_dictionary(window).unwrap();
        let mut out = Vec::with_capacity(bytes.len() + 1000);
        compress
            .compress_vec(bytes, &mut out, FlushCompress::Finish)
            .unwrap();
        out
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// The stream moved up so that its first byte has `bits` bits of it, and ones of somebody else below them.
    fn shift(stream: &[u8], bits: u8) -> Vec<u8> {
        let phase = (8 - bits) % 8;
        let mut carry = (1u16 << phase) - 1;
        let mut out: Vec<u8> = stream
            .iter()
            .map(|&byte| {
                let both = u16::from(byte) << phase | carry;
                carry = both >> 8;
                both as u8
            })
            .collect();
        out.push(carry as u8);
        out
    }

    #[test]
    fn a_span_may_start_at_any_bit() {
        let window = text(WINDOW_SIZE, 1);
        let bytes = [&window[100..9000], &text(300_000, 2)].concat();
        let stream = deflate(&window, &bytes);
        let mut decoder = SpanDecoder::default();
        for bits in 0..8 {
            let shifted = shift(&stream, bits);
            let span = span(shifted.len(), bytes.len(), bits);
            let decoded = decoder.decode(&span, &shifted, Some(&window)).unwrap();
            assert!(decoded == bytes, "{bits} bits");
            assert!(!decoder.surplus());
            // and without the right window something else comes out: the test would notice
            let other = decoder.decode(&span, &shifted, None);
            assert!(other.is_err() || other.is_ok_and(|decoded| decoded != bytes));
        }
    }

    #[test]
    fn members_in_mid_span_are_passed_and_checked() {
        let parts = [text(70_000, 1), Vec::new(), text(3, 2), text(90_000, 3)];
        let all = parts.concat();
        let mut blob = deflate(&[0; WINDOW_SIZE], &parts[0]);
        blob.extend([0; TRAILER_SIZE]); // not looked at: the member's start is not in the span
        for part in &parts[1..] {
            blob.extend(gzip(part));
        }
        let mut decoder = SpanDecoder::default();
        let decoded = decoder
            .decode(&span(blob.len(), all.len(), 0), &blob, None)
            .unwrap();
        assert!(decoded == all);

        for (from_end, name) in [(5, "crc"), (1, "length")] {
            let mut wrong = blob.clone();
            let at = wrong.len() - from_end;
            wrong[at] ^= 1;
            assert_eq!(
                decoder.decode(&span(wrong.len(), all.len(), 0), &wrong, None),
                Err(Error::Trailer {
                    compressed_offset: 1000 + blob.len() as u64 - 8
                }),
                "{name}"
            );
        }
        // padding behind the last member is nobody's business
        blob.extend([0; 100]);
        let decoded = decoder
            .decode(&span(blob.len(), all.len(), 0), &blob, None)
            .unwrap();
        assert!(decoded == all);
        // until somebody claims that it is data
        assert_eq!(
            decoder.decode(&span(blob.len(), all.len() + 1, 0), &blob, None),
            Err(Error::Header {
                compressed_offset: 1000 + blob.len() as u64 - 100,
                source: header::Error::Magic
            })
        );
    }

    #[test]
    fn what_the_table_claims_is_what_comes_out() {
        let bytes = text(100_000, 7);
        let stream = deflate(&[0; WINDOW_SIZE], &bytes);
        let mut decoder = SpanDecoder::default();
        let shorter = decoder
            .decode(&span(stream.len(), bytes.len() - 1, 0), &stream, None)
            .unwrap();
        assert!(shorter == &bytes[..bytes.len() - 1]);
        assert!(decoder.surplus());
        assert_eq!(
            decoder.decode(&span(stream.len(), bytes.len() + 1, 0), &stream, None),
            Err(Error::Truncated {
                layer_offset: 5000 + bytes.len() as u64,
                missing: 1
            })
        );
        assert!(!decoder.surplus());
        let cut = &stream[..stream.len() / 2];
        assert!(matches!(
            decoder.decode(&span(cut.len(), bytes.len(), 0), cut, None),
            Err(Error::Truncated { missing: 1.., .. })
        ));
        assert_eq!(
            decoder.decode(&span(stream.len(), 0, 0), &stream, None),
            Ok(&[][..])
        );
    }

    #[test]
    fn claims_that_make_no_sense_cost_nothing() {
        let mut decoder = SpanDecoder::default();
        let bytes = [0; 10];
        let reversed = Span {
            uncompressed: LayerOffset(9)..LayerOffset(8),
            ..span(10, 0, 0)
        };
        for (span, window, error) in [
            (reversed, None, Error::Reversed { start: 9, end: 8 }),
            (
                span(11, 1, 0),
                None,
                Error::CompressedLength {
                    expected: 11,
                    found: 10,
                },
            ),
            (span(10, 1, 8), None, Error::Bits { bits: 8 }),
            (
                span(10, 1, 0),
                Some(&bytes[..]),
                Error::WindowLength { found: 10 },
            ),
            (
                span(10, (1 << 30) + 1, 0),
                None,
                Error::TooLong {
                    length: (1 << 30) + 1,
                },
            ),
            (
                span(10, 11 * 1032 + 1, 0),
                None,
                Error::Impossible {
                    length: 11 * 1032 + 1,
                    compressed: 10,
                },
            ),
        ] {
            assert_eq!(decoder.decode(&span, &bytes, window), Err(error));
        }
        assert_eq!(decoder.buffer.capacity(), 0);
    }

    #[test]
    fn any_damage_is_an_error_or_bytes() {
        let bytes = text(50_000, 9);
        let mut blob = deflate(&[0; WINDOW_SIZE], &bytes[..20_000]);
        blob.extend([0; TRAILER_SIZE]);
        blob.extend(gzip(&bytes[20_000..]));
        let mut decoder = SpanDecoder::default();
        let mut errors = 0;
        for at in 0..blob.len().min(3000) {
            let mut wrong = blob.clone();
            wrong[at] ^= 1 << (at % 8);
            for bits in [0, 1 + (at % 7) as u8] {
                let span = span(wrong.len(), bytes.len(), bits);
                match decoder.decode(&span, &wrong, None) {
                    Ok(decoded) => assert_eq!(decoded.len(), bytes.len()),
                    Err(_) => errors += 1,
                }
            }
        }
        assert!(errors > 3000, "damage is noticed: {errors}");
    }

    #[test]
    fn a_window_follows_from_what_stands_before_it() {
        let bytes = text(WINDOW_SIZE + 5000, 13);
        let (window, rest) = bytes.split_at(WINDOW_SIZE);
        let next = &bytes[5000..];
        assert!(window_follows(Some(window), rest, next));
        assert!(!window_follows(Some(next), rest, next));
        assert!(!window_follows(Some(window), &rest[1..], next));
        assert!(window_follows(None, &bytes, next));
        assert!(!window_follows(None, &bytes, window));
        let mut zeros_first = vec![0; WINDOW_SIZE - 5000];
        zeros_first.extend(rest);
        assert!(window_follows(None, rest, &zeros_first));
    }

    #[test]
    fn what_stands_behind_a_span_is_decoded_up_to_a_limit() {
        let bytes = text(9000, 12);
        let stream = deflate(&[0; WINDOW_SIZE], &bytes);
        let mut decoder = SpanDecoder::default();
        for length in [0, 1, 5000, 8999, 9000] {
            let span = span(stream.len(), length, 0);
            for limit in [2, 100, 10_000] {
                let decoded = decoder.decode_beyond(&span, &stream, None, limit);
                assert_eq!(decoded.unwrap(), &bytes[..length]);
                let end = bytes.len().min(length + limit);
                assert_eq!(decoder.beyond(), &bytes[length..end]);
                assert_eq!(decoder.surplus(), end > length);
            }
        }
    }

    #[test]
    fn what_stands_behind_a_span_passes_in_pieces() {
        let bytes = text(2 * GROWTH + 5000, 12);
        // in two members, of which the second is checked against its trailer
        let mut stream = deflate(&[0; WINDOW_SIZE], &bytes[..GROWTH]);
        stream.extend([0; TRAILER_SIZE]);
        stream.extend(gzip(&bytes[GROWTH..]));
        let mut decoder = SpanDecoder::default();
        for length in [0, 5000, 2 * GROWTH, bytes.len()] {
            let span = span(stream.len(), length, 0);
            let mut passed = Vec::new();
            let keep = |piece: &[u8]| {
                assert!(piece.len() <= GROWTH);
                passed.extend_from_slice(piece);
                ControlFlow::Continue(())
            };
            decoder.pass_beyond(&span, &stream, None, keep).unwrap();
            assert!(passed == bytes[length..], "{length}");
            assert!(decoder.buffer.len() <= length + GROWTH);
        }
        let mut pieces = 0;
        let stop = |_: &[u8]| {
            pieces += 1;
            ControlFlow::Break(())
        };
        let span = span(stream.len(), 5000, 0);
        decoder.pass_beyond(&span, &stream, None, stop).unwrap();
        assert_eq!(pieces, 1);
        let at = stream.len() - 5;
        stream[at] ^= 1;
        let go_on = |_: &[u8]| ControlFlow::Continue(());
        let error = decoder.pass_beyond(&span, &stream, None, go_on);
        assert!(matches!(error, Err(Error::Trailer { .. })), "{error:?}");
    }

    #[test]
    fn memory_is_kept_and_given_back() {
        let bytes = text(3 << 20, 11);
        let stream = deflate(&[0; WINDOW_SIZE], &bytes);
        let mut decoder = SpanDecoder::default();
        let span = span(stream.len(), bytes.len(), 0);
        decoder.decode(&span, &stream, None).unwrap();
        let (at, capacity) = (decoder.buffer.as_ptr(), decoder.buffer.capacity());
        decoder.decode(&span, &stream, None).unwrap();
        assert_eq!(
            (decoder.buffer.as_ptr(), decoder.buffer.capacity()),
            (at, capacity)
        );
        decoder.buffer.resize(KEEP * 5, 0);
        decoder.decode(&span, &stream, None).unwrap();
        assert!(decoder.buffer.capacity() <= KEEP);
    }
}
