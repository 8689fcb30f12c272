//! Layers with one oddity each.

use std::{convert::Infallible, io::Write as _};

use flate2::{Compression, write::GzEncoder};
use socinbd::{
    error::Kind,
    gzip::scan,
    oci::{Digest, Packing},
    soci::build::{Error, Indexed, LayerSink, NoSink},
    tar::Entry,
};

use super::{Collect, assert_spans, index, options, random::Random, ztoc};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar with one file of noise, which needs a block every 64 KiB or so.
fn tar_of(size: usize) -> Vec<u8> {
    let mut random = Random::new(3);
    let data: Vec<u8> = (0..size).map(|_| random.next() as u8).collect();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o600);
    builder.append_data(&mut header, "file", &data[..]).unwrap();
    builder.into_inner().unwrap()
}

fn indexed(blob: &[u8], packing: Packing) -> Result<Indexed, Error<Infallible>> {
    index(blob, packing, options(1000), 7000, NoSink).map(|(indexed, NoSink)| indexed)
}

#[test]
fn the_first_bytes_overrule_the_media_type() {
    let tar = tar_of(5000);
    let gzip = gzip(&tar);
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    for (blob, packing) in [
        (&gzip, Packing::Gzip),
        (&zstd, Packing::Zstd),
        (&tar, Packing::Plain),
    ] {
        for declared in [Packing::Gzip, Packing::Zstd, Packing::Plain] {
            for piece in [1, 3, 5, 100_000] {
                let (indexed, sink) =
                    index(blob, declared, options(1000), piece, Collect::default()).unwrap();
                assert_eq!(indexed.packing, packing, "declared {declared:?}");
                assert_eq!(indexed.diff_id, Some(Digest::of(&tar)));
                assert_eq!(indexed.digest, Digest::of(blob));
                assert_eq!(sink.files.len(), 1);
            }
        }
    }
}

#[test]
fn a_blob_that_is_neither_packed_as_declared_nor_a_tar_says_so() {
    let blob = vec![b'x'; 2000];
    let error = indexed(&blob, Packing::Gzip).unwrap_err();
    assert!(matches!(
        error,
        Error::Unpacked {
            declared: Packing::Gzip,
            ..
        }
    ));
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(matches!(
        indexed(&blob, Packing::Plain).unwrap_err(),
        Error::Tar(_)
    ));
}

#[test]
fn an_empty_blob_is_an_empty_layer() {
    for packing in [Packing::Gzip, Packing::Zstd, Packing::Plain] {
        let indexed = indexed(b"", packing).unwrap();
        assert_eq!(indexed.diff_id, Some(Digest::of(b"")));
        assert_eq!(indexed.uncompressed_size, 0);
        assert!(indexed.entries.is_empty());
        // nothing to read lazily, and a zTOC without spans is one that AWS's daemon refuses
        assert!(indexed.ztoc.unwrap().is_err());
    }
}

#[test]
fn what_follows_the_gzip_is_in_the_last_span_and_in_nobodys_way() {
    let tar = tar_of(300_000);
    for tail in [&[0; 700][..], b"garbage"] {
        let mut blob = gzip(&tar);
        blob.extend(tail);
        let indexed = indexed(&blob, Packing::Gzip).unwrap();
        assert_eq!(indexed.diff_id, Some(Digest::of(&tar)));
        assert_eq!(indexed.size, blob.len() as u64);
        assert!(indexed.spans > 2);
        assert_spans("tail", &blob, &tar, &indexed.ztoc.unwrap().unwrap());
    }
}

#[test]
fn no_span_starts_behind_the_tars_end() {
    let mut tar = tar_of(100);
    let end = tar.len() as u64;
    let mut random = Random::new(5);
    tar.extend((0..400_000).map(|_| random.next() as u8));
    let blob = gzip(&tar);
    let indexed = indexed(&blob, Packing::Gzip).unwrap();
    assert_eq!(indexed.uncompressed_size, tar.len() as u64);
    assert_eq!(indexed.diff_id, Some(Digest::of(&tar)));
    let table = indexed.ztoc.unwrap().unwrap();
    let ztoc = socinbd::ztoc::Ztoc::parse(&table).unwrap();
    assert_eq!(ztoc.spans.uncompressed_size, end);
    assert_eq!(ztoc.spans.spans.len(), 1);
    assert_spans("padded", &blob, &tar, &table);
}

#[test]
fn a_gzip_error_has_its_place() {
    let tar = tar_of(3000);
    let mut blob = gzip(&tar);
    let at = blob.len() - 6;
    blob[at] ^= 1;
    let error = indexed(&blob, Packing::Gzip).unwrap_err();
    let trailer = blob.len() as u64 - 8;
    assert!(
        matches!(error, Error::Gzip(scan::Error::Crc { compressed_offset, .. }) if compressed_offset == trailer)
    );
    blob.truncate(1000);
    assert!(matches!(
        indexed(&blob, Packing::Gzip).unwrap_err(),
        Error::Gzip(scan::Error::Truncated {
            compressed_offset: 1000
        })
    ));
}

