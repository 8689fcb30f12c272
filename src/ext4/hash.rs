//! The hash by which directories are indexed: MD4's three rounds cut short, of names as signed bytes (`fs/ext4/hash.c`).
//!
//! Signed is what x86 has always had, and what readers take that do not look at the superblock's flag.

/// The hash of a name: what the index is sorted by, and what sorts names of one hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NameHash {
    /// Even: the lowest bit of an index entry says that it goes on with the hash of the one before.
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Taken when the file system's seed is zero.
const DEFAULT_SEED: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
/// The hash at which a reader of the directory is at its end: no name may have it.
const END: u32 = 0x7fff_ffff << 1;
/// Bytes of a name that are hashed at once.
const STRIDE: usize = 32;

/// The file system's hash seed, ready to hash with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hasher {
    seed: [u32; 4],
}

impl Hasher {
    /// With `s_hash_seed` as it stands in the superblock.
    pub(super) fn new(seed: [u8; 16]) -> Self {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(seed.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Self {
            seed: if words == [0; 4] { DEFAULT_SEED } else { words },
        }
    }

    /// The hash of a name.
    pub(super) fn hash(self, name: &[u8]) -> NameHash {
        let mut state = self.seed;
        let mut rest = name;
        while !rest.is_empty() {
            half_md4_transform(&mut state, &words(rest));
            rest = rest.get(STRIDE..).unwrap_or_default();
        }
        let major = state[1] & !1;
        NameHash {
            major: if major == END { END - 2 } else { major },
            minor: state[2],
        }
    }
}

/// Up to 32 bytes as 8 words, big end first, filled up with the length of all that is left (`str2hashbuf_signed`).
fn words(rest: &[u8]) -> [u32; 8] {
    // names have at most 255 bytes
    let pad = u32::from(rest.len() as u8) * 0x0101_0101;
    let mut words = [pad; 8];
    let taken = &rest[..rest.len().min(STRIDE)];
    for (word, bytes) in words.iter_mut().zip(taken.chunks(4)) {
        *word = bytes.iter().fold(pad, |word, &byte| {
            (byte as i8 as u32).wrapping_add(word << 8)
        });
    }
    words
}

fn half_md4_transform(state: &mut [u32; 4], input: &[u32; 8]) {
    const K2: u32 = 0x5A82_7999;
    const K3: u32 = 0x6ED9_EBA1;
    let f = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let g = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let h = |x: u32, y: u32, z: u32| x ^ y ^ z;
    let [mut a, mut b, mut c, mut d] = *state;
    let mut round = |mix: &dyn Fn(u32, u32, u32) -> u32, key: u32, order: [usize; 8], shifts| {
        let [s0, s1, s2, s3]: [u32; 4] = shifts;
        for four in order.as_chunks::<4>().0 {
            let word = |at: usize| input[four[at]].wrapping_add(key);
            let turn = |w: u32, x, y, z, add: u32, by| {
                w.wrapping_add(mix(x, y, z))
                    .wrapping_add(add)
                    .rotate_left(by)
            };
            a = turn(a, b, c, d, word(0), s0);
            d = turn(d, a, b, c, word(1), s1);
            c = turn(c, d, a, b, word(2), s2);
            b = turn(b, c, d, a, word(3), s3);
        }
    };
    round(&f, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]);
    round(&g, K2, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]);
    round(&h, K3, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]);
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `debugfs -R 'dx_hash -h half_md4 -s SEED NAME'` says.
    #[test]
    fn hashes_are_those_of_e2fsprogs() {
        let seed = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        let long = [b'n'; 255];
        for (seed, name, major, minor) in [
            ([0; 16], &b"hello"[..], 0x1746_da32, 0x4200_13b5),
            ([0; 16], &long, 0xc0f8_fde8, 0xa0c4_4aea),
            ([0; 16], "caf\u{e9}".as_bytes(), 0xfb9c_5e5c, 0x0573_e8b8),
            ([0; 16], b"\xff\x80", 0x51f7_df68, 0x4a10_ed8d),
            (seed, b"hello", 0xa26e_4a80, 0x97e5_b7f7),
            (seed, &long, 0x3df4_c112, 0x924d_802a),
            (seed, "caf\u{e9}".as_bytes(), 0xd6b4_ad14, 0x921a_5761),
            (
                seed,
                b"0123456789012345678901234567890123",
                0x53c6_275c,
                0x2bb7_c417,
            ),
        ] {
            let hash = Hasher::new(seed).hash(name);
            assert_eq!(hash, NameHash { major, minor }, "{name:?}");
        }
    }
}
