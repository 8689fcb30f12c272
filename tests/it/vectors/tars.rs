//! Every layer's tar against the truth as Go's `archive/tar` sees it.

use std::io::Read as _;

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;
use socinbd::tar::{Archive, Entry, EntryKind, Error, Event, NoZtoc, Reader};

use super::{Layer, Vectors, expected_entry, list, number, sha256, text};

/// What the reader has seen, up to its end or its error.
struct Seen {
    entries: Vec<Entry>,
    /// The content of each entry, holes filled.
    contents: Vec<Vec<u8>>,
    ended: bool,
    result: Result<Archive, Error>,
}

/// Reads a stream in pieces whose lengths follow from `seed`.
fn read(stream: &[u8], seed: u64) -> Seen {
    let mut reader = Reader::new();
    let mut contents: Vec<Vec<u8>> = Vec::new();
    let mut ended = false;
    let mut state = seed;
    let mut stream_rest = stream;
    while !stream_rest.is_empty() {
        let (mut piece, rest) = stream_rest.split_at(piece_length(&mut state, stream_rest.len()));
        stream_rest = rest;
        loop {
            match reader.next(&mut piece) {
                Ok(Some(Event::Entry { index })) => {
                    assert_eq!(index, contents.len(), "indexes have no gaps");
                    let size = usize::try_from(reader.entries()[index].size);
                    contents.push(vec![0; size.unwrap_or(0).min(1 << 24)]);
                }
                Ok(Some(Event::Data {
                    index,
                    file_offset,
                    bytes,
                })) => {
                    assert_eq!(index + 1, contents.len(), "data is of the latest entry");
                    let from = usize::try_from(file_offset).expect("a small file");
                    contents[index][from..from + bytes.len()].copy_from_slice(bytes);
                }
                Ok(Some(Event::End)) => ended = true,
                Ok(None) => break,
                Err(error) => {
                    return Seen {
                        entries: reader.entries().to_vec(),
                        contents,
                        ended,
                        result: Err(error),
                    };
                }
            }
        }
        assert!(piece.is_empty(), "all of a piece is taken");
    }
    let entries = reader.entries().to_vec();
    Seen {
        entries,
        contents,
        ended,
        result: reader.finish(),
    }
}

/// 1 to 2000 bytes; with seed 0 all.
fn piece_length(state: &mut u64, rest: usize) -> usize {
    if *state == 0 {
        return rest;
    }
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    usize::try_from(*state >> 33)
        .map_or(1, |number| 1 + number % 2000)
        .min(rest)
}

/// A layer's uncompressed stream, as far as it can be had.
pub(super) fn stream(layer: &Layer<'_>) -> Vec<u8> {
    let blob = layer.blob();
    if layer.compression() != "gzip" {
        return blob;
    }
    let mut stream = Vec::new();
    // a broken stream is read up to where it breaks
    let _ = MultiGzDecoder::new(&blob[..]).read_to_end(&mut stream);
    stream
}

/// The same entry without what Go does not tell.
fn without_segments(entry: &Entry) -> Entry {
    Entry {
        sparse: None,
        ..entry.clone()
    }
}

#[test]
fn entries_and_contents_are_those_that_go_sees() {
    let vectors = Vectors::open();
    let mut compared = 0;
    for layer in vectors
        .layers()
        .filter(|layer| layer.compression() != "zstd")
    {
        let Some(expected) = layer.expected() else {
            continue;
        };
        let stream = stream(&layer);
        if sha256(&stream) != text(&expected["uncompressed_sha256"]) {
            continue; // Go's gzip reader gives another stream for a broken one
        }
        let whole = read(&stream, 0);
        let pieces = read(&stream, 1 + compared);
        assert_eq!(whole.entries, pieces.entries, "{}: by pieces", layer.id);
        assert_eq!(whole.contents, pieces.contents, "{}: by pieces", layer.id);
        assert_eq!(whole.result, pieces.result, "{}: by pieces", layer.id);
        compare(layer.id, &expected, &whole);
        compared += 1;
    }
    assert!(compared > 80, "only {compared} layers were compared");
}

