//! Damaged blobs and tables: an error or bytes; never a panic, a hang, or memory without bound.

use socinbd::{
    gzip::inflate::SpanDecoder,
    oci::Packing,
    soci::build::NoSink,
    units::{CompressedOffset, LayerOffset},
    ztoc::Compression,
};

use super::{
    decode, index, options,
    random::{Random, gzip, tar},
    ztoc,
};

fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] = random.next() as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes.truncate(at + 1),
            3 => {
                let end = (at + random.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let end = (at + random.below(4000)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => bytes[at] = [0, 0xff, 0x80][random.below(3)],
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

#[test]
fn a_damaged_blob_is_an_error_or_a_layer() {
    let (mut errors, mut layers) = (0, 0);
    for seed in 0..400 {
        let random = &mut Random::new(5000 + seed % 20);
        let (tar, _) = tar(random);
        let mut blob = match seed % 3 {
            0 | 1 => gzip(random, &tar),
            _ => zstd::encode_all(&tar[..], 3).unwrap(),
        };
        let random = &mut Random::new(seed);
        mutate(random, &mut blob);
        match index(&blob, Packing::Gzip, options(1000), 4096, NoSink) {
            Ok((indexed, NoSink)) => {
                layers += 1;
                // deflate's densest code, and zstd's blocks
                let most = blob.len() as u64 * 50_000;
                assert!(indexed.uncompressed_size <= most, "seed {seed}");
            }
            Err(_) => errors += 1,
        }
    }
    assert!(
        errors > 200 && layers > 0,
        "{errors} errors, {layers} layers"
    );
}

#[test]
fn a_span_of_a_damaged_blob_or_table_is_an_error_or_as_long_as_the_table_says() {
    let mut decoder = SpanDecoder::default();
    let (mut errors, mut spans) = (0, 0);
    for seed in 0..60 {
        let random = &mut Random::new(9000 + seed);
        let (tar, _) = tar(random);
        let blob = gzip(random, &tar);
        let (ztoc, table) = ztoc(&blob, 5000);
        for span in ztoc.spans.spans.iter().take(12) {
            let mut span = span.clone();
            let range = span.compressed.start.get() as usize..span.compressed.end.get() as usize;
            let mut compressed = blob[range].to_vec();
            match random.below(4) {
                0 => span.bits = random.below(8) as u8,
                1 => {
                    let end = span.uncompressed.end.get() + random.next() % 5_000_000;
                    span.uncompressed.end = LayerOffset(end);
                }
                2 => span.window = None,
                _ => mutate(random, &mut compressed),
            }
            span.compressed.end =
                CompressedOffset(span.compressed.start.get() + compressed.len() as u64);
            let wanted = span.uncompressed.end.get() - span.uncompressed.start.get();
            match decode(&mut decoder, &table, Compression::Gzip, &span, &compressed) {
                Ok(bytes) => {
                    assert_eq!(bytes.len() as u64, wanted, "seed {seed}");
                    spans += 1;
                }
                Err(_) => errors += 1,
            }
        }
    }
    assert!(errors > 100 && spans > 20, "{errors} errors, {spans} spans");
}
