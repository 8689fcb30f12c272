//! Every zTOC that AWS's tool made: read with all fields as its own reader has them, and written again to the same bytes.

use serde_json::Value;
use socinbd::{
    tar::Timestamp,
    ztoc::{self, Compression, Error, Ztoc},
};

use super::{Vectors, ZtocCase, dumped_entry, list, number, sha256, text};
use crate::support::ztocs::rewritten;

#[test]
fn every_field_is_what_aws_s_reader_says() {
    let vectors = Vectors::open();
    let mut compared = 0;
    for case in vectors.ztocs() {
        let bytes = case.bytes();
        assert_eq!(
            sha256(&bytes),
            text(&case.case["sha256"]),
            "{}",
            case.name()
        );
        if let Some(refusal) = refused(&case) {
            let error = Ztoc::parse(&bytes).expect_err(case.name());
            assert!(refusal(&error), "{}: {error}", case.name());
            continue;
        }
        let ztoc = Ztoc::parse(&bytes).unwrap_or_else(|error| panic!("{}: {error}", case.name()));
        compare(case.name(), &bytes, &ztoc, &case.dump());
        compared += 1;
    }
    assert!(compared > 80, "only {compared} zTOCs were compared");
}

/// What AWS's tool writes and its own reader refuses whole is refused here too; `None` where it must be read.
fn refused(case: &ZtocCase<'_>) -> Option<fn(&Error) -> bool> {
    let error = case.case.get("reader_error").map(text)?;
    assert_eq!(error, "invalid toc entry", "{}", case.name());
    Some(|error| {
        matches!(
            error,
            Error::EntryOverlap { .. } | Error::SparseEntry { .. }
        )
    })
}

pub(super) fn compare(name: &str, bytes: &[u8], ztoc: &Ztoc, dump: &Value) {
    assert_eq!(ztoc.version, text(&dump["version"]), "{name}");
    assert_eq!(
        ztoc.build_tool,
        text(&dump["build_tool_identifier"]),
        "{name}"
    );
    let checkpoints = &bytes[ztoc.checkpoints.clone()];
    assert_eq!(
        sha256(checkpoints),
        text(&dump["checkpoints_sha256"]),
        "{name}"
    );
    let spans = &ztoc.spans;
    let algorithm = match spans.compression {
        Compression::Gzip => "gzip",
        Compression::Uncompressed => "uncompressed",
    };
    assert_eq!(algorithm, text(&dump["compression_algorithm"]), "{name}");
    let equal = |ours: u64, theirs: &Value| {
        assert_eq!(
            i64::try_from(ours).expect("small"),
            number(theirs),
            "{name}"
        );
    };
    equal(spans.compressed_size, &dump["compressed_archive_size"]);
    equal(spans.uncompressed_size, &dump["uncompressed_archive_size"]);
    equal(spans.span_size, &dump["zinfo"]["span_size"]);
    compare_spans(name, bytes, ztoc, dump);

    let files = list(&dump["files"]);
    assert_eq!(ztoc.entries.len(), files.len(), "{name}");
    for (index, (entry, file)) in ztoc.entries.iter().zip(files).enumerate() {
        let mut entry = entry.clone();
        let mtime = entry.mtime.take();
        assert_eq!(entry, dumped_entry(file), "{name}: entry {index}");
        compare_time(mtime, text(&file["mod_time"]), name);
    }
}

fn compare_spans(name: &str, bytes: &[u8], ztoc: &Ztoc, dump: &Value) {
    let listed = list(&dump["spans"]);
    let spans = &ztoc.spans.spans;
    assert_eq!(spans.len(), listed.len(), "{name}");
    let ends_early = |end: i64, start: i64| if end < start { start } else { end };
    for (span, listed) in spans.iter().zip(listed) {
        let of = |key: &str| number(&listed[key]);
        let ours = [
            span.compressed.start.get(),
            span.compressed.end.get(),
            span.uncompressed.start.get(),
            span.uncompressed.end.get(),
        ];
        let theirs = [
            of("start_compressed"),
            of("end_compressed"),
            of("start_uncompressed"),
            // data behind the tar's end: an empty span, not one shorter than zero
            ends_early(of("end_uncompressed"), of("start_uncompressed")),
        ];
        assert_eq!(
            ours.map(|ours| i64::try_from(ours).expect("small")),
            theirs,
            "{name}"
        );
        assert_eq!(span.digest.to_string(), text(&listed["digest"]), "{name}");
    }
    let Some(checkpoints) = dump["zinfo"].get("checkpoints") else {
        return;
    };
    for (span, checkpoint) in spans.iter().zip(list(checkpoints)) {
        assert_eq!(i64::from(span.bits), number(&checkpoint["bits"]), "{name}");
        let window = match &span.window {
            Some(range) => &bytes[range.clone()],
            None => &[0; ztoc::WINDOW_SIZE],
        };
        assert_eq!(sha256(window), text(&checkpoint["window_sha256"]), "{name}");
    }
}

