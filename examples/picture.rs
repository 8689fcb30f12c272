//! Draws the times to a program's first output as an SVG picture, from a file that `scripts/bench-start --json FILE` has written.
//!
//! `cargo run --example picture -- docs/figures/start.json >docs/figures/start.svg` draws a panel for each link, and in it a bar for each
//! way to start the image. The picture has its own colours for light and for dark pages, and refers to nothing outside itself.

use std::{fmt::Write as _, fs, process::ExitCode};

use serde::Deserialize;

/// The ways of `bench-start` from the top, their labels, and the class of their bars.
const WAYS: [(&str, &str, &str); 7] = [
    (
        "compact-recorded",
        "socinbd, compact index, recorded",
        "ours",
    ),
    ("compact", "socinbd, compact index", "ours"),
    ("soci-recorded", "socinbd, SOCI index, recorded", "ours"),
    ("soci", "socinbd, SOCI index", "ours"),
    ("nydus", "nydus", "peers"),
    ("soci-snapshotter", "soci-snapshotter, SOCI index", "peers"),
    ("pull", "containerd: pull, unpack, run", "peers"),
];

/// Colours: of the page, of texts, of texts with details, and of the two kinds of bars.
#[derive(Clone, Copy)]
pub struct Colours {
    pub page: &'static str,
    pub text: &'static str,
    pub detail: &'static str,
    pub ours: &'static str,
    pub peers: &'static str,
}

pub const LIGHT: Colours = Colours {
    page: "#ffffff",
    text: "#1f2328",
    detail: "#59636e",
    ours: "#0969da",
    peers: "#818b98",
};

pub const DARK: Colours = Colours {
    page: "#0d1117",
    text: "#f0f6fc",
    detail: "#9198a1",
    ours: "#4493f8",
    peers: "#6e7681",
};

/// Width of the picture, and of the margin around its content.
pub const WIDTH: f64 = 880.0;
pub const MARGIN: f64 = 20.0;

/// Where bars start, and how long the longest one is. Labels are before the bars, figures after them.
const BARS: f64 = 280.0;
const LONGEST: f64 = 300.0;

/// Heights: of the title, of a panel's heading, of a row, of the bar in it, and of a line of the notes.
const TITLE: f64 = 26.0;
const HEADING: f64 = 38.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
const NOTE: f64 = 18.0;

/// What `bench-start --json` writes. Its numbers are medians of the rounds.
#[derive(Deserialize)]
struct Run {
    command: String,
    date: String,
    machine: String,
    image_bytes: u64,
    program: String,
    results: Vec<Start>,
}

/// The starts by one way over one link.
#[derive(Deserialize)]
struct Start {
    way: String,
    mbit: u64,
    rtt_ms: u64,
    rounds: u64,
    seconds: f64,
    requests: u64,
    bytes: u64,
}

impl Start {
    /// Where the way is from the top.
    fn place(&self) -> Result<usize, String> {
        let place = WAYS.iter().position(|(way, ..)| *way == self.way);
        place.ok_or_else(|| format!("there is no way {:?}", self.way))
    }

    fn link(&self) -> String {
        if self.mbit.is_multiple_of(1000) {
            format!("{} Gbit/s, {} ms round trip", self.mbit / 1000, self.rtt_ms)
        } else {
            format!("{} Mbit/s, {} ms round trip", self.mbit, self.rtt_ms)
        }
    }

    fn time(&self) -> String {
        format!("{:.1} s", self.seconds)
    }