fn compare(id: &str, expected: &Value, seen: &Seen) {
    let truth: Vec<_> = list(&expected["entries"])
        .iter()
        .filter_map(|from| Some((expected_entry(from)?, from)))
        .collect();
    // types that are no files: Go shows them, a container's runtime refuses them
    let foreign = list(&expected["entries"])
        .iter()
        .position(|from| !"01234567Sg".contains(text(&from["typeflag"])));
    let count = foreign.unwrap_or(truth.len());
    assert_eq!(seen.entries.len(), count, "{id}: {:?}", seen.result);
    for (index, (truth, from)) in truth.iter().enumerate().take(count) {
        let entry = &seen.entries[index];
        assert_eq!(&without_segments(entry), truth, "{id}: entry {index}");
        if truth.kind == EntryKind::Regular
            && from.get("content_error").is_none()
            && from.get("sha256").is_some()
        {
            let content = sha256(&seen.contents[index]);
            assert_eq!(content, text(&from["sha256"]), "{id}: entry {index}");
        }
    }
    match (&seen.result, foreign, expected.get("tar_error")) {
        (Ok(archive), None, None) => {
            let end = i64::try_from(archive.end.get()).expect("a small layer");
            assert_eq!(end, number(&expected["end_position"]), "{id}");
            let size = i64::try_from(archive.stream_size).expect("a small layer");
            assert_eq!(size, number(&expected["uncompressed_size"]), "{id}");
        }
        (Err(Error::UnsupportedType { .. }), Some(_), _) | (Err(_), None, Some(_)) => {}
        (result, ..) => panic!("{id}: {result:?}, but {:?}", expected.get("tar_error")),
    }
}

fn read_layer(id: &str) -> Seen {
    read(&stream(&Vectors::open().layer(id)), 0)
}

#[test]
fn what_is_wrong_with_a_tar_is_named() {
    let error = |id| read_layer(id).result.expect_err(id);
    assert_eq!(
        error("tar-one-end-block-then-entry").to_string(),
        "a single zero block before offset 1536 of the layer, and data after it"
    );
    assert!(matches!(error("tar-checksum-bad"), Error::Checksum { .. }));
    assert!(matches!(
        error("tar-octal-bad"),
        Error::Number { field: "mode", .. }
    ));
    assert!(matches!(
        error("tar-base256-size-neg"),
        Error::Number { field: "size", .. }
    ));
    assert!(matches!(
        error("tar-base256-size-huge"),
        Error::Truncated { .. }
    ));
    assert!(matches!(
        error("tar-pax-bad-time"),
        Error::Number { field: "mtime", .. }
    ));
    assert!(matches!(
        error("tar-pax-malformed"),
        Error::PaxRecord { .. }
    ));
    assert!(matches!(error("tar-pax-path-nul"), Error::PaxRecord { .. }));
    assert!(matches!(
        error("tar-xheader-too-long"),
        Error::SpecialTooLong { .. }
    ));
    assert!(matches!(
        error("tar-truncated-data"),
        Error::Truncated {
            inside: "the data of a file",
            ..
        }
    ));
    assert!(matches!(
        error("tar-truncated-header"),
        Error::Truncated {
            inside: "a header block",
            ..
        }
    ));
    for (id, letter) in [
        ("tar-typeflag-unknown", b'Z'),
        ("tar-typeflag-D", b'D'),
        ("tar-typeflag-V", b'V'),
    ] {
        assert!(matches!(error(id), Error::UnsupportedType { flag, .. } if flag == letter));
    }
}

#[test]
fn what_cannot_stand_in_a_ztoc_is_named() {
    let reason = |id| read_layer(id).result.expect(id).no_ztoc;
    for id in [
        "tar-sparse-gnu",
        "tar-sparse-pax-0.0",
        "tar-sparse-pax-0.1",
        "tar-sparse-pax-1.0",
    ] {
        assert_eq!(reason(id), Some(NoZtoc::Sparse { index: 0 }), "{id}");
    }
    assert_eq!(
        reason("tar-pax-global"),
        Some(NoZtoc::GlobalHeader { index: 0 })
    );
    assert_eq!(reason("tar-typeflag-7"), None);
    assert_eq!(reason("tar-device-size"), None);
}

#[test]
fn the_end_is_told_apart_from_what_follows_it() {
    assert!(read_layer("tar-after-end").ended);
    assert!(read_layer("tar-trailing-garbage").ended);
    assert!(!read_layer("tar-no-end").ended);
    assert!(!read_layer("tar-one-end-block").ended);
}