/// The dump has the text as AWS's reader has it after reading: a time that it cannot read is the year 1.
fn compare_time(ours: Option<Timestamp>, theirs: &str, name: &str) {
    match ours {
        Some(time) => assert_eq!(Some(time), rfc3339(theirs), "{name}"),
        None => assert_eq!(theirs, "0001-01-01T00:00:00Z", "{name}"),
    }
}

/// A second reading of such times, day by day from 1970, so that the tests do not lean on the code that they test.
fn rfc3339(text: &str) -> Option<Timestamp> {
    let (date, rest) = text.split_once('T')?;
    let mut date = date.split('-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let zone_at = rest.find(['Z', '+', '-'])?;
    let (clock, zone) = rest.split_at(zone_at);
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let clock: Vec<i64> = clock
        .split(':')
        .filter_map(|part| part.parse().ok())
        .collect();
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let year_days = |year| 365 + i64::from(leap(year));
    let before: i64 =
        (1970..year).map(year_days).sum::<i64>() - (year..1970).map(year_days).sum::<i64>();
    let lengths = [
        31,
        28 + i64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let months: i64 = lengths[..usize::try_from(month - 1).ok()?].iter().sum();
    let east = match zone.split_at(1) {
        ("Z", _) => 0,
        (sign, clock) => {
            let (hours, minutes) = clock.split_once(':')?;
            let seconds = hours.parse::<i64>().ok()? * 3600 + minutes.parse::<i64>().ok()? * 60;
            if sign == "-" { -seconds } else { seconds }
        }
    };
    let days = before + months + day - 1;
    Some(Timestamp {
        seconds: days * 86_400 + clock[0] * 3600 + clock[1] * 60 + clock[2] - east,
        nanoseconds: format!("{fraction:0<9}").parse().ok()?,
    })
}

#[test]
fn what_is_read_is_written_to_the_same_bytes() {
    let vectors = Vectors::open();
    let mut compared = 0;
    for case in vectors.ztocs() {
        let same = case
            .case
            .get("reserialised_identical")
            .or(case.case.get("same_after_reserialise"));
        // times are written in UTC here, whatever zone they were in
        if same != Some(&Value::Bool(true)) || text(&case.case["tz"]) != "UTC" {
            continue;
        }
        let bytes = case.bytes();
        let ztoc = Ztoc::parse(&bytes).unwrap_or_else(|error| panic!("{}: {error}", case.name()));
        let written = rewritten(&ztoc, &ztoc.entries, &bytes[ztoc.checkpoints.clone()]);
        if lists_size_without_data(&case.dump()) {
            // 0 here; AWS's tool repeats what the header says
            assert_eq!(Ztoc::parse(&written), Ok(ztoc), "{}", case.name());
            continue;
        }
        assert!(written == bytes, "{}: other bytes", case.name());
        compared += 1;
    }
    assert!(compared > 70, "only {compared} zTOCs were compared");
}

fn lists_size_without_data(dump: &Value) -> bool {
    list(&dump["files"])
        .iter()
        .any(|file| file["type"] != "reg" && file["uncompressed_size"] != 0)
}

#[test]
fn times_of_another_zone_are_the_same_times() {
    let vectors = Vectors::open();
    let mut compared = 0;
    for case in vectors.ztocs() {
        if text(&case.case["tz"]) == "UTC" {
            continue;
        }
        let ztoc =
            Ztoc::parse(&case.bytes()).unwrap_or_else(|error| panic!("{}: {error}", case.name()));
        let of_utc = case.layer.clone().ztocs().find(|other| {
            text(&other.case["tz"]) == "UTC" && other.case["span_size"] == case.case["span_size"]
        });
        let Some(of_utc) = of_utc.filter(|other| other.case.get("file").is_some()) else {
            continue;
        };
        let of_utc = Ztoc::parse(&of_utc.bytes())
            .unwrap_or_else(|error| panic!("{}: {error}", of_utc.name()));
        for (one, other) in ztoc.entries.iter().zip(&of_utc.entries) {
            // at the ends of the four-digit years only one of the two may be written
            if one.mtime.is_some() && other.mtime.is_some() {
                assert_eq!(one, other, "{}", case.name());
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "no zTOC of another zone in the set");
}
