//! What we make of every layer of the vectors, beside what AWS's tool made of it. The rules are those of `docs/soci.md`, "Making
//! zTOCs"; a layer that is not named here must give the same bytes.

use std::{
    io::Read as _,
    time::{Duration, Instant},
};

use serde_json::Value;
use socinbd::{gzip::inflate::SpanDecoder, ztoc::Span};

use super::*;
use crate::vectors::{Layer, Vectors, ZtocCase, expected_entry, list, sha256, text};

/// How what we make differs from what AWS's tool makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Not at all.
    Same,
    /// An empty first block or member makes two checkpoints at 0 there; the daemon refuses that. We make one.
    OneCheckpointAtStart,
    /// No span starts behind the tar's end.
    NoSpanBehindEnd,
    /// The size of an entry that has no data is 0; there it is the header's, and the reader refuses that or finds no header.
    NoSizeWithoutData,
    /// It makes none; we do: what a plain unpack reads can be indexed.
    OnlyOurs,
    /// No zTOC can describe the layer, though there it may be written. The layer is read; the reason has this word.
    None(&'static str),
    /// Neither makes one: a plain unpack fails as well. Our error's variants have these names.
    Refused(&'static str, &'static str),
}

use Rule::{NoSizeWithoutData, None as NoZtoc, OnlyOurs, Refused};

const RULES: &[(&str, Rule)] = &[
    ("gz-members-empty-first", Rule::OneCheckpointAtStart),
    ("gz-first-block-empty", Rule::OneCheckpointAtStart),
    ("tar-padded-many-spans", Rule::NoSpanBehindEnd),
    ("tar-hardlink-size", NoSizeWithoutData),
    ("tar-symlink-size", NoSizeWithoutData),
    ("tar-dir-size", NoSizeWithoutData),
    ("tar-device-size", NoSizeWithoutData),
    ("gz-trailing-zeros", OnlyOurs),
    ("gz-trailing-garbage", OnlyOurs),
    ("gz-header-name-512", OnlyOurs),
    ("gz-not-gzip", OnlyOurs),
    ("tar-pax-global", NoZtoc("PAX global header")),
    ("tar-typeflag-7", OnlyOurs),
    ("gz-empty-file", NoZtoc("empty")),
    ("tar-plain-zero-bytes", NoZtoc("empty")),
    ("zstd", NoZtoc("zstd")),
    ("zstd-as-gzip", NoZtoc("zstd")),
    ("tar-sparse-gnu", NoZtoc("sparse")),
    ("tar-sparse-pax-0.0", NoZtoc("sparse")),
    ("tar-sparse-pax-0.1", NoZtoc("sparse")),
    ("tar-sparse-pax-1.0", NoZtoc("sparse")),
    ("gz-header-reserved-flag", Refused("Gzip", "ReservedFlags")),
    ("gz-fhcrc-wrong", Refused("Gzip", "Checksum")),
    ("gz-truncated", Refused("Gzip", "Truncated")),
    ("gz-no-trailer", Refused("Gzip", "Truncated")),
    ("gz-crc-wrong", Refused("Gzip", "Crc")),
    ("gz-isize-wrong", Refused("Gzip", "Size")),
    ("gz-zlib-stream", Refused("Unpacked", "Checksum")),
    ("tar-pax-path-nul", Refused("Tar", "PaxRecord")),
    ("tar-pax-malformed", Refused("Tar", "PaxRecord")),
    ("tar-pax-bad-time", Refused("Tar", "Number")),
    ("tar-base256-size-neg", Refused("Tar", "Number")),
    ("tar-octal-bad", Refused("Tar", "Number")),
    ("tar-base256-size-huge", Refused("Tar", "Truncated")),
    ("tar-truncated-data", Refused("Tar", "Truncated")),
    ("tar-truncated-header", Refused("Tar", "Truncated")),
    ("tar-checksum-bad", Refused("Tar", "Checksum")),
    (
        "tar-one-end-block-then-entry",
        Refused("Tar", "SingleZeroBlock"),
    ),
    ("tar-typeflag-unknown", Refused("Tar", "UnsupportedType")),
    ("tar-typeflag-D", Refused("Tar", "UnsupportedType")),
    ("tar-typeflag-V", Refused("Tar", "UnsupportedType")),
    ("tar-xheader-too-long", Refused("Tar", "SpecialTooLong")),
];

fn rule(id: &str) -> Rule {
    RULES
        .iter()
        .find(|(layer, _)| *layer == id)
        .map_or(Rule::Same, |(_, rule)| *rule)
}

