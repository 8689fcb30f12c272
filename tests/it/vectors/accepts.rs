//! Broken and unusual zTOCs: what AWS's reader takes is taken here or refused by a rule of `docs/soci.md`; what it rejects, hangs or
//! crashes on is a named error.

use std::{
    io::Read as _,
    time::{Duration, Instant},
};

use flate2::bufread::MultiGzDecoder;
use socinbd::{
    gzip::inflate::SpanDecoder,
    oci::digest::Hasher,
    tar::EntryKind,
    tree::Tree,
    units::LayerOffset,
    ztoc::{self, Compression, Ztoc},
};

use super::{AcceptCase, Vectors};

/// Rules by which a zTOC is refused that AWS's reader takes, and the cases that each is seen in.
const RULES: &[(&str, &[&str])] = &[
    (
        "TarSize",
        &[
            "tar-raw-flip-0", // hits compressed_archive_size
            "tar-comp-size-larger",
            "tar-comp-size-smaller",
            "tar-comp-size-zero",
            "tar-uncomp-size-larger",
        ],
    ),
    (
        "NegativeSize",
        &["tar-comp-size-negative", "tar-uncomp-size-negative"],
    ),
    ("EntryType", &["tar-type-empty", "tar-type-unknown"]),
];

/// Cases whose lie AWS's daemon notices, or not, only when it reads a file, and that no check of ours can see: none of these bytes
/// is used here.
const HARMLESS: &[&str] = &[
    "tar-dev-negative",     // device numbers of a regular file
    "tar-linkname-on-file", // a link's text on a regular file
];

/// What an import finds wrong with a zTOC and its blob's size, by the name of the error.
fn import(bytes: &[u8], blob: &[u8]) -> Result<Ztoc, String> {
    let ztoc = Ztoc::parse(bytes).map_err(name_of)?;
    let size = u64::try_from(blob.len()).expect("a length");
    ztoc.spans.check_blob_size(size).map_err(name_of)?;
    Tree::build(&ztoc.entries).map_err(name_of)?;
    Ok(ztoc)
}

fn name_of(error: impl std::fmt::Debug) -> String {
    let debug = format!("{error:?}");
    let end = debug.find([' ', '(', '{']).unwrap_or(debug.len());
    debug[..end].to_owned()
}

/// Reads all of a layer by its zTOC, with all that can be checked: digests, lengths, windows and headers.
fn read_all(ztoc: &Ztoc, bytes: &[u8], blob: &[u8]) -> Result<Vec<u8>, String> {
    let mut layer = Vec::new();
    let mut decoder = SpanDecoder::default();
    let spans = &ztoc.spans.spans;
    for (index, span) in spans.iter().enumerate() {
        let at = |offset: u64| usize::try_from(offset).expect("a small layer");
        let compressed = &blob[at(span.compressed.start.get())..at(span.compressed.end.get())];
        let mut hasher = Hasher::default();
        hasher.update(compressed);
        if hasher.finish() != span.digest {
            return Err("digest".to_owned());
        }
        if ztoc.spans.compression == Compression::Uncompressed {
            let length = at(span.uncompressed.end.get() - span.uncompressed.start.get());
            layer.extend_from_slice(&compressed[..length]);
            continue;
        }
        let window = span.window.clone().map(|range| &bytes[range]);
        if let Some(window) = window
            && !window.ends_with(&layer[layer.len().saturating_sub(ztoc::WINDOW_SIZE)..])
        {
            return Err("window".to_owned());
        }
        let decoded = decoder
            .decode(span, compressed, window)
            .map_err(|error| format!("inflate: {}", name_of(error)))?;
        layer.extend_from_slice(decoded);
        if decoder.surplus() && index + 1 < spans.len() {
            return Err("surplus".to_owned());
        }
    }
    check_headers(ztoc, &layer)?;
    Ok(layer)
}

fn check_headers(ztoc: &Ztoc, layer: &[u8]) -> Result<(), String> {
    let mut end = 0_u64;
    for entry in &ztoc.entries {
        let data = entry.data_offset.get();
        let range = usize::try_from(end).expect("small")..usize::try_from(data).expect("small");
        // AWS's daemon looks at the headers of regular files only
        if entry.kind == EntryKind::Regular {
            let before = &layer[range];
            ztoc::check_header(entry, LayerOffset(end), before)
                .map_err(|mismatch| mismatch.to_string())?;
        }
        end = (data + entry.size).next_multiple_of(512);
    }
    Ok(())
}

