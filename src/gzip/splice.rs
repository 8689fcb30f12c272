//! One span through libdeflate, which decodes a whole stream into a whole buffer, and knows neither windows nor bits.
//!
//! So it gets a stream that is made for it: a stored block that holds the window, filler up to the bit where the span starts, the span,
//! and an empty final block at the bit where it ends. The output is the window, and then the span.

use libdeflater::Decompressor;

use super::{WINDOW_SIZE, filler::FILLERS};
use crate::ztoc::Span;

/// A stored block of [`WINDOW_SIZE`] bytes, not the last (RFC 1951, 3.2.4): three bits and padding, the length, its complement.
const STORED: [u8; 5] = [0x00, 0x00, 0x80, 0xff, 0x7f];

/// An empty block of fixed codes, the last: 10 bits (RFC 1951, 3.2.6).
const FINAL: u32 = 0b011;

/// The output has its memory before the first byte has come: longer spans, which no writer in use makes, go the other way.
const MAX_LENGTH: usize = 64 << 20;

/// Keeps its memory from one span to the next.
pub(super) struct Splicer {
    decompressor: Decompressor,
    stream: Vec<u8>,
    output: Vec<u8>,
}

impl Default for Splicer {
    fn default() -> Self {
        Self {
            decompressor: Decompressor::new(),
            stream: Vec::new(),
            output: Vec::new(),
        }
    }
}

impl Splicer {
    /// Whether the span decodes to exactly `length` bytes this way. Where not, it is damaged, has a member's end in it, or holds more
    /// than was said: zlib's way says which.
    pub(super) fn decode(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: &[u8],
        length: usize,
    ) -> bool {
        // a span inside of one byte has no part that is its own
        let [first, middle @ .., last] = compressed else {
            return false;
        };
        if length > MAX_LENGTH || span.bits > 7 || span.end_bits > 7 {
            return false;
        }
        self.stream.clear();
        self.stream.extend_from_slice(&STORED);
        self.stream.extend_from_slice(window);
        let filler = &FILLERS[usize::from(span.bits)];
        self.stream
            .extend_from_slice(&filler.bytes[..filler.length]);
        match (span.bits, self.stream.last_mut()) {
            (1.., Some(shared)) => *shared |= first & (0xff << (8 - span.bits)),
            _ => self.stream.push(*first),
        }
        self.stream.extend_from_slice(middle);
        let own_bits = u32::from(8 - span.end_bits);
        let end = u32::from(*last) & ((1 << own_bits) - 1) | FINAL << own_bits;
        self.stream.extend_from_slice(&end.to_le_bytes());

        let wanted = WINDOW_SIZE + length;
        if self.output.len() < wanted {
            self.output.resize(wanted, 0);
        }
        let output = &mut self.output[..wanted];
        self.decompressor.deflate_decompress(&self.stream, output) == Ok(wanted)
    }

    /// The last span's bytes, if there are so many.
    pub(super) fn bytes(&self, length: usize) -> &[u8] {
        self.output
            .get(WINDOW_SIZE..WINDOW_SIZE + length)
            .unwrap_or_default()
    }
}

impl std::fmt::Debug for Splicer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splicer").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;
    use crate::{
        oci::Digest,
        units::{CompressedOffset, LayerOffset},
    };

    /// Every way that a span may start and end inside a byte: blocks of a stream, each alone.
    #[test]
    fn spans_between_any_two_bits() {
        let text: Vec<u8> = (0..600_000_u32)
            .flat_map(|number| {
                let mixed = number.wrapping_mul(number ^ 0x9e37_79b9);
                format!("{} ", mixed >> (16 + number % 11)).into_bytes()
            })
            .collect();
        let mut blob = Vec::with_capacity(text.len());
        Compress::new(Compression::new(6), false)
            .compress_vec(&text, &mut blob, FlushCompress::Finish)
            .unwrap();
        let gzip = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff][..], &blob, &[0; 8]].concat();
        let mut scanner = crate::gzip::scan::Scanner::new(0);
        let mut rest = &gzip[..];
        let mut starts = Vec::new();
        while let Ok(Some(event)) = scanner.next(&mut rest) {
            if let crate::gzip::scan::Event::Checkpoint(at) = event {
                starts.push((at.input.get(), at.output.get(), at.bits, at.window.to_vec()));
            }
        }
        let mut splicer = Splicer::default();
        let mut phases = [[false; 8]; 2];
        for pair in starts.windows(2) {
            let ((input, output, bits, window), (end, output_end, end_bits, _)) =
                (&pair[0], &pair[1]);
            let start = input - u64::from(*bits != 0);
            let span = Span {
                compressed: CompressedOffset(start)..CompressedOffset(*end),
                uncompressed: LayerOffset(*output)..LayerOffset(*output_end),
                digest: Digest::of(b""),
                bits: *bits,
                end_bits: *end_bits,
                window: None,
            };
            let compressed = &gzip[start as usize..*end as usize];
            let wanted = &text[*output as usize..*output_end as usize];
            assert!(splicer.decode(&span, compressed, window, wanted.len()));
            assert!(splicer.bytes(wanted.len()) == wanted);
            // not a byte less or more than was said
            assert!(!splicer.decode(&span, compressed, window, wanted.len() - 1));
            assert!(!splicer.decode(&span, compressed, window, wanted.len() + 1));
            phases[0][usize::from(*bits)] = true;
            phases[1][usize::from(*end_bits)] = true;
        }
        assert_eq!(phases, [[true; 8]; 2], "the stream has too few blocks");
    }
}
