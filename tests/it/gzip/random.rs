//! Random tars through random gzip writers: each span decodes alone to the bytes that went in.

use std::io::Write as _;

use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use socinbd::{oci::Packing, soci::build::NoSink};

use super::{Collect, assert_spans, index, options};

/// A small generator of our own, so that a seed means the same for ever (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit.max(1)
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Bytes as files have them: text, noise, zeros, repetition near and far.
fn content(random: &mut Random, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 64);
    while bytes.len() < length {
        let run = 1 + random.below(20_000);
        match random.below(5) {
            0 => (0..run).for_each(|_| bytes.push(random.next() as u8)),
            1 => bytes.extend(std::iter::repeat_n(0, run)),
            2 => {
                for _ in 0..run / 8 {
                    write!(bytes, "{} ", random.below(5000)).unwrap();
                }
            }
            _ if bytes.is_empty() => bytes.push(b'x'),
            // from as far back as deflate can see, and from farther
            _ => {
                let back = 1 + random.below(bytes.len().min(40_000));
                for _ in 0..run {
                    bytes.push(bytes[bytes.len() - back]);
                }
            }
        }
    }
    bytes.truncate(length);
    bytes
}

/// A file's name and data.
pub type File = (Vec<u8>, Vec<u8>);

/// A tar, and its files.
pub fn tar(random: &mut Random) -> (Vec<u8>, Vec<File>) {
    let mut builder = tar::Builder::new(Vec::new());
    let mut files = Vec::new();
    for index in 0..random.below(12) {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(random.next() >> 34);
        let long = if random.chance(10) { 150 } else { 1 };
        let name = format!("dir{}/{}{index}", random.below(3), "f".repeat(long));
        let limit = if random.chance(20) { 400_000 } else { 9_000 };
        let length = random.below(limit);
        let data = content(random, length);
        header.set_size(data.len() as u64);
        builder.append_data(&mut header, &name, &data[..]).unwrap();
        files.push((name.into_bytes(), data));
    }
    let mut tar = builder.into_inner().unwrap();
    if random.chance(30) {
        tar.resize(tar.len().next_multiple_of(10_240), 0);
    }
    (tar, files)
}

/// One gzip member: any level, blocks cut by flushes of every kind, any header fields.
fn member(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let flags = if random.chance(30) {
        random.below(32) as u8
    } else {
        0
    };
    let mut out = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 255];
    if flags & 4 != 0 {
        let length = random.below(300);
        out.extend((length as u16).to_le_bytes());
        out.extend(vec![7; length]);
    }
    for flag in [8, 16] {
        if flags & flag != 0 {
            out.extend(b"some text\0");
        }
    }
    if flags & 2 != 0 {
        let mut crc = Crc::new();
        crc.update(&out);
        out.extend((crc.sum() as u16).to_le_bytes());
    }
    let mut compress = Compress::new(Compression::new(random.below(10) as u32), false);
    let flushes = random.chance(40);
    let mut rest = bytes;
    loop {
        let length = if flushes {
            random.below(60_000)
        } else {
            rest.len()
        };
        let (now, later) = rest.split_at(length.min(rest.len()));
        let flush = match (later.is_empty(), random.below(3)) {
            (true, _) => FlushCompress::Finish,
            (false, 0) => FlushCompress::Sync,
            (false, 1) => FlushCompress::Full,
            (false, _) => FlushCompress::Partial,
        };
        let before = compress.total_in();
        loop {
            let taken = (compress.total_in() - before) as usize;
            out.reserve(now.len() + 4096);
            let spare = out.capacity() - out.len();
            let size = out.len();
            let status = compress
                .compress_vec(&now[taken..], &mut out, flush)
                .unwrap();
            let full = out.len() - size == spare;
            if status == Status::StreamEnd || (flush != FlushCompress::Finish && !full) {
                break;
            }
        }
        rest = later;
        if flush == FlushCompress::Finish {
            break;
        }
    }
    let mut crc = Crc::new();
    crc.update(bytes);
    out.extend(crc.sum().to_le_bytes());
    out.extend((bytes.len() as u32).to_le_bytes());
    out
}