/// The layer's bytes by an inflater and a header parser that are not ours, checked against the vectors' own diff ID where they
/// have one.
fn stream(layer: &Layer<'_>) -> Vec<u8> {
    let blob = layer.blob();
    let mut stream = Vec::new();
    match unpack::packing(&blob) {
        Packing::Plain => stream = blob,
        Packing::Zstd => stream = zstd::decode_all(&blob[..]).unwrap(),
        Packing::Gzip => {
            // what follows the last member is an error there, behind all the data
            let _ = flate2::bufread::MultiGzDecoder::new(&blob[..]).read_to_end(&mut stream);
        }
    }
    if let (Some(diff_id), None) = (
        layer.case["diff_id"].as_str(),
        layer.case.get("decompress_error"),
    ) {
        assert_eq!(Digest::of(&stream).to_string(), diff_id, "{}", layer.id);
    }
    stream
}

/// Said once more, so that the test does not ask the code that it tests.
mod unpack {
    use socinbd::oci::Packing;

    pub(super) fn packing(blob: &[u8]) -> Packing {
        match blob {
            [0x1f, 0x8b, ..] => Packing::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            _ => Packing::Plain,
        }
    }
}

/// `built`, `reserialised` or `refused`.
fn made<'a>(case: &'a ZtocCase<'_>) -> &'a str {
    text(&case.case["result"])
}

fn declared(layer: &Layer<'_>) -> Packing {
    match layer.compression() {
        "gzip" => Packing::Gzip,
        "zstd" => Packing::Zstd,
        "uncompressed" => Packing::Plain,
        other => panic!("{other}"),
    }
}

#[test]
fn every_layer_is_indexed_as_aws_does_or_by_a_rule() {
    let vectors = Vectors::open();
    let mut same = 0;
    for case in vectors.layers().flat_map(Layer::ztocs) {
        let name = case.name();
        let options = Options {
            span_size: case.case["span_size"].as_u64().expect("a span size"),
            build_tool: text(&case.case["build_tool_identifier"]).to_owned(),
            ..Options::default()
        };
        let blob = case.layer.blob();
        let result = index(
            &blob,
            declared(&case.layer),
            options,
            10_000,
            Collect::default(),
        );
        let rule = rule(case.layer.id);
        if let Refused(outer, inner) = rule {
            let error = format!("{:?}", result.expect_err(name));
            assert!(
                error.starts_with(outer) && error.contains(inner),
                "{name}: {error}"
            );
            assert_eq!(made(&case), "refused", "{name}");
            continue;
        }
        let (indexed, sink) = result.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let stream = stream(&case.layer);
        assert_eq!(indexed.size, blob.len() as u64, "{name}");
        assert_eq!(indexed.digest.hex(), sha256(&blob), "{name}");
        assert_eq!(indexed.diff_id, Some(Digest::of(&stream)), "{name}");
        assert_eq!(indexed.uncompressed_size, stream.len() as u64, "{name}");
        assert_files(&case.layer, &indexed, &sink);

        let ours = match (rule, indexed.ztoc.expect("a zTOC was asked for")) {
            (NoZtoc(word), Err(reason)) => {
                assert!(reason.contains(word), "{name}: {reason}");
                continue;
            }
            (_, Ok(ours)) => ours,
            (_, Err(reason)) => panic!("{name}: {reason}"),
        };
        assert_spans(name, &blob, &stream, &ours);
        assert_eq!(rule == OnlyOurs, made(&case) == "refused", "{name}");
        match rule {
            Rule::Same => {
                same += 1;
                assert_same(&case, &ours);
            }
            Rule::OneCheckpointAtStart => assert_one_checkpoint(&case, &ours),
            Rule::NoSpanBehindEnd => assert_no_span_behind_end(&case, &ours),
            NoSizeWithoutData => {
                // of what AWS's tool wrote, and AWS's reader refuses, at most the sizes differ
                assert!(case.bytes().len().abs_diff(ours.len()) <= 64, "{name}");
                let entries = Ztoc::parse(&ours).expect(name).entries;
                assert_eq!(entries, indexed.entries, "{name}");
            }
            OnlyOurs => {}
            NoZtoc(_) | Refused(..) => panic!("{name} has a zTOC by no rule"),
        }
    }
    assert!(same >= 30, "only {same} zTOCs are like AWS's");
}

