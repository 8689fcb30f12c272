//! `socinbd top`.

use std::{collections::HashMap, process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::Instant;

use super::screen::{self, Line, Style, fit, line};
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, output},
    engine::{AttachmentState, AttachmentStatus, LayerStatus},
    error::{Error, Kind, Result},
    layer::DiskCounters,
};

/// Width of the columns after the image, with the space before each.
const COLUMNS: [(&str, usize); 7] = [
    ("STATE", 10),
    ("READS/S", 9),
    ("BYTES/S", 11),
    ("WAITS/S", 9),
    ("WAIT MS", 9),
    ("FETCH/S", 11),
    ("SPANS", 16),
];
/// Minimum width of the image's column; below it, columns are left out from the right.
const IMAGE: usize = 16;

/// Show reads, waits and fetches of the attached images as they happen
///
/// For each image: the reads that the daemon has answered and their bytes per second, the reads that have waited for a fetch per second and
/// how long they waited on average, the compressed bytes fetched per second, and the present spans. Reads that the kernel answers from its
/// page cache, or from a complete layer, do not reach the daemon. A layer that the snapshotter has mounted is a row of its own. Quit with q.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd top\n\
\x20 socinbd top --interval 5")]
pub(crate) struct TopCommand {
    /// Time between two updates
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

impl TopCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        if !screen::is_terminal() || global.json {
            return Err(Error::new(
                Kind::InvalidArgument,
                "`top` needs a terminal; use `socinbd --json list --watch`",
            ));
        }
        let client = Client::new(&absolute(&global.run_dir)?);
        let mut before = None;
        screen::show(Duration::from_secs(self.interval), async |size| {
            let now = match client.daemon().await {
                Ok(Some(_)) => sample(&client).await,
                Ok(None) => {
                    let text = format!("no daemon runs at {}", global.run_dir.display());
                    Err(Error::new(Kind::NotFound, text))
                }
                Err(error) => Err(error),
            };
            Ok(match now {
                Ok(sample) => {
                    let lines = frame(before.as_ref(), &sample, size);
                    before = Some(sample);
                    lines
                }
                Err(error) => {
                    before = None;
                    vec![line(Style::Bad, error.report())]
                }
            })
        })
        .await?;
        Ok(ExitCode::SUCCESS)
    }
}

/// An image, or a layer that a snapshotter has mounted.
#[derive(Clone, Debug)]
struct Shown {
    /// Tells it from all others.
    id: String,
    name: String,
    state: AttachmentState,
    spans: Option<(u64, u64)>,
    counters: Option<DiskCounters>,
}

impl Shown {
    fn image(status: AttachmentStatus) -> Self {
        Self {
            name: status.attachment.reference.to_string(),
            id: status.attachment.id,
            state: status.state,
            spans: status.spans,
            counters: status.counters,
        }
    }

    fn layer(layer: LayerStatus) -> Self {
        let spans = layer.spans;
        Self {
            name: format!("layer {}", &layer.digest.hex()[..12]),
            id: format!("{} {}", layer.digest, layer.table),
            state: layer.state,
            spans: spans.map(|(present, all)| (present.into(), all.into())),
            counters: layer.counters,
        }
    }
}

/// What is in use at one time.
struct Sample {
    at: Instant,
    shown: Vec<Shown>,
}

/// The images, and the layers of no image.
async fn sample(client: &Client) -> Result<Sample> {
    let images = client.attachments().await?.into_iter().map(Shown::image);
    let layers = client.layers().await?.into_iter();
    let layers = layers.filter(|layer| layer.attachments.is_empty());
    Ok(Sample {
        at: Instant::now(),
        shown: images.chain(layers.map(Shown::layer)).collect(),
    })
}

/// What has happened to an image or a layer per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rates {
    reads: f64,
    read_bytes: f64,
    waits: f64,
    /// Mean milliseconds of a wait.
    wait_ms: f64,
    fetched_bytes: f64,
}

