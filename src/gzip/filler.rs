//! Empty deflate blocks that bring an inflater to any bit of a byte (`inflate` says why).

/// Empty deflate blocks that end in mid-byte.
#[derive(Clone, Copy)]
pub(super) struct Filler {
    pub(super) bytes: [u8; 16],
    /// Bytes that are used; the last one in part. 0: no filler.
    pub(super) length: usize,
}

/// By `bits`: fillers whose length in bits is `8 - bits` modulo 8.
pub(super) static FILLERS: [Filler; 8] = {
    let mut fillers = [Filler {
        bytes: [0; 16],
        length: 0,
    }; 8];
    let mut bits = 1;
    while bits < 8 {
        fillers[bits] = Filler::with_phase(8 - bits);
        bits += 1;
    }
    fillers
};

impl Filler {
    /// The blocks for a span whose first byte has `phase` bits (1 to 7) of the span before.
    const fn with_phase(phase: usize) -> Self {
        let mut writer = BitWriter {
            bytes: [0; 16],
            bits: 0,
        };
        // a fixed block is an even number of bits long; only the dynamic one makes an odd phase
        if phase % 2 == 1 {
            writer.empty_dynamic_block();
        }
        while writer.bits % 8 != phase {
            writer.empty_fixed_block();
        }
        Self {
            bytes: writer.bytes,
            length: writer.bits.div_ceil(8),
        }
    }
}

/// Writes as deflate packs: lowest bit first.
struct BitWriter {
    bytes: [u8; 16],
    bits: usize,
}

impl BitWriter {
    const fn put(&mut self, value: usize, count: usize) {
        let mut index = 0;
        while index < count {
            self.bytes[self.bits / 8] |= ((value >> index & 1) as u8) << (self.bits % 8);
            self.bits += 1;
            index += 1;
        }
    }

    /// 10 bits: not final, type 1, the end-of-block code 0000000 (RFC 1951, 3.2.6).
    const fn empty_fixed_block(&mut self) {
        self.put(0, 1);
        self.put(1, 2);
        self.put(0, 7);
    }

    /// 91 bits (RFC 1951, 3.2.7): a code of one bit each for end-of-block and the first length, one distance code, and the
    /// end-of-block.
    const fn empty_dynamic_block(&mut self) {
        self.put(0, 1);
        self.put(2, 2);
        self.put(1, 5); // HLIT: 258 literal and length codes
        self.put(0, 5); // HDIST: 1 distance code
        self.put(14, 4); // HCLEN: 18 code length codes, in the order 16, 17, 18, ..., 14, 1
        let mut code = 0;
        while code < 18 {
            // 18 ("many zeros") and 1 get one bit each: 1 is code 0, 18 is code 1
            self.put((code == 2 || code == 17) as usize, 3);
            code += 1;
        }
        self.put(1, 1); // literals 0 to 137 have no code
        self.put(138 - 11, 7);
        self.put(1, 1); // nor have 138 to 255
        self.put(118 - 11, 7);
        self.put(0, 1); // 256, end-of-block: length 1
        self.put(0, 1); // 257: length 1
        self.put(0, 1); // the distance code: length 1
        self.put(0, 1); // end-of-block
    }
}
