//! Which bytes of its window a span refers to.
//!
//! A deflate stream may refer back 32 KiB, but a span needs few of those bytes: 3.6 KB of the 32, in ordinary layers. This reads a
//! span's symbols (RFC 1951) and notes where their distances lead, without making any output. Only the first 32 KiB of a span's output
//! can refer to its window, so it reads no further.

use super::WINDOW_SIZE;

/// Compressed bytes that are read at most: blocks without output would else cost time without end. Blocks that are stored take their
/// own length, all others less.
pub const MAX_READ: usize = 256 * 1024;

/// The longest code, in bits.
const MAX_BITS: usize = 15;

/// The order in which the lengths of the code length code stand (RFC 1951, 3.2.7).
const LENGTHS_ORDER: [usize; 19] = [
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
];

/// Of the symbols from 257 on: the shortest length, and how many bits say how much is added to it (3.2.5).
const LENGTHS: [(u16, u8); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// The same for distances.
const DISTANCES: [(u16, u8); 30] = [
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 0),
    (5, 1),
    (7, 1),
    (9, 2),
    (13, 2),
    (17, 3),
    (25, 3),
    (33, 4),
    (49, 4),
    (65, 5),
    (97, 5),
    (129, 6),
    (193, 6),
    (257, 7),
    (385, 7),
    (513, 8),
    (769, 8),
    (1025, 9),
    (1537, 9),
    (2049, 10),
    (3073, 10),
    (4097, 11),
    (6145, 11),
    (8193, 12),
    (12289, 12),
    (16385, 13),
    (24577, 13),
];

/// Bytes of a window, each used or not.
#[derive(Clone, PartialEq, Eq)]
pub struct Used(Box<[bool; WINDOW_SIZE]>);

impl Default for Used {
    fn default() -> Self {
        Self(Box::new([false; WINDOW_SIZE]))
    }
}

impl std::fmt::Debug for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

impl Used {
    /// Every byte.
    pub fn all() -> Self {
        Self(Box::new([true; WINDOW_SIZE]))
    }

    /// Adds a range of the window, clipped to it.
    pub fn add(&mut self, range: std::ops::Range<usize>) {
        let end = range.end.min(WINDOW_SIZE);
        self.0[range.start.min(end)..end].fill(true);
    }

    /// The used bytes as ranges: ascending, none empty, none adjacent.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = next + self.0[next..].iter().position(|used| *used)?;
            let length = self.0[start..].iter().position(|used| !*used);
            next = length.map_or(WINDOW_SIZE, |length| start + length);
            Some(start..next)
        })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        !self.0.contains(&true)
    }

    /// Whether this has all that `other` has.
    pub fn contains(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&*other.0)
            .all(|(have, want)| *have || !*want)
    }
}

/// Why a span's references are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are no deflate stream.
    #[error("bad deflate data within the first {read} bytes of the span: {what}")]
    Deflate {
        /// Bytes that had been read.
        read: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The span's first 32 KiB of output need more than [`MAX_READ`] compressed bytes.
    #[error("the span has no 32 KiB of output in its first {MAX_READ} bytes")]
    TooLong,
}

/// Which bytes of its window a span refers to. `compressed` is the span, or as much of it as has its first 32 KiB of output, and starts
/// with the byte of which the span has the `bits` high bits (0: it starts with a whole byte); `length` is how long its output is.
/// Of bytes that end before that, what they refer to.
pub fn references(compressed: &[u8], bits: u8, length: u64) -> Result<Used, Error> {
    let mut walk = Walk {
        input: Bits {
            bytes: compressed,
            read: 0,
            held: 0,
            count: 0,
        },
        used: Used::default(),
        output: 0,
        limit: usize::try_from(length).map_or(WINDOW_SIZE, |length| length.min(WINDOW_SIZE)),
        literals: Code::default(),
        distances: Code::default(),
    };
    if let 1..8 = bits {
        // bits of the block before
        match walk.input.take(8 - bits) {
            Ok(_) => {}
            Err(_) => return Ok(walk.used),
        }
    }
    match walk.blocks() {
        Ok(()) | Err(Stop::End) => Ok(walk.used),
        Err(Stop::Bad(what)) => Err(Error::Deflate {
            read: walk.input.read,
            what,
        }),
        Err(Stop::TooLong) => Err(Error::TooLong),
    }
}

/// Why a walk goes no further.
enum Stop {
    /// The input is at its end.
    End,
    /// The input is no deflate.
    Bad(&'static str),
    /// See [`Error::TooLong`].
    TooLong,
}

/// One span being read.
struct Walk<'a> {
    input: Bits<'a>,
    used: Used,
    /// Bytes of output so far.
    output: usize,
    /// Bytes of output that matter.
    limit: usize,
    literals: Code,
    distances: Code,
}