impl Rates {
    /// Counters go back when another daemon serves the attachment: then nothing has happened yet.
    fn between(before: DiskCounters, now: DiskCounters, seconds: f64) -> Self {
        let change = |before: u64, now: u64| now.saturating_sub(before) as f64;
        let rate = |before, now| change(before, now) / seconds.max(0.001);
        let waits = change(before.waits, now.waits);
        Self {
            reads: rate(before.reads, now.reads),
            read_bytes: rate(before.read_bytes, now.read_bytes),
            waits: rate(before.waits, now.waits),
            wait_ms: match waits > 0.0 {
                true => change(before.wait_ms, now.wait_ms) / waits,
                false => 0.0,
            },
            fetched_bytes: rate(before.fetched_bytes, now.fetched_bytes),
        }
    }
}

/// The lines for a terminal of this size.
fn frame(before: Option<&Sample>, now: &Sample, (columns, rows): (usize, usize)) -> Vec<Line> {
    let seconds = before.map_or(0.0, |before| (now.at - before.at).as_secs_f64());
    let counters_before: HashMap<&str, DiskCounters> = before
        .iter()
        .flat_map(|before| &before.shown)
        .filter_map(|shown| Some((shown.id.as_str(), shown.counters?)))
        .collect();
    let mut images: Vec<(&Shown, Option<Rates>)> = now
        .shown
        .iter()
        .map(|shown| {
            let earlier = counters_before.get(shown.id.as_str());
            let rates = earlier.zip(shown.counters.as_ref());
            let rates = rates.map(|(before, now)| Rates::between(*before, *now, seconds));
            (shown, rates)
        })
        .collect();
    let activity = |rates: &Option<Rates>| {
        let rates = rates.unwrap_or_default();
        (rates.fetched_bytes, rates.waits, rates.reads)
    };
    // the busiest first; the others stay in the order of their IDs
    images.sort_by(|(_, a), (_, b)| {
        activity(b)
            .partial_cmp(&activity(a))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let sum = |of: fn(&Rates) -> f64| {
        images
            .iter()
            .filter_map(|(_, it)| it.as_ref())
            .map(of)
            .sum()
    };
    let totals: [f64; 3] = [
        sum(|rates| rates.reads),
        sum(|rates| rates.read_bytes),
        sum(|rates| rates.fetched_bytes),
    ];
    let mut lines = vec![
        line(
            Style::Heading,
            format!(
                "{} images, {:.0} reads/s, {}/s, fetched {}/s; q quits",
                images.len(),
                totals[0],
                bytes(totals[1]),
                bytes(totals[2]),
            ),
        ),
        Vec::new(),
    ];
    let shown = shown_columns(columns);
    let taken: usize = COLUMNS[..shown].iter().map(|column| column.1).sum();
    let image_width = columns.saturating_sub(taken);
    let mut heading = fit("IMAGE", image_width);
    for (name, width) in &COLUMNS[..shown] {
        heading.push_str(&format!("{name:>width$}"));
    }
    lines.push(line(Style::Heading, heading));
    let room = rows.saturating_sub(lines.len());
    let fitting = match images.len() > room {
        true => room.saturating_sub(1), // the last line says how many are not shown
        false => images.len(),
    };
    for (status, rates) in &images[..fitting] {
        lines.push(row(status, *rates, image_width, shown));
    }
    if fitting < images.len() && room > 0 {
        let more = images.len() - fitting;
        lines.push(line(Style::Plain, format!("and {more} more")));
    }
    lines
}

/// How many columns fit beside the image.
fn shown_columns(columns: usize) -> usize {
    let mut left = columns.saturating_sub(IMAGE);
    COLUMNS
        .iter()
        .take_while(|(_, width)| {
            let fits = *width <= left;
            left = left.saturating_sub(*width);
            fits
        })
        .count()
}

fn row(it: &Shown, rates: Option<Rates>, image_width: usize, shown: usize) -> Line {
    let rate = |of: fn(Rates) -> String| rates.map_or("-".to_owned(), of);
    let spans = it.spans.map_or("-".to_owned(), |(present, all)| {
        let percent = (present * 100).checked_div(all).unwrap_or(100);
        format!("{present}/{all} {percent}%")
    });
    let cells = [
        it.state.to_string(),
        rate(|rates| format!("{:.0}", rates.reads)),
        rate(|rates| bytes(rates.read_bytes)),
        rate(|rates| format!("{:.1}", rates.waits)),
        rate(|rates| format!("{:.0}", rates.wait_ms)),
        rate(|rates| bytes(rates.fetched_bytes)),
        spans,
    ];
    let style = match it.state {
        AttachmentState::Complete => Style::Good,
        AttachmentState::Filling => Style::Busy,
        AttachmentState::Degraded | AttachmentState::Dead => Style::Bad,
        _ => Style::Plain,
    };
    let mut line = line(Style::Plain, fit(&it.name, image_width));
    for (number, (cell, (_, width))) in cells.iter().zip(COLUMNS).take(shown).enumerate() {
        let style = if number == 0 { style } else { Style::Plain };
        let cell = match cell.chars().count() < width {
            true => format!("{cell:>width$}"),
            false => format!(" {}", fit(cell, width - 1)),
        };
        line.push((style, cell));
    }
    line
}

fn bytes(count: f64) -> String {
    output::bytes(count as u64) // not negative
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(reads: u64, waits: u64, wait_ms: u64) -> DiskCounters {
        DiskCounters {
            reads,
            read_bytes: reads * 4096,
            waits,
            wait_ms,
            fetches: waits,
            fetched_bytes: waits * 1000,
        }
    }

    #[test]
    fn rates_are_changes_per_second() {
        let rates = Rates::between(counters(10, 2, 100), counters(30, 6, 300), 2.0);
        let expected = Rates {
            reads: 10.0,
            read_bytes: 40960.0,
            waits: 2.0,
            wait_ms: 50.0,
            fetched_bytes: 2000.0,
        };
        assert_eq!(rates, expected);
        // another daemon has started to count anew
        let rates = Rates::between(counters(10, 2, 100), counters(1, 0, 0), 1.0);
        assert_eq!(rates, Rates::default());
        assert!(
            Rates::between(counters(0, 0, 0), counters(1, 1, 1), 0.0)
                .reads
                .is_finite()
        );
    }

    fn samples(count: usize) -> Sample {
        let shown = |number: usize| {
            let mut status = AttachmentStatus::of_test(&format!("{number:016x}"));
            status.counters = Some(counters(number as u64, 0, 0));
            Shown::image(status)
        };
        Sample {
            at: Instant::now(),
            shown: (0..count).map(shown).collect(),
        }
    }

    fn width(line: &Line) -> usize {
        line.iter().map(|part| part.1.chars().count()).sum()
    }

    #[test]
    fn a_frame_fits_every_terminal() {
        for columns in [1, 10, 20, 40, 79, 80, 91, 92, 200] {
            for rows in [1, 3, 4, 5, 24] {
                for images in [0, 1, 30] {
                    let lines = frame(Some(&samples(images)), &samples(images), (columns, rows));
                    assert!(lines.len() <= rows.max(3), "{} lines", lines.len());
                    for row in &lines[1..] {
                        assert!(width(row) <= columns.max(IMAGE), "{row:?}");
                    }
                }
            }
        }
        let lines = frame(None, &samples(30), (100, 10));
        assert_eq!(lines.len(), 10);
        assert_eq!(lines[9][0].1, "and 24 more");
    }

    #[test]
    fn the_busiest_image_is_first() {
        let before = samples(3);
        let mut now = samples(3);
        now.at = before.at + Duration::from_secs(1);
        now.shown[2].counters = Some(counters(100, 1, 5));
        let lines = frame(Some(&before), &now, (120, 24));
        let texts: Vec<String> = lines[3..]
            .iter()
            .map(|line| line.iter().map(|part| part.1.as_str()).collect())
            .collect();
        assert!(
            texts[0].contains(" 98 ") && texts[0].contains(" 1.0 "),
            "{texts:?}"
        );
        assert_eq!(width(&lines[3]), 120);
    }
}