#[test]
fn a_zstd_error_has_its_place() {
    let tar = tar_of(3000);
    let blob = zstd::encode_all(&tar[..], 3).unwrap();
    assert!(matches!(
        indexed(&blob[..1000], Packing::Zstd).unwrap_err(),
        Error::ZstdTruncated {
            compressed_offset: 1000
        }
    ));
    let mut garbage = blob.clone();
    garbage.extend(b"garbage");
    assert!(matches!(
        indexed(&garbage, Packing::Zstd).unwrap_err(),
        Error::Zstd { compressed_offset, .. } if compressed_offset >= blob.len() as u64
    ));
    // a window of 256 MiB in a frame of a few bytes (RFC 8878, 3.1.1.1.2)
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 18 << 3, 1, 0, 0];
    assert!(matches!(
        indexed(&frame, Packing::Zstd).unwrap_err(),
        Error::Zstd { .. }
    ));
    // one of 128 MiB is allowed; there is nothing in it
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3, 1, 0, 0];
    assert_eq!(indexed(&frame, Packing::Zstd).unwrap().uncompressed_size, 0);
}

/// A sparse file as GNU tar writes it: 512 bytes of data at its start and at 1 MiB.
fn sparse_tar() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_size(1024);
    let gnu = header.as_gnu_mut().unwrap();
    for (at, offset) in [0u64, 1 << 20].into_iter().enumerate() {
        gnu.sparse[at].set_offset(offset);
        gnu.sparse[at].set_length(512);
    }
    gnu.set_real_size((1 << 20) + 512);
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.extend([b'a'; 512]);
    tar.extend([b'b'; 512]);
    tar.extend([0; 1024]);
    tar
}

#[test]
fn a_sparse_file_is_read_and_has_no_ztoc() {
    let tar = sparse_tar();
    let blob = gzip(&tar);
    let (indexed, sink) =
        index(&blob, Packing::Gzip, options(1000), 100, Collect::default()).unwrap();
    assert_eq!(indexed.entries[0].size, (1 << 20) + 512);
    let mut wanted = vec![0; (1 << 20) + 512];
    wanted[..512].fill(b'a');
    wanted[1 << 20..].fill(b'b');
    assert!(sink.files[0].1 == wanted);
    let reason = indexed.ztoc.unwrap().unwrap_err();
    assert!(reason.contains("entry 0 is a sparse file"), "{reason}");
    assert_eq!(indexed.spans, 0);
}

#[test]
fn a_sink_that_fails_ends_it() {
    struct Full;
    impl LayerSink for Full {
        type Error = &'static str;
        fn entry(&mut self, _: usize, _: &Entry) -> Result<(), Self::Error> {
            Ok(())
        }
        fn data(&mut self, _: usize, _: u64, _: &[u8]) -> Result<(), Self::Error> {
            Err("full")
        }
    }
    let blob = gzip(&tar_of(3000));
    let Err(error) = index(&blob, Packing::Gzip, options(1000), 500, Full) else {
        panic!("the sink is full");
    };
    assert!(matches!(error, Error::Sink("full")));
    assert_eq!(error.kind(), Kind::Io);
}

#[test]
fn the_same_layer_gives_the_same_bytes() {
    let blob = gzip(&tar_of(200_000));
    let once = indexed(&blob, Packing::Gzip)
        .unwrap()
        .ztoc
        .unwrap()
        .unwrap();
    let (again, NoSink) = index(&blob, Packing::Plain, options(1000), 1, NoSink).unwrap();
    assert!(again.ztoc.unwrap().unwrap() == once);
}

/// At every level of gzip a layer has one span, or one for each of its hundred blocks, and each decodes alone.
#[test]
fn every_level_has_one_span_or_a_hundred() {
    let content = crate::support::noise(50_000).repeat(3);
    // with its header and its end it is a hundred pieces
    let tar = crate::soci::make::tar_of(&[("file", &content[..100 * 1024 - 512 - 1024])]);
    for level in 0..10 {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        for piece in tar.chunks(1024) {
            encoder.write_all(piece).unwrap();
            encoder.flush().unwrap(); // a block ends here
        }
        let blob = encoder.finish().unwrap();
        for (span_size, spans) in [(64, 100), (1024, 50), (i64::MAX as u64, 1)] {
            let name = format!("level {level}, spans of {span_size}");
            let (parsed, table) = ztoc(&blob, span_size);
            assert_spans(&name, &blob, &tar, &table);
            let made = parsed.spans.spans.iter();
            // a writer may end with an empty block, which is a span
            let made = made.filter(|span| !span.uncompressed.is_empty());
            assert_eq!(made.count(), spans, "{name}");
        }
    }
}

/// A header with a comment, a name and an extra field, longer than many spans: the first span starts behind it.
#[test]
fn a_header_longer_than_a_span_is_in_no_span() {
    let tar = tar_of(200_000);
    let mut encoder = flate2::GzBuilder::new()
        .extra(vec![7; 65_000])
        .filename("name".repeat(100))
        .comment("comment".repeat(100))
        .write(Vec::new(), Compression::default());
    encoder.write_all(&tar).unwrap();
    let blob = encoder.finish().unwrap();
    let header = 10 + 2 + 65_000 + 4 * 100 + 1 + 7 * 100 + 1;
    for span_size in [64, 65_536, 1 << 22] {
        let (parsed, table) = ztoc(&blob, span_size);
        let name = format!("spans of {span_size}");
        let spans = assert_spans(&name, &blob, &tar, &table);
        assert_eq!(spans > 1, span_size < 200_000, "{name}: {spans}");
        let first = &parsed.spans.spans[0];
        assert_eq!(first.compressed.start.get(), header, "{name}");
        assert_eq!(first.uncompressed.start.get(), 0, "{name}");
    }
}