impl Walk<'_> {
    fn blocks(&mut self) -> Result<(), Stop> {
        while self.output < self.limit {
            let is_last = self.input.take(1)? == 1;
            match self.input.take(2)? {
                0 => self.stored()?,
                1 => {
                    let mut lengths = [8; 288];
                    lengths[144..256].fill(9);
                    lengths[256..280].fill(7);
                    self.literals.build(&lengths)?;
                    self.distances.build(&[5; 30])?;
                    self.symbols()?;
                }
                2 => {
                    self.dynamic()?;
                    self.symbols()?;
                }
                _ => return Err(Stop::Bad("a block of a type that is none")),
            }
            if is_last {
                break; // what follows is a member of its own, with no window
            }
        }
        Ok(())
    }

    fn stored(&mut self) -> Result<(), Stop> {
        self.input.align();
        let (length, inverse) = (self.input.take(16)?, self.input.take(16)?);
        if length != !inverse & 0xffff {
            return Err(Stop::Bad("a stored block's length is not its inverse"));
        }
        self.output += length;
        self.input.skip(length)
    }

    /// The codes of a dynamic block (3.2.7).
    fn dynamic(&mut self) -> Result<(), Stop> {
        let literals = self.input.take(5)? + 257;
        let distances = self.input.take(5)? + 1;
        if literals > 286 || distances > 30 {
            return Err(Stop::Bad("too many codes"));
        }
        let mut lengths = [0; 19];
        let count = self.input.take(4)? + 4;
        for place in &LENGTHS_ORDER[..count] {
            lengths[*place] = self.input.take(3)? as u8; // 3 bits
        }
        self.literals.build(&lengths)?;
        let mut lengths = [0; 286 + 30];
        let total = literals + distances;
        let mut at = 0;
        while at < total {
            let symbol = self.literals.next(&mut self.input)?;
            let (value, repeat) = match symbol {
                0..=15 => (symbol as u8, 1), // 4 bits
                16 => {
                    let before = at.checked_sub(1).map(|before| lengths[before]);
                    let before = before.ok_or(Stop::Bad("a repetition of nothing"))?;
                    (before, 3 + self.input.take(2)?)
                }
                17 => (0, 3 + self.input.take(3)?),
                _ => (0, 11 + self.input.take(7)?),
            };
            let repeated = lengths[..total]
                .get_mut(at..at + repeat)
                .ok_or(Stop::Bad("more code lengths than codes"))?;
            repeated.fill(value);
            at += repeat;
        }
        self.literals.build(&lengths[..literals])?;
        self.distances.build(&lengths[literals..total])
    }

    /// A block's symbols, to its end or to where no more is needed.
    fn symbols(&mut self) -> Result<(), Stop> {
        while self.output < self.limit {
            let symbol = self.literals.next(&mut self.input)?;
            match symbol {
                0..=255 => self.output += 1,
                256 => return Ok(()),
                _ => {
                    let length = self.extended(&LENGTHS, symbol - 257)?;
                    let symbol = self.distances.next(&mut self.input)?;
                    let distance = self.extended(&DISTANCES, symbol)?;
                    if distance > self.output {
                        // it is at most 32 KiB
                        let start = WINDOW_SIZE - (distance - self.output);
                        self.used.add(start..start + length);
                    }
                    self.output += length;
                }
            }
        }
        Ok(())
    }

    fn extended(&mut self, table: &[(u16, u8)], symbol: usize) -> Result<usize, Stop> {
        let (base, bits) = table
            .get(symbol)
            .ok_or(Stop::Bad("a symbol that stands for nothing"))?;
        Ok(usize::from(*base) + self.input.take(*bits)?)
    }
}

/// The input by bits, the lowest of each byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    read: usize,
    held: u64,
    count: u8,
}