/// One or several members, some empty; sometimes padding behind them.
pub fn gzip(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let mut blob = Vec::new();
    let mut rest = bytes;
    let several = random.chance(50);
    loop {
        let length = match random.below(6) {
            _ if !several => rest.len(),
            0 => 0,
            1 => 1 + random.below(10),
            _ => random.below(100_000),
        };
        let (now, later) = rest.split_at(length.min(rest.len()));
        blob.extend(member(random, now));
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    if random.chance(10) {
        blob.resize(blob.len() + random.below(600), 0);
    }
    blob
}

/// Spans of every size, from one that no block is shorter than.
pub fn span_size(random: &mut Random) -> u64 {
    64 << random.below(16)
}

#[test]
fn every_span_of_a_random_layer_decodes_alone() {
    let (mut spans, mut longest) = (0, 0);
    for seed in 0..150 {
        let random = &mut Random::new(seed);
        let (tar, files) = tar(random);
        let blob = gzip(random, &tar);
        let piece = 1 + random.below(100_000);
        let (indexed, sink) = index(
            &blob,
            Packing::Gzip,
            options(span_size(random)),
            piece,
            Collect::default(),
        )
        .unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
        assert_eq!(indexed.packing, Packing::Gzip);
        assert_eq!(indexed.size, blob.len() as u64, "seed {seed}");
        assert_eq!(
            indexed.digest,
            socinbd::oci::Digest::of(&blob),
            "seed {seed}"
        );
        assert_eq!(
            indexed.diff_id,
            Some(socinbd::oci::Digest::of(&tar)),
            "seed {seed}"
        );
        assert_eq!(indexed.uncompressed_size, tar.len() as u64, "seed {seed}");
        assert!(sink.files == files, "seed {seed}");
        let table = indexed.ztoc.unwrap().unwrap();
        let count = assert_spans(&format!("seed {seed}"), &blob, &tar, &table);
        assert_eq!(count, indexed.spans);
        spans += count;
        longest = longest.max(count);
    }
    assert!(
        spans > 700 && longest > 40,
        "{spans} spans, at most {longest}"
    );
}

#[test]
fn plain_and_zstd_layers_give_the_same_files() {
    for seed in 1000..1040 {
        let random = &mut Random::new(seed);
        let (tar, files) = tar(random);
        let size = 1 + random.below(100_000);
        let mut zstd = Vec::new();
        // several frames, and one to be skipped (RFC 8878, 3.1.2)
        zstd.extend([0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
        for part in tar.chunks(size * 3) {
            zstd.extend(zstd::encode_all(part, random.below(20) as i32).unwrap());
        }
        for (packing, blob) in [(Packing::Plain, &tar), (Packing::Zstd, &zstd)] {
            let (indexed, sink) = index(
                blob,
                packing,
                options(size as u64),
                size,
                Collect::default(),
            )
            .unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
            assert!(sink.files == files, "seed {seed}, {packing:?}");
            assert_eq!(indexed.packing, packing);
            assert_eq!(indexed.diff_id, Some(socinbd::oci::Digest::of(&tar)));
            assert_eq!(indexed.digest, socinbd::oci::Digest::of(blob));
            match (packing, indexed.ztoc.unwrap()) {
                (Packing::Plain, Ok(table)) => {
                    assert_spans(&format!("seed {seed}"), blob, &tar, &table);
                }
                (Packing::Zstd, Err(reason)) => assert!(reason.contains("zstd"), "{reason}"),
                (_, other) => panic!("seed {seed}, {packing:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn without_a_ztoc_all_else_is_the_same() {
    let random = &mut Random::new(7);
    let (tar, files) = tar(random);
    let blob = gzip(random, &tar);
    let wanted = index(&blob, Packing::Gzip, options(100), 999, NoSink)
        .unwrap()
        .0;
    let mut options = options(100);
    options.ztoc = false;
    let (indexed, sink) = index(&blob, Packing::Gzip, options, 999, Collect::default()).unwrap();
    assert!(indexed.ztoc.is_none());
    assert_eq!(indexed.entries, wanted.entries);
    assert_eq!(indexed.diff_id, wanted.diff_id);
    assert!(sink.files == files);
}