fn truth(case: &AcceptCase<'_>) -> Vec<u8> {
    let blob = case.layer();
    if super::text(&case.case["compression"]) != "gzip" {
        return blob;
    }
    let mut layer = Vec::new();
    MultiGzDecoder::new(&blob[..])
        .read_to_end(&mut layer)
        .expect("the bases are sound");
    layer
}

#[test]
fn what_aws_takes_is_taken_and_what_fails_there_is_an_error() {
    let vectors = Vectors::open();
    let mut seen = 0;
    for case in vectors.accepts("ztoc") {
        let (bytes, blob) = (case.bytes(), case.layer());
        let started = Instant::now();
        let imported = import(&bytes, &blob);
        let read = imported.as_ref().map(|ztoc| read_all(ztoc, &bytes, &blob));
        assert!(started.elapsed() < Duration::from_secs(1), "{}", case.id);
        seen += 1;
        let rule = RULES
            .iter()
            .find(|(_, cases)| cases.contains(&case.id))
            .map(|(rule, _)| *rule);
        match (case.outcome, rule, &read) {
            ("accepted", Some(rule), Err(error)) => assert_eq!(error.as_str(), rule, "{}", case.id),
            ("accepted", None, Ok(Ok(layer))) => {
                let whole = truth(&case);
                assert!(whole.starts_with(layer), "{}: other bytes", case.id);
            }
            ("accepted", ..) => panic!("{}: {read:?}", case.id),
            (outcome, _, Ok(result)) if HARMLESS.contains(&case.id) => {
                assert!(
                    outcome.starts_with("accepted") && result.is_ok(),
                    "{}",
                    case.id
                );
            }
            (outcome, _, Ok(result)) => {
                assert!(!outcome.starts_with("rejected"), "{}: taken", case.id);
                assert!(result.is_err(), "{}: {outcome}, but read here", case.id);
            }
            (_, _, Err(_)) => {}
        }
    }
    assert!(seen > 130, "only {seen} cases");
}

#[test]
fn errors_have_names() {
    let vectors = Vectors::open();
    let error = |id: &str| {
        let case = vectors
            .accepts("ztoc")
            .find(|case| case.id == id)
            .unwrap_or_else(|| panic!("no case {id}"));
        import(&case.bytes(), &case.layer()).expect_err(id)
    };
    for (id, name) in [
        ("tar-raw-empty", "Structure"),
        ("tar-raw-random", "Structure"),
        ("tar-raw-zeros", "Missing"),
        ("tar-algo-byte-0", "Compression"),
        ("tar-algo-gzip-on-tar", "CheckpointsLength"),
        ("tar-digest-sha512", "Digest"),
        ("tar-digests-one-extra", "SpanCount"),
        ("tar-entry-duplicated", "EntryOverlap"),
        ("tar-file-offset-beyond", "EntryBeyondEnd"),
        ("tar-file-offset-negative", "EntryRange"),
        ("tar-file-offset-unaligned", "EntryUnaligned"),
        ("tar-file-size-overflow", "EntryBeyondEnd"),
        ("tar-max-span-negative", "SpanCount"),
        ("tar-name-nul", "NulInName"),
        ("tar-zinfo-garbage", "TarInfo"),
        ("tar-zinfo-span-size-zero", "TarInfo"),
        ("gz-bits-8", "CheckpointBits"),
        ("gz-comp-size-larger", "BlobSize"),
        ("gz-first-in-nine", "FirstCheckpoint"),
        ("gz-first-out-nonzero", "FirstCheckpoint"),
        ("gz-have-wraps-32-bit", "CheckpointsLength"),
        ("gz-have-zero-12-bytes", "CheckpointsLength"),
        ("gz-in-beyond-blob", "SpanBeyondBlob"),
        ("gz-in-equals-blob-size", "SpanTooLong"),
        ("gz-in-swapped", "SpanOrder"),
        ("gz-out-equal", "SpanOrder"),
        ("gz-out-negative", "SpanOrder"),
    ] {
        assert_eq!(error(id), name, "{id}");
    }
}