impl Bits<'_> {
    /// Holds at least 32 bits, or all that there are.
    fn fill(&mut self) {
        while self.count <= 56 {
            let Some(byte) = self.bytes.get(self.read) else {
                return;
            };
            self.held |= u64::from(*byte) << self.count;
            self.read += 1;
            self.count += 8;
        }
    }

    /// Up to 16 bits.
    fn take(&mut self, bits: u8) -> Result<usize, Stop> {
        self.fill();
        let value = (self.held & ((1 << bits) - 1)) as usize; // 16 bits at most
        self.drop(bits)?;
        Ok(value)
    }

    fn drop(&mut self, bits: u8) -> Result<(), Stop> {
        if bits > self.count {
            return Err(Stop::End);
        }
        if self.read > MAX_READ {
            return Err(Stop::TooLong);
        }
        self.held >>= bits;
        self.count -= bits;
        Ok(())
    }

    /// To the next whole byte.
    fn align(&mut self) {
        let bits = self.count % 8;
        self.held >>= bits;
        self.count -= bits;
    }

    /// Whole bytes, from a whole byte on.
    fn skip(&mut self, bytes: usize) -> Result<(), Stop> {
        let held = usize::from(self.count / 8);
        self.read = (self.read - held) + bytes;
        (self.held, self.count) = (0, 0);
        if self.read > self.bytes.len() {
            return Err(Stop::End);
        }
        Ok(())
    }
}

/// A prefix code: by the next bits the symbol and its length.
#[derive(Default)]
struct Code {
    /// `symbol << 4 | length`; 0 where no code leads. Its length is a power of two.
    table: Vec<u16>,
    bits: u8,
}

impl Code {
    /// The code of these lengths (3.2.2); 0: the symbol has none.
    fn build(&mut self, lengths: &[u8]) -> Result<(), Stop> {
        let mut counts = [0_u16; MAX_BITS + 1];
        for length in lengths {
            counts[usize::from(*length)] += 1; // at most 15: 4 bits or a constant
        }
        counts[0] = 0;
        let mut next = [0_u16; MAX_BITS + 1];
        let mut code = 0_u32;
        for bits in 1..=MAX_BITS {
            code = (code + u32::from(counts[bits - 1])) << 1;
            if code + u32::from(counts[bits]) > 1 << bits {
                return Err(Stop::Bad("a code with more words than its lengths allow"));
            }
            next[bits] = code as u16; // below 2^15
        }
        let longest = counts.iter().rposition(|count| *count > 0).unwrap_or(0);
        self.bits = longest as u8;
        self.table.clear();
        self.table.resize(1 << longest, 0);
        for (symbol, length) in lengths
            .iter()
            .enumerate()
            .filter(|(_, length)| **length > 0)
        {
            let bits = usize::from(*length);
            // codes stand with their highest bit first
            let first = usize::from(next[bits].reverse_bits() >> (16 - bits));
            next[bits] += 1;
            let entry = (symbol as u16) << 4 | u16::from(*length); // below 288
            for place in (first..self.table.len()).step_by(1 << bits) {
                self.table[place] = entry;
            }
        }
        Ok(())
    }

