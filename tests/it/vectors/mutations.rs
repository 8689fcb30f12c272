//! Bytes that nobody meant: seeded changes to vectors must never make a reader panic, hang, or say what is not so.

use std::time::{Duration, Instant};

use socinbd::{
    tar::{self, Reader},
    units::LayerOffset,
    ztoc::{self, Ztoc},
};

use super::Vectors;
use crate::support::ztocs::rewritten;

/// A small generator (splitmix64), so that each run sees the same bytes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit.max(1)).expect("a length"))
            .expect("below a length")
    }

    /// One to eight changes of the kinds that parsers trip over.
    fn damage(&mut self, bytes: &mut Vec<u8>) {
        const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0x80, 0xffff, 0x7fff_ffff, 0xffff_fff0, u64::MAX];
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len());
            let rest = bytes.len() - at;
            match self.below(8) {
                0 => bytes.truncate(at),
                1 => {
                    let number = NUMBERS[self.below(8)].to_le_bytes();
                    let width = [1, 2, 4, 8][self.below(4)].min(rest);
                    bytes[at..at + width].copy_from_slice(&number[..width]);
                }
                2 => {
                    let from = self.below(bytes.len());
                    let length = self.below(64).min(rest).min(bytes.len() - from);
                    bytes.copy_within(from..from + length, at);
                }
                3 => bytes.extend_from_within(at..at + rest.min(700)),
                _ if rest > 0 => bytes[at] ^= 1 << self.below(8),
                _ => {}
            }
        }
    }
}

#[test]
fn damaged_ztocs_are_errors_or_consistent_tables() {
    let vectors = Vectors::open();
    let originals: Vec<Vec<u8>> = vectors
        .ztocs()
        .map(|case| case.bytes())
        .filter(|bytes| bytes.len() < 70_000)
        .map(|bytes| without_windows(&bytes))
        .collect();
    let mut random = Random(1);
    let (mut taken, mut refused) = (0, 0);
    let started = Instant::now();
    for round in 0..20_000 {
        let mut bytes = originals[round % originals.len()].clone();
        random.damage(&mut bytes);
        match Ztoc::parse(&bytes) {
            Ok(ztoc) => {
                check_table(&ztoc, &bytes);
                taken += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(started.elapsed() < Duration::from_secs(60), "too slow");
    // the changes are neither too weak nor too strong to say anything
    assert!(
        taken > 500 && refused > 500,
        "{taken} taken, {refused} refused"
    );
}

/// The same table with version 1 checkpoints and few spans, so that most of the bytes are structure.
fn without_windows(bytes: &[u8]) -> Vec<u8> {
    let ztoc = Ztoc::parse(bytes);
    let Ok(ztoc) = ztoc else {
        return bytes.to_vec();
    };
    let one_span =
        ztoc.spans.spans.len() == 1 && ztoc.checkpoints.len() == 12 + 17 + ztoc::WINDOW_SIZE;
    let blob = &bytes[ztoc.checkpoints.clone()];
    let starts_at_10 = blob.get(12) == Some(&10);
    if !one_span || !starts_at_10 {
        return bytes.to_vec();
    }
    rewritten(&ztoc, &ztoc.entries, &blob[..12])
}

/// What the rest of the program takes for granted of a table that was parsed.
fn check_table(ztoc: &Ztoc, bytes: &[u8]) {
    let spans = &ztoc.spans.spans;
    let mut end = LayerOffset(0);
    for span in spans {
        assert_eq!(span.uncompressed.start, end, "spans follow each other");
        assert!(span.uncompressed.end >= end);
        end = span.uncompressed.end;
        assert!(span.compressed.start <= span.compressed.end);
        assert!(span.compressed.end.get() <= ztoc.spans.compressed_size);
        let length = span.uncompressed.end.get() - span.uncompressed.start.get();
        let compressed = span.compressed.end.get() - span.compressed.start.get();
        assert!(length <= compressed.saturating_mul(1032));
        assert!(span.bits <= 7);
        if let Some(window) = &span.window {
            assert_eq!(bytes[window.clone()].len(), ztoc::WINDOW_SIZE);
        }
    }
    let mut data_end = 0;
    for entry in &ztoc.entries {
        let data = entry.data_offset.get();
        assert!(data >= data_end + 512 && data.is_multiple_of(512));
        data_end = data + entry.size;
        assert!(data_end <= end.get(), "data is within the spans");
        assert!(!entry.name.contains(&0) && !entry.linkname.contains(&0));
        let covering = ztoc
            .spans
            .covering(entry.data_offset..LayerOffset(data_end));
        assert_eq!(covering.is_empty(), entry.size == 0);
        if entry.size > 0 {
            let span = |id: u32| &spans[usize::try_from(id).expect("an id")];
            assert!(
                span(covering.start.get())
                    .uncompressed
                    .contains(&entry.data_offset)
            );
            assert!(
                span(covering.end.get() - 1)
                    .uncompressed
                    .contains(&LayerOffset(data_end - 1))
            );
        }
    }
    let again = Ztoc::parse(&rewritten(
        ztoc,
        &ztoc.entries,
        &bytes[ztoc.checkpoints.clone()],
    ))
    .expect("what was read can be written");
    assert_eq!(again.entries, ztoc.entries);
}

#[test]
fn damaged_tars_are_errors_or_the_same_by_any_pieces() {
    let vectors = Vectors::open();
    let originals: Vec<Vec<u8>> = vectors
        .layers()
        .filter(|layer| layer.id.starts_with("tar-") && layer.compression() != "zstd")
        .map(|layer| super::tars::stream(&layer))
        .filter(|stream| stream.len() < 50_000)
        .collect();
    let mut random = Random(2);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..10_000 {
        let mut stream = originals[round % originals.len()].clone();
        random.damage(&mut stream);
        // half of the changes to headers are made to have the right checksum, so that what stands behind it is reached
        if round % 2 == 0 {
            for header in stream.chunks_exact_mut(512) {
                mend_checksum(header);
            }
        }
        let whole = read(&stream, stream.len().max(1));
        let pieces = read(&stream, 1 + random.below(700));
        assert_eq!(whole, pieces, "round {round}");
        match whole {
            Ok(_) => taken += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(
        taken > 500 && refused > 500,
        "{taken} taken, {refused} refused"
    );
}

fn mend_checksum(header: &mut [u8]) {
    if !header.iter().any(|byte| *byte != 0) {
        return;
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

/// Reads to the end; data is only counted.
fn read(stream: &[u8], piece: usize) -> Result<(tar::Archive, u64), tar::Error> {
    let mut reader = Reader::new();
    let mut data = 0;
    for mut piece in stream.chunks(piece) {
        while let Some(event) = reader.next(&mut piece)? {
            if let tar::Event::Data {
                index,
                file_offset,
                bytes,
            } = event
            {
                let length = u64::try_from(bytes.len()).expect("a length");
                assert!(length > 0);
                assert!(file_offset + length <= reader.entries()[index].size);
                data += length;
            }
        }
    }
    Ok((reader.finish()?, data))
}
