//! Random tars through random gzip writers: each span decodes alone to the bytes that went in, with its reduced window.

use socinbd::{
    compact::{self, Table, window::Window},
    gzip::inflate::SpanDecoder,
    oci::{Digest, Packing},
    soci::build::{CompactBlob, Indexed, NoSink, Options},
    ztoc::{Compression, Ztoc},
};

use crate::gzip::{
    compressed, index, options,
    random::{self, Random},
};

fn both(span_size: u64, compact_span_size: u64) -> Options {
    Options {
        compact_span_size: Some(compact_span_size),
        ..options(span_size)
    }
}

fn blob_of(indexed: &Indexed) -> &CompactBlob {
    indexed.compact.as_ref().unwrap().as_ref().unwrap()
}

fn table_of(blob: &CompactBlob) -> Table {
    let table = &blob.bytes[..blob.table_size];
    assert_eq!(blob.table, Digest::of(table));
    let table = Table::parse(table).unwrap();
    assert_eq!(table.blob_size, blob.bytes.len() as u64);
    assert_eq!(table.spans.spans.len(), blob.spans);
    table
}

/// Decodes every span alone and compares it with the true stream. Returns how many there were.
fn assert_spans(name: &str, layer: &[u8], stream: &[u8], blob: &CompactBlob) -> usize {
    let table = table_of(blob);
    assert_eq!(table.layer, Digest::of(layer), "{name}");
    let mut decoder = SpanDecoder::default();
    let mut next = 0;
    for (number, span) in table.spans.spans.iter().enumerate() {
        let name = format!("{name}, span {number}");
        let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
        assert!(start == next && start < end, "{name}");
        next = end;
        let bytes = compressed(layer, span).unwrap_or_else(|| panic!("{name}: out of the blob"));
        let decoded = match table.spans.compression {
            Compression::Uncompressed => bytes,
            Compression::Gzip => {
                let stored = span.window.clone().map_or(&[][..], |at| &blob.bytes[at]);
                let window = Window::parse(stored).unwrap();
                let from = (start as usize).saturating_sub(32 * 1024);
                let mut true_window = vec![0; 32 * 1024 - (start as usize - from)];
                true_window.extend(&stream[from..start as usize]);
                assert!(window.agrees_with(&true_window), "{name}: its window");
                decoder
                    .decode(span, bytes, Some(window.bytes()))
                    .unwrap_or_else(|error| panic!("{name}: {error}"))
            }
        };
        assert!(
            decoded == &stream[start as usize..end as usize],
            "{name} has other bytes"
        );
        assert_eq!(Digest::of(decoded), span.digest, "{name}");
    }
    table.spans.spans.len()
}

#[test]
fn every_span_of_a_random_layer_decodes_alone_from_both_tables() {
    let (mut spans, mut windows, mut stored) = (0, 0, 0);
    for seed in 0..120 {
        let random = &mut Random::new(seed);
        let (tar, _) = random::tar(random);
        let layer = random::gzip(random, &tar);
        let sizes = [random::span_size(random), random::span_size(random)];
        let piece = 1 + random.below(100_000);
        let name = format!("seed {seed}, spans of {sizes:?}");
        let (indexed, NoSink) = index(
            &layer,
            Packing::Gzip,
            both(sizes[0], sizes[1]),
            piece,
            NoSink,
        )
        .unwrap();
        let ztoc = indexed.ztoc.as_ref().unwrap().as_ref().unwrap();
        crate::gzip::assert_spans(&name, &layer, &tar, ztoc);
        let blob = blob_of(&indexed);
        spans += assert_spans(&name, &layer, &tar, blob);
        windows += blob.bytes.len() - blob.table_size;
        // the same files, and the zTOC is the one that is made without a compact index
        let parsed = Ztoc::parse(ztoc).unwrap();
        let table = table_of(blob);
        assert_eq!(table.entries, parsed.entries, "{name}");
        let (alone, NoSink) =
            index(&layer, Packing::Gzip, options(sizes[0]), piece, NoSink).unwrap();
        assert_eq!(alone.ztoc.unwrap().unwrap(), *ztoc, "{name}");
        assert!(alone.compact.is_none());
        // with one span size both have the same spans
        if sizes[0] == sizes[1] {
            stored += 1;
            assert_eq!(table.spans.spans.len(), parsed.spans.spans.len(), "{name}");
        }
    }
    assert!(spans > 600, "{spans} spans");
    assert!(stored > 2, "{stored} with one size");
    assert!(
        windows > 10_000 && windows < spans * 32 * 1024 / 4,
        "{windows} bytes of windows for {spans} spans"
    );
}

#[test]
fn a_plain_tar_has_spans_without_windows() {
    for seed in 0..20 {
        let random = &mut Random::new(seed);
        let (tar, _) = random::tar(random);
        let size = 4096 + random.below(100_000) as u64;
        let piece = 1 + random.below(100_000);
        let name = format!("seed {seed}, spans of {size}");
        let (indexed, NoSink) =
            index(&tar, Packing::Plain, both(1 << 20, size), piece, NoSink).unwrap();
        let blob = blob_of(&indexed);
        assert_eq!(blob.bytes.len(), blob.table_size, "{name}");
        let spans = assert_spans(&name, &tar, &tar, blob);
        let covered = table_of(blob).spans.covered().get();
        assert_eq!(spans as u64, covered.div_ceil(size), "{name}");
        assert!(covered >= tar.len().saturating_sub(10_240) as u64, "{name}");
    }
}

#[test]
fn what_has_no_ztoc_has_no_compact_index_either() {
    let (tar, _) = random::tar(&mut Random::new(1));
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    for (name, layer, packing) in [
        ("zstd", &zstd[..], Packing::Zstd),
        ("empty", &[], Packing::Plain),
    ] {
        let (indexed, NoSink) =
            index(layer, packing, both(1 << 20, 1 << 17), 4096, NoSink).unwrap();
        let reasons = (
            indexed.ztoc.unwrap().unwrap_err(),
            indexed.compact.unwrap().unwrap_err(),
        );
        assert!(!reasons.0.is_empty() && !reasons.1.is_empty(), "{name}");
    }
}

#[test]
fn the_default_is_between_the_blocks_of_gzip_and_half_a_mebibyte() {
    assert!((64 << 10..=512 << 10).contains(&compact::DEFAULT_SPAN_SIZE));
}