    fn details(&self) -> String {
        let rounds = if self.rounds == 1 { "round" } else { "rounds" };
        let megabytes = megabytes(self.bytes);
        format!(
            "{megabytes:.1} MB, {} requests, {} {rounds}",
            self.requests, self.rounds
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is printed rounded")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The picture of a run.
pub fn draw(json: &str) -> Result<String, String> {
    let mut run: Run = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let mut slowest = 0.0_f64;
    for start in &run.results {
        start.place()?;
        if start.seconds <= 0.0 {
            return Err(format!("{} took {} s", start.way, start.seconds));
        }
        slowest = slowest.max(start.seconds);
    }
    run.results
        .sort_by_key(|start| (start.mbit, start.rtt_ms, start.place().ok()));
    let panels: Vec<&[Start]> = run
        .results
        .chunk_by(|a, b| (a.mbit, a.rtt_ms) == (b.mbit, b.rtt_ms))
        .collect();
    let title = "Time from an image reference to the first output of its program";
    let notes = [
        format!(
            "{}, an image of {:.0} MB. Fetched bytes and requests as the registry counts them. Medians.",
            run.program,
            megabytes(run.image_bytes)
        ),
        format!("{}, {}", run.date, run.machine),
    ];
    let mut body = Body::default();
    body.text("title", MARGIN, MARGIN + 16.0, title);
    let mut y = MARGIN + TITLE;
    for panel in &panels {
        body.text("heading", MARGIN, y + HEADING - 12.0, &panel[0].link());
        y += HEADING;
        for start in *panel {
            body.row(start, y, LONGEST / slowest);
            y += ROW;
        }
    }
    for note in &notes {
        y += NOTE;
        body.text("detail", MARGIN, y, note);
    }
    let description = description(&panels, &run.command);
    Ok(document(title, &description, y + MARGIN, &body.0))
}

/// The elements of the picture, one a line.
#[derive(Default)]
struct Body(String);

impl Body {
    /// A label, a bar as long as its time, and the figures after it.
    fn row(&mut self, start: &Start, y: f64, scale: f64) {
        let Some((_, label, class)) = start.place().ok().map(|place| WAYS[place]) else {
            return;
        };
        let (length, base) = (start.seconds * scale, y + BAR - 3.0);
        self.text("label", MARGIN, base, label);
        let _ = writeln!(
            self.0,
            r#"<rect class="{class}" x="{BARS}" y="{y}" width="{length:.1}" height="{BAR}"/>"#
        );
        let after = BARS + length + 8.0;
        self.text("time", after, base, &start.time());
        let after = after + width("time", &start.time()) + 8.0;
        self.text("detail", after, base, &start.details());
    }

    fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        let text = escaped(text);
        let _ = writeln!(
            self.0,
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{text}</text>"#
        );
    }
}

/// The size of a class's font.
fn size(class: &str) -> u32 {
    match class {
        "title" => 17,
        "heading" => 14,
        "detail" => 12,
        _ => 13,
    }
}

/// The width of a text, at most: a character of the usual fonts without serifs takes 0.6 of the size on average.
#[expect(clippy::cast_precision_loss, reason = "texts are short")]
pub fn width(class: &str, text: &str) -> f64 {
    text.chars().count() as f64 * 0.6 * f64::from(size(class))
}

/// The picture in words.
fn description(panels: &[&[Start]], command: &str) -> String {
    let mut text = String::new();
    for panel in panels {
        let starts = panel.iter().filter_map(|start| {
            let (_, label, _) = WAYS[start.place().ok()?];
            Some(format!("{label}: {}", start.time()))
        });
        let starts = starts.collect::<Vec<_>>().join("; ");
        let _ = write!(text, "Over {}: {starts}. ", panel[0].link());
    }
    text + "Measured with " + command
}

fn document(title: &str, description: &str, height: f64, body: &str) -> String {
    let style = |colours: Colours| {
        let Colours {
            page,
            text,
            detail,
            ours,
            peers,
        } = colours;
        format!(
            ".page {{ fill: {page} }} text {{ fill: {text} }} .detail {{ fill: {detail} }} .ours {{ fill: {ours} }} .peers {{ fill: {peers} }}"
        )
    };
    let fonts = ["title", "heading", "label", "time", "detail"]
        .map(|class| format!(".{class} {{ font-size: {}px }}", size(class)))
        .join(" ");
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-labelledby="title description">
<title id="title">{}</title>
<desc id="description">{}</desc>
<style>
text {{ font-family: sans-serif }} .title, .heading {{ font-weight: bold }} {fonts}
{}
@media (prefers-color-scheme: dark) {{ {} }}
</style>
<rect class="page" width="{WIDTH}" height="{height}"/>
{body}</svg>
"#,
        escaped(title),
        escaped(description),
        style(LIGHT),
        style(DARK),
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[allow(dead_code, reason = "the tests include this file as a module")]
fn main() -> ExitCode {
    let Some(file) = std::env::args_os().nth(1) else {
        eprintln!("usage: picture FILE");
        return ExitCode::from(2);
    };
    let picture = fs::read_to_string(&file)
        .map_err(|error| error.to_string())
        .and_then(|json| draw(&json));
    match picture {
        Ok(picture) => {
            print!("{picture}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("picture: {}: {error}", file.display());
            ExitCode::FAILURE
        }
    }
}
