//! The picture of the README, and the file with a benchmark's results that it is drawn from.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

#[path = "../../examples/picture.rs"]
mod drawer;

use drawer::{Colours, DARK, LIGHT, MARGIN, WIDTH, draw, width};

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn file(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap()
}

/// What a program prints that succeeds.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What stands between two texts, for each line that has both.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Vec<&'a str> {
    let parts = text.lines().filter_map(|line| line.split_once(before));
    parts
        .filter_map(|(_, rest)| rest.split_once(after))
        .map(|(part, _)| part)
        .collect()
}

/// A number attribute of an element.
fn number(element: &str, name: &str) -> f64 {
    let text = between(element, &format!(" {name}=\""), "\"");
    text[0].parse().unwrap()
}

#[test]
fn the_picture_is_drawn_from_its_file() {
    let drawn = draw(&file("docs/figures/start.json")).unwrap();
    assert!(
        drawn == file("docs/figures/start.svg"),
        "cargo run --example picture -- docs/figures/start.json >docs/figures/start.svg"
    );
}

#[test]
fn the_picture_is_xml_that_refers_to_nothing_outside() {
    let picture = file("docs/figures/start.svg");
    let script = "import sys, xml.etree.ElementTree as tree\n\
                  for element in tree.parse(sys.argv[1]).iter(): print(element.tag, *element.attrib)";
    let mut python = Command::new("/usr/bin/python3");
    let elements = output(
        python
            .args(["-c", script])
            .arg(path("docs/figures/start.svg")),
    );
    for element in elements.lines() {
        let mut words = element.split(' ');
        let tag = words.next().unwrap();
        let tag = tag.strip_prefix("{http://www.w3.org/2000/svg}").unwrap();
        assert!(
            ["svg", "title", "desc", "style", "rect", "text"].contains(&tag),
            "{tag}"
        );
        for attribute in words {
            assert!(!attribute.contains("href"), "{element}");
        }
    }
    assert!(!picture.contains("url(") && !picture.contains("@import"));
    // a screen reader says the title and the description
    assert!(picture.contains(r#"role="img" aria-labelledby="title description""#));
    assert_eq!(
        between(&picture, r#"<title id="title">"#, "</title>").len(),
        1
    );
    let description = between(&picture, r#"<desc id="description">"#, "</desc>");
    assert!(
        description[0].contains(
            "Over 100 Mbit/s, 20 ms round trip: socinbd, compact index, recorded: 5.5 s;"
        )
    );
    assert!(description[0].contains("containerd: pull, unpack, run: 37.7 s."));
}

#[test]
fn bars_are_as_long_as_their_times() {
    let picture = file("docs/figures/start.svg");
    let bars = picture
        .lines()
        .filter(|line| line.starts_with("<rect") && line.contains(" x="));
    let bars: Vec<f64> = bars.map(|line| number(line, "width")).collect();
    let times: Vec<f64> = between(&picture, r#"<text class="time""#, " s</text>")
        .iter()
        .map(|text| text.split_once('>').unwrap().1.parse().unwrap())
        .collect();
    assert_eq!(bars.len(), 12);
    assert_eq!(times.len(), bars.len());
    for (bar, time) in bars.iter().zip(&times) {
        let expected = bars[5] * time / times[5];
        assert!((bar - expected).abs() < 0.1, "{bar} for {time} s");
    }
}

#[test]
fn texts_and_bars_do_not_overlap() {
    let picture = file("docs/figures/start.svg");
    // what is on a line, from its left to its right
    let mut lines: BTreeMap<i64, Vec<(f64, f64)>> = BTreeMap::new();
    for element in picture.lines() {
        let from = |height: f64| (number(element, "y") + height).round() as i64;
        if element.starts_with("<text") {
            let class = between(element, "class=\"", "\"")[0];
            let text = between(element, "\">", "</text>")[0];
            let x = number(element, "x");
            lines
                .entry(from(0.0))
                .or_default()
                .push((x, x + width(class, text)));
        } else if element.starts_with("<rect") && element.contains(" x=") {
            // a row's texts stand 3 above the lower edge of its bar
            let (x, length) = (number(element, "x"), number(element, "width"));
            lines
                .entry(from(number(element, "height") - 3.0))
                .or_default()
                .push((x, x + length));
        }
    }
    assert!(lines.len() > 14, "{lines:?}");
    for (y, parts) in &mut lines {
        parts.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(
            parts.windows(2).all(|pair| pair[0].1 < pair[1].0),
            "{y}: {parts:?}"
        );
        assert!(
            parts[0].0 >= MARGIN && parts[parts.len() - 1].1 <= WIDTH - MARGIN,
            "{y}: {parts:?}"
        );
    }
    let heights: Vec<i64> = lines.into_keys().collect();
    assert!(
        heights.windows(2).all(|pair| pair[1] - pair[0] >= 18),
        "{heights:?}"
    );
}

/// The ratio of two colours' luminance, as WCAG 2 has it.
fn contrast(one: &str, other: &str) -> f64 {
    let luminance = |colour: &str| {
        let part = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.03928 {
                value / 12.92
            } else {
                ((value + 0.055) / 1.055).powf(2.4)
            }
        };
        0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
    };
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

#[test]
fn colours_can_be_told_apart_on_light_and_dark_pages() {
    assert!((contrast("#ffffff", "#000000") - 21.0).abs() < 0.01);
    for Colours {
        page,
        text,
        detail,
        ours,
        peers,
    } in [LIGHT, DARK]
    {
        for text in [text, detail] {
            assert!(contrast(page, text) >= 4.5, "{text} on {page}");
        }
        for bar in [ours, peers] {
            assert!(contrast(page, bar) >= 3.0, "{bar} on {page}");
        }
    }
}

/// What `bench-start --json` makes of its results.
fn json(lines: &str) -> String {
    let run = r#"{"command":"c","date":"2026-11-29","machine":"m <1>","image_bytes":264000000,"program":"sh & co"}"#;
    let results = tempfile::NamedTempFile::new().unwrap();
    fs::write(results.path(), lines).unwrap();
    let mut jq = Command::new("jq");
    jq.args(["-R", "-n", "--argjson", "run", run, "-f"]);
    output(jq.arg(path("scripts/bench-start.jq")).arg(results.path()))
}

#[test]
fn the_results_of_a_benchmark_are_medians_and_are_drawn() {
    let json = json(
        "compact 1000:2 4500 600 55000000\npull 1000:2 37700 9 542000000\ncompact 1000:2 4800 610 56000000\n\
         pull 1000:2 37800 9 542000000\ncompact 1000:2 4640 605 55500000\ncompact 100:20 14000 600 55000000\n",
    );
    let run: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(run["date"], "2026-11-29");
    assert_eq!(
        run["results"],
        serde_json::json!([
            { "way": "compact", "mbit": 1000, "rtt_ms": 2, "rounds": 3, "seconds": 4.64, "requests": 605, "bytes": 55_500_000 },
            { "way": "pull", "mbit": 1000, "rtt_ms": 2, "rounds": 2, "seconds": 37.75, "requests": 9, "bytes": 542_000_000 },
            { "way": "compact", "mbit": 100, "rtt_ms": 20, "rounds": 1, "seconds": 14, "requests": 600, "bytes": 55_000_000 },
        ])
    );
    let picture = draw(&json).unwrap();
    let texts: Vec<&str> = between(&picture, "<text", "</text>")
        .iter()
        .map(|text| text.split_once('>').unwrap().1)
        .skip(1)
        .collect();
    assert_eq!(
        texts,
        [
            "100 Mbit/s, 20 ms round trip",
            "socinbd, compact index",
            "14.0 s",
            "55.0 MB, 600 requests, 1 round",
            "1 Gbit/s, 2 ms round trip",
            "socinbd, compact index",
            "4.6 s",
            "55.5 MB, 605 requests, 3 rounds",
            "containerd: pull, unpack, run",
            "37.8 s",
            "542.0 MB, 9 requests, 2 rounds",
            "sh &amp; co, an image of 264 MB. Fetched bytes and requests as the registry counts them. Medians.",
            "2026-11-29, m &lt;1&gt;",
        ]
    );
}

#[test]
fn what_is_not_a_result_is_not_drawn() {
    assert_eq!(
        draw(&json("other 1000:2 1 1 1\n")).unwrap_err(),
        "there is no way \"other\""
    );
    assert_eq!(
        draw(&json("pull 1000:2 0 1 1\n")).unwrap_err(),
        "pull took 0 s"
    );
    assert!(draw("{}").is_err());
}