    fn next(&self, input: &mut Bits<'_>) -> Result<usize, Stop> {
        input.fill();
        let place = (input.held & ((1 << self.bits) - 1)) as usize; // 15 bits at most
        let entry = self.table.get(place).copied().unwrap_or(0);
        if entry == 0 {
            return Err(match input.count {
                count if count < self.bits => Stop::End,
                _ => Stop::Bad("bits that are no code"),
            });
        }
        input.drop((entry & 15) as u8)?;
        Ok(usize::from(entry >> 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gzip::{
            inflate::SpanDecoder,
            scan::{Event, Scanner},
        },
        oci::Digest,
        units::{CompressedOffset, LayerOffset},
        ztoc::Span,
    };
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write as _;

    /// Text whose parts come again at all distances.
    fn text(length: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize
        };
        let mut bytes: Vec<u8> = (0..100).map(|_| next() as u8).collect();
        while bytes.len() < length {
            let back = 1 + next() % bytes.len().min(30_000);
            let start = bytes.len() - back;
            let count = (3 + next() % 10).min(back);
            bytes.extend_from_within(start..start + count);
            bytes.push(next() as u8);
        }
        bytes.truncate(length);
        bytes
    }

    /// The spans of a blob with their windows.
    fn spans(blob: &[u8], total: usize) -> Vec<(Span, Vec<u8>)> {
        let mut scanner = Scanner::new(0);
        let mut rest = blob;
        let mut starts = Vec::new();
        while let Some(event) = scanner.next(&mut rest).unwrap() {
            if let Event::Checkpoint(at) = event {
                starts.push((at.input.get(), at.output.get(), at.bits, at.window.to_vec()));
            }
        }
        let ends: Vec<_> = starts
            .iter()
            .skip(1)
            .map(|(input, output, ..)| (*input, *output))
            .chain([(blob.len() as u64, total as u64)])
            .collect();
        starts
            .into_iter()
            .zip(ends)
            .map(|((input, output, bits, window), (end, output_end))| {
                let start = input - u64::from(bits != 0);
                let span = Span {
                    compressed: CompressedOffset(start)..CompressedOffset(end),
                    uncompressed: LayerOffset(output)..LayerOffset(output_end),
                    digest: Digest::of(b""),
                    bits,
                    end_bits: 0,
                    window: None,
                };
                (span, window)
            })
            .collect()
    }

    fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_used_bytes_are_enough_and_each_of_them_is_needed() {
        let bytes = text(400_000);
        let mut decoder = SpanDecoder::default();
        for level in [4, 6, 9] {
            let blob = gzip(&bytes, level);
            let mut used_bytes = 0;
            for (span, window) in spans(&blob, bytes.len()).iter().skip(1) {
                let range = |start: u64, end: u64| start as usize..end as usize;
                let compressed =
                    &blob[range(span.compressed.start.get(), span.compressed.end.get())];
                let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
                let expected = &bytes[range(start, end)];
                let used = references(compressed, span.bits, end - start).unwrap();
                used_bytes += used.runs().map(|run| run.len()).sum::<usize>();
                // what is not used may be anything
                let mut reduced: Vec<u8> = window.iter().map(|byte| !byte).collect();
                for run in used.runs() {
                    reduced[run.clone()].copy_from_slice(&window[run]);
                }
                assert!(decoder.decode(span, compressed, Some(&reduced)).unwrap() == expected);
                // and each used one makes a difference
                for run in used.runs().step_by(50) {
                    for at in [run.start, run.end - 1] {
                        let mut other = reduced.clone();
                        other[at] = !other[at];
                        let decoded = decoder.decode(span, compressed, Some(&other)).unwrap();
                        assert!(decoded != expected, "byte {at} of the window");
                    }
                }
                // the first 32 KiB of output say all
                if compressed.len() > 40_000 {
                    assert_eq!(
                        references(&compressed[..40_000], span.bits, end - start),
                        Ok(used)
                    );
                }
            }
            assert!(used_bytes > 2000, "level {level}: {used_bytes}");
        }
    }

    #[test]
    fn stored_and_fixed_blocks_and_a_stream_s_end_are_read() {
        // stored, "ab"; then fixed: a match of length 3 at distance 4, and the end
        let mut bytes = vec![0b000, 2, 0, !2, !0, b'a', b'b'];
        // last, type 1 (lowest bit first); the codes, highest bit first: length 3, distance 4, the end
        let bits = ["1", "10", "0000001", "00011", "0000000"].concat();
        let fixed = bits
            .chars()
            .enumerate()
            .fold(0_u32, |all, (at, bit)| all | u32::from(bit == '1') << at);
        bytes.extend(&fixed.to_le_bytes()[..3]);
        let used = references(&bytes, 0, 1000).unwrap();
        // two bytes of output before, so two bytes of the window; the third byte is output
        assert!(
            used.runs()
                .eq(std::iter::once(WINDOW_SIZE - 2..WINDOW_SIZE))
        );
        // a limit before it: nothing is used
        assert!(references(&bytes, 0, 2).unwrap().is_empty());
        // no byte at all
        assert!(references(&[], 3, 1000).unwrap().is_empty());
    }

    #[test]
    fn blocks_without_output_end() {
        // empty stored blocks: five bytes each
        let bytes = [0, 0, 0, 0xff, 0xff].repeat(MAX_READ);
        assert_eq!(references(&bytes, 0, 1), Err(Error::TooLong));
        assert!(references(&bytes[..1000], 0, 1).unwrap().is_empty());
    }

    #[test]
    fn any_damage_is_an_error_or_an_answer() {
        let bytes = text(60_000);
        let blob = gzip(&bytes, 6);
        let stream = &blob[10..];
        let mut errors = 0;
        for at in 0..stream.len().min(4000) {
            let mut wrong = stream.to_vec();
            wrong[at] ^= 1 << (at % 8);
            errors += u32::from(references(&wrong, (at % 9) as u8, u64::MAX).is_err());
        }
        assert!(errors > 100, "damage is noticed: {errors}");
    }

    #[test]
    fn runs_are_of_used_bytes() {
        let mut used = Used::default();
        assert!(used.is_empty());
        used.add(5..7);
        used.add(7..9);
        used.add(WINDOW_SIZE - 1..WINDOW_SIZE + 100);
        assert_eq!(
            used.runs().collect::<Vec<_>>(),
            [5..9, WINDOW_SIZE - 1..WINDOW_SIZE]
        );
        assert!(Used::all().contains(&used) && !used.contains(&Used::all()));
        assert!(Used::all().runs().eq(std::iter::once(0..WINDOW_SIZE)));
    }
}