/// The entries and the files' data, beside what Go's `archive/tar` read.
fn assert_files(layer: &Layer<'_>, indexed: &Indexed, sink: &Collect) {
    if layer.case.get("decompress_error").is_some() {
        return; // nothing was read there
    }
    let Some(expected) = layer.expected() else {
        return; // zstd
    };
    let expected: Vec<&Value> = list(&expected["entries"])
        .iter()
        .filter(|entry| expected_entry(entry).is_some())
        .collect();
    assert_eq!(indexed.entries.len(), expected.len(), "{}", layer.id);
    for ((entry, (name, data)), expected) in indexed.entries.iter().zip(&sink.files).zip(expected) {
        let mut expected_entry = expected_entry(expected).expect("filtered");
        if entry.sparse.is_some() {
            expected_entry.sparse.clone_from(&entry.sparse);
            expected_entry.data_offset = entry.data_offset;
        }
        assert_eq!(*entry, expected_entry, "{}", layer.id);
        assert_eq!(*name, entry.name, "{}", layer.id);
        if let Some(digest) = expected["sha256"].as_str() {
            let mut data = data.clone();
            assert!(data.len() as u64 <= entry.size, "{}", layer.id);
            data.resize(entry.size as usize, 0);
            assert_eq!(sha256(&data), digest, "{}: {:?}", layer.id, entry.name);
        }
    }
}

/// The same bytes; the same content where AWS's tool wrote for another time zone, or wrote a version 1 that it no longer makes.
fn assert_same(case: &ZtocCase<'_>, ours: &[u8]) {
    let theirs = case.bytes();
    if case.case["tz"] == "UTC" && made(case) == "built" {
        assert!(ours == theirs, "{} has other bytes", case.name());
    } else {
        assert!(ours != theirs, "{}", case.name());
    }
    let (mut ours, mut theirs) = (Parsed::new(ours), Parsed::new(&theirs));
    for (ours, theirs) in ours.ztoc.entries.iter_mut().zip(&mut theirs.ztoc.entries) {
        // a year that only one of two time zones can write
        if ours.mtime.is_none() || theirs.mtime.is_none() {
            ours.mtime = theirs.mtime;
        }
    }
    assert_eq!(ours.ztoc.entries, theirs.ztoc.entries, "{}", case.name());
    assert_eq!(ours.ztoc.version, theirs.ztoc.version);
    assert_eq!(ours.ztoc.build_tool, theirs.ztoc.build_tool);
    assert_eq!(ours.sizes(), theirs.sizes(), "{}", case.name());
    assert!(ours.spans() == theirs.spans(), "{}", case.name());
}

fn assert_one_checkpoint(case: &ZtocCase<'_>, ours: &[u8]) {
    let refusal = text(&case.case["soci_reads"]["span_manager"]);
    assert_eq!(refusal, "span offsets are non-monotonic");
    let theirs = case.bytes();
    let (ours, theirs) = (Parsed::new(ours), Parsed::new(&theirs));
    assert_eq!(ours.ztoc.entries, theirs.ztoc.entries);
    assert_eq!(ours.sizes(), theirs.sizes());
    let (ours, theirs) = (ours.spans(), theirs.spans());
    // their first is empty; ours goes from its start to the second's end
    assert!(theirs[0].0.uncompressed.is_empty());
    assert_eq!(ours[0].0.compressed.start, theirs[0].0.compressed.start);
    assert_eq!(ours[0].0.compressed.end, theirs[1].0.compressed.end);
    assert_eq!(ours[0].0.uncompressed, theirs[1].0.uncompressed);
    assert!(ours[1..] == theirs[2..]);
}

fn assert_no_span_behind_end(case: &ZtocCase<'_>, ours: &[u8]) {
    let dump = case.dump();
    let theirs = list(&dump["spans"]);
    let last = theirs.last().expect("a span");
    if last["end_uncompressed"].as_u64() >= last["start_uncompressed"].as_u64() {
        return assert_same(case, ours); // with such large spans none starts there
    }
    let ours = Parsed::new(ours);
    let end = ours.ztoc.spans.uncompressed_size;
    let spans = ours.spans();
    let wanted: Vec<&Value> = theirs
        .iter()
        .filter(|span| span["start_uncompressed"].as_u64() <= Some(end))
        .collect();
    assert_eq!(spans.len(), wanted.len());
    for ((span, _), wanted) in spans.iter().zip(&wanted) {
        assert_eq!(
            Some(span.compressed.start.get()),
            wanted["start_compressed"].as_u64()
        );
        assert_eq!(
            Some(span.uncompressed.start.get()),
            wanted["start_uncompressed"].as_u64()
        );
    }
    let last = &spans.last().expect("a span").0;
    assert_eq!(last.compressed.end.get(), ours.ztoc.spans.compressed_size);
}

/// A zTOC with its bytes, for comparing.
struct Parsed<'a> {
    bytes: &'a [u8],
    ztoc: Ztoc,
}

impl<'a> Parsed<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let ztoc = Ztoc::parse(bytes).expect("a zTOC");
        Self { bytes, ztoc }
    }

    fn sizes(&self) -> (Compression, [u64; 3]) {
        let spans = &self.ztoc.spans;
        let sizes = [
            spans.compressed_size,
            spans.uncompressed_size,
            spans.span_size,
        ];
        (spans.compression, sizes)
    }

    /// The spans with their windows' bytes in place of their positions.
    fn spans(&self) -> Vec<(Span, Option<&[u8]>)> {
        let spans = self.ztoc.spans.spans.iter();
        spans
            .map(|span| {
                let window = span.window.clone().map(|window| &self.bytes[window]);
                let span = Span {
                    window: None,
                    ..span.clone()
                };
                (span, window)
            })
            .collect()
    }
}

#[test]
fn every_span_of_every_ztoc_decodes_alone() {
    let vectors = Vectors::open();
    let mut spans = 0;
    for case in vectors.ztocs() {
        let table = case.bytes();
        let Ok(ztoc) = Ztoc::parse(&table) else {
            // refused by AWS's reader too, or it has no spans
            assert!(
                case.case.get("reader_error").is_some() || case.case["spans"] == 0,
                "{}",
                case.name()
            );
            continue;
        };
        let (blob, stream) = (case.layer.blob(), stream(&case.layer));
        let mut decoder = SpanDecoder::default();
        for (index, span) in ztoc.spans.spans.iter().enumerate() {
            let name = format!("{}, span {index}", case.name());
            let bytes = compressed(&blob, span).expect(&name);
            assert_eq!(Digest::of(bytes), span.digest, "{name}");
            let decoded = decode(&mut decoder, &table, ztoc.spans.compression, span, bytes)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
            assert!(decoded == &stream[start as usize..end as usize], "{name}");
            spans += 1;
        }
    }
    assert!(spans >= 60, "only {spans} spans");
}

#[test]
fn broken_tables_give_errors_or_bytes_and_soon() {
    let vectors = Vectors::open();
    let mut decoder = SpanDecoder::default();
    let mut wrong = 0;
    for case in vectors.accepts("ztoc") {
        let started = Instant::now();
        let table = case.bytes();
        let Ok(ztoc) = Ztoc::parse(&table) else {
            continue; // what is refused, and why, is another test's
        };
        let blob = case.layer();
        let stream = match unpack::packing(&blob) {
            Packing::Gzip => {
                let mut stream = Vec::new();
                flate2::read::MultiGzDecoder::new(&blob[..])
                    .read_to_end(&mut stream)
                    .unwrap();
                stream
            }
            _ => blob.clone(),
        };
        let spans = &ztoc.spans.spans;
        for (index, span) in spans.iter().enumerate() {
            let name = format!("{} ({}), span {index}", case.id, case.outcome);
            let next = spans.get(index + 1);
            let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
            let Some(bytes) = compressed(&blob, span) else {
                continue;
            };
            let Ok(decoded) = decode(&mut decoder, &table, ztoc.spans.compression, span, bytes)
            else {
                continue;
            };
            assert_eq!(decoded.len() as u64, end - start, "{name}");
            if Digest::of(bytes) != span.digest
                || decoded.is_empty()
                || stream.get(start as usize..end as usize) == Some(decoded)
            {
                continue;
            }
            // wrong bytes from the right compressed ones: the table's offsets lie, or its window
            wrong += 1;
            let before = spans[..index].last().expect("the first span has no lies");
            let before_bytes = compressed(&blob, before).expect(&name);
            let window = |span: &Span| span.window.clone().map(|window| &table[window]);
            let surplus = decoder.surplus() && next.is_some();
            let follows = decoder
                .decode(before, before_bytes, window(before))
                .is_ok_and(|decoded| {
                    let next = window(span).expect(&name);
                    inflate::window_follows(window(before), decoded, next)
                });
            assert!(
                surplus || !follows,
                "{name}: nothing shows that its bytes are wrong"
            );
        }
        let time = started.elapsed();
        assert!(time < Duration::from_secs(1), "{} took {time:?}", case.id);
    }
    assert!(wrong > 0, "the set has tables that lie");
}
