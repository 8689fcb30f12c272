//! Prefetch artifacts: the spans of a layer that the start of a container needs.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;

use super::json::{self, Node, TypeError, names};
use crate::{oci::manifest::MAX_MANIFEST_BYTES, units::SpanId};

/// The only version there is.
const VERSION: &str = "1.0";

/// Spans of one entry were first used within so many uses of each other.
const NEAR: i64 = 16;

/// Some spans of a layer, as an artifact states them: AWS's tool accepts any order and any sign here. [`Prefetch::runs`] is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefetchSpan {
    /// The first.
    pub start_span: i32,
    /// The last.
    pub end_span: i32,
    /// Order of use; AWS's tool ignores it.
    #[serde(skip_serializing_if = "is_zero")]
    pub priority: i64,
}

fn is_zero(priority: &i64) -> bool {
    *priority == 0
}

/// A prefetch artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// Its spans, unchecked; at least one.
    pub spans: Vec<PrefetchSpan>,
}

/// Why a document is not a prefetch artifact.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than is read.
    #[error("{0} bytes long, over the limit of {MAX_MANIFEST_BYTES}")]
    TooLong(usize),
    /// Not JSON.
    #[error("not JSON")]
    NotJson(#[from] serde_json::Error),
    /// A field of the wrong type.
    #[error("malformed")]
    Type(#[from] TypeError),
    /// Another version.
    #[error("version {0:?} is not supported, only {VERSION:?}")]
    UnknownVersion(String),
    /// A span that no zTOC can have.
    #[error("range {index} has span {span}, over the limit of a layer")]
    Span {
        /// Its place in the list.
        index: usize,
        /// The number.
        span: i64,
    },
    /// No span at all.
    #[error("it has no spans")]
    Empty,
}

impl Prefetch {
    /// Parses an artifact. Accepts what AWS's tool accepts.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(Error::TooLong(bytes.len()));
        }
        let document = json::parse(bytes)?;
        let mut version = String::new();
        let mut spans = Vec::new();
        for (key, value) in document.fields("the document")? {
            if names(key, "version") {
                value.read_text("version", &mut version)?;
            } else if names(key, "prefetch_spans") {
                spans = value
                    .elements("prefetch_spans")?
                    .iter()
                    .enumerate()
                    .map(|(index, node)| PrefetchSpan::read(node, index))
                    .collect::<Result<_, _>>()?;
            }
        }
        if version != VERSION {
            return Err(Error::UnknownVersion(version.chars().take(255).collect()));
        }
        if spans.is_empty() {
            return Err(Error::Empty);
        }
        Ok(Self { spans })
    }

    /// The artifact of these runs, as AWS's tool writes them: sorted, adjacent and overlapping ones merged. `None` without any.
    pub fn of_runs(runs: impl IntoIterator<Item = Range<SpanId>>) -> Option<Self> {
        let spans = merged(runs)
            .into_iter()
            .map(|run| {
                Some(PrefetchSpan {
                    start_span: i32::try_from(run.start.get()).ok()?,
                    end_span: i32::try_from(run.end.get().checked_sub(1)?).ok()?,
                    priority: 0,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        (!spans.is_empty()).then_some(Self { spans })
    }

    /// The artifact of spans in the order of their first use, which goes into `priority`: sorted by number, as AWS's tool sorts; spans
    /// that follow each other in both are one entry. `None` without any.
    pub fn of_uses(uses: impl IntoIterator<Item = (i64, SpanId)>) -> Option<Self> {
        let mut first: BTreeMap<SpanId, i64> = BTreeMap::new();
        for (order, span) in uses {
            let at = first.entry(span).or_insert(order);
            *at = order.min(*at);
        }
        let mut spans: Vec<PrefetchSpan> = Vec::new();
        let mut last_order = None;
        for (span, order) in first {
            let number = i32::try_from(span.get()).ok()?;
            match spans.last_mut() {
                Some(last)
                    if last.end_span.checked_add(1) == Some(number)
                        && last_order.is_some_and(|before: i64| before <= order)
                        && order.saturating_sub(last.priority) <= NEAR =>
                {
                    last.end_span = number;
                }
                _ => spans.push(PrefetchSpan {
                    start_span: number,
                    end_span: number,
                    priority: order,
                }),
            }
            last_order = Some(order);
        }
        (!spans.is_empty()).then_some(Self { spans })
    }

    /// The spans of these that a layer with `count` spans has, with their priorities: the lowest priority first, else in the given order,
    /// and none twice. Spans out of range, or ranges that end before they start, are ignored.
    pub fn in_order(&self, count: u32) -> Vec<(i64, Range<SpanId>)> {
        let mut runs: Vec<(i64, Range<SpanId>)> = self
            .spans
            .iter()
            .filter_map(|span| Some((span.priority, span.clipped(count)?)))
            .filter(|(_, run)| run.start < run.end)
            .collect();
        runs.sort_by_key(|(priority, _)| *priority);
        let mut taken = BTreeMap::new();
        let mut new = Vec::new();
        for (priority, run) in runs {
            let parts = take_new(&mut taken, run).into_iter();
            new.extend(parts.map(|part| (priority, part)));
        }
        new
    }

    /// The spans of these that a layer with `count` spans has: sorted, merged, none twice. Spans out of range, or ranges that end before
    /// they start, are ignored.
    pub fn runs(&self, count: u32) -> Vec<Range<SpanId>> {
        merged(self.spans.iter().filter_map(|span| span.clipped(count)))
    }

    /// The artifact's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        #[derive(Serialize)]
        struct Document<'a> {
            version: &'static str,
            prefetch_spans: &'a [PrefetchSpan],
        }
        Ok(json::to_vec(&Document {
            version: VERSION,
            prefetch_spans: &self.spans,
        })?)
    }
}

/// The parts of a run that are not taken yet; they are marked as taken. `taken` maps the start of each run to its end.
fn take_new(taken: &mut BTreeMap<SpanId, SpanId>, run: Range<SpanId>) -> Vec<Range<SpanId>> {
    let touching: Vec<(SpanId, SpanId)> = taken
        .range(..=run.end)
        .rev()
        .take_while(|(_, end)| **end >= run.start)
        .map(|(start, end)| (*start, *end))
        .collect();
    let (mut parts, mut at) = (Vec::new(), run.start);
    let mut merged = run.clone();
    for (start, end) in touching.into_iter().rev() {
        if at < start {
            parts.push(at..start);
        }
        at = at.max(end);
        merged = merged.start.min(start)..merged.end.max(end);
        taken.remove(&start);
    }
    if at < run.end {
        parts.push(at..run.end);
    }
    taken.insert(merged.start, merged.end);
    parts
}

impl PrefetchSpan {
    /// The spans of the range that a layer with `count` spans has; may be empty or reversed.
    fn clipped(&self, count: u32) -> Option<Range<SpanId>> {
        let start = u32::try_from(self.start_span.max(0)).ok()?;
        let end = u32::try_from(self.end_span)
            .ok()?
            .saturating_add(1)
            .min(count);
        Some(SpanId(start)..SpanId(end))
    }

    fn read(node: &Node, index: usize) -> Result<Self, Error> {
        let mut span = Self::default();
        for (key, value) in node.fields("prefetch_spans")? {
            if names(key, "start_span") {
                read_span("start_span", value, index, &mut span.start_span)?;
            } else if names(key, "end_span") {
                read_span("end_span", value, index, &mut span.end_span)?;
            } else if names(key, "priority") {
                value.read_integer("priority", &mut span.priority)?;
            }
        }
        Ok(span)
    }
}

/// A span's number has 32 bits in Go's structure.
fn read_span(field: &'static str, value: &Node, index: usize, into: &mut i32) -> Result<(), Error> {
    let mut span = i64::from(*into);
    value.read_integer(field, &mut span)?;
    *into = i32::try_from(span).map_err(|_| Error::Span { index, span })?;
    Ok(())
}

fn merged(runs: impl IntoIterator<Item = Range<SpanId>>) -> Vec<Range<SpanId>> {
    let mut runs: Vec<_> = runs.into_iter().filter(|run| run.start < run.end).collect();
    runs.sort_by_key(|run| run.start);
    let mut merged: Vec<Range<SpanId>> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(text: &str, count: u32) -> Vec<(u32, u32)> {
        Prefetch::parse(text.as_bytes())
            .unwrap()
            .runs(count)
            .iter()
            .map(|run| (run.start.get(), run.end.get()))
            .collect()
    }

    #[test]
    fn runs_are_sorted_merged_and_within_the_layer() {
        let list = |spans: &str| format!(r#"{{"version":"1.0","prefetch_spans":[{spans}]}}"#);
        let span = |start: i64, end: i64| format!(r#"{{"start_span":{start},"end_span":{end}}}"#);
        for (spans, count, expected) in [
            (vec![(7, 9), (0, 3), (2, 8)], 100, vec![(0, 10)]),
            (vec![(4, 4), (0, 3), (6, 6)], 100, vec![(0, 5), (6, 7)]),
            (vec![(5, 2)], 100, vec![]),
            (vec![(-3, 2)], 100, vec![(0, 3)]),
            (vec![(-3, -1)], 100, vec![]),
            (vec![(0, 2_147_483_647)], 10, vec![(0, 10)]),
            (vec![(10, 20)], 10, vec![]),
            (vec![(0, 0)], 0, vec![]),
        ] {
            let text = list(
                &spans
                    .iter()
                    .map(|(a, b)| span(*a, *b))
                    .collect::<Vec<_>>()
                    .join(","),
            );
            assert_eq!(runs(&text, count), expected, "{text}");
        }
    }

    #[test]
    fn no_span_is_listed_twice_in_order() {
        let span = |start: i32, end: i32, priority: i64| PrefetchSpan {
            start_span: start,
            end_span: end,
            priority,
        };
        let in_order = |spans: &[PrefetchSpan], count| -> Vec<(i64, u32, u32)> {
            let spans = spans.to_vec();
            let runs = Prefetch { spans }.in_order(count).into_iter();
            runs.map(|(order, run)| (order, run.start.get(), run.end.get()))
                .collect()
        };
        let spans = [
            span(10, 19, 3),
            span(0, 99, 7),
            span(15, 24, 4),
            span(30, 30, 1),
            span(25, 29, 5),
            span(10, 12, 8),
        ];
        assert_eq!(
            in_order(&spans, 50),
            [
                (1, 30, 31),
                (3, 10, 20),
                (4, 20, 25),
                (5, 25, 30),
                (7, 0, 10),
                (7, 31, 50)
            ]
        );
        // as many as fit into a document, each of them all: soon done
        let many = vec![span(0, i32::MAX, 0); 200_000];
        assert_eq!(in_order(&many, u32::MAX), [(0, 0, 1 << 31)]);
        let apart: Vec<_> = (0..100_000)
            .map(|at| span(at * 2, at * 2, -i64::from(at)))
            .collect();
        assert_eq!(in_order(&[apart, many].concat(), u32::MAX).len(), 200_000);
    }

    #[test]
    fn the_order_of_use_is_kept() {
        let text = r#"{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":3},{"start_span":9,"end_span":9,"priority":1}]}"#;
        let read = Prefetch::parse(text.as_bytes()).unwrap();
        assert_eq!(read.spans[1].priority, 1);
        assert_eq!(read.to_bytes().unwrap(), text.as_bytes());
    }

    #[test]
    fn uses_make_an_artifact_with_their_order() {
        let uses = [(1, 7), (2, 8), (3, 2), (4, 9), (5, 7), (40, 10), (41, 3)];
        let made = Prefetch::of_uses(uses.map(|(order, span)| (order, SpanId(span)))).unwrap();
        assert_eq!(
            made.to_bytes().unwrap(),
            br#"{"version":"1.0","prefetch_spans":[{"start_span":2,"end_span":2,"priority":3},{"start_span":3,"end_span":3,"priority":41},{"start_span":7,"end_span":9,"priority":1},{"start_span":10,"end_span":10,"priority":40}]}"#
        );
        let order: Vec<_> = made
            .in_order(10)
            .into_iter()
            .map(|(priority, run)| (priority, run.start.get(), run.end.get()))
            .collect();
        assert_eq!(order, [(1, 7, 10), (3, 2, 3), (41, 3, 4)]);
        assert!(Prefetch::of_uses([]).is_none());
    }

    #[test]
    fn runs_make_an_artifact() {
        let made = Prefetch::of_runs([
            SpanId(3)..SpanId(5),
            SpanId(0)..SpanId(2),
            SpanId(2)..SpanId(3),
        ])
        .unwrap();
        assert_eq!(
            made.to_bytes().unwrap(),
            br#"{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":4}]}"#
        );
        assert!(Prefetch::of_runs([]).is_none());
        assert!(Prefetch::of_runs([SpanId(4)..SpanId(4)]).is_none());
    }

    fn of_uses(uses: &[(i64, u32)]) -> Vec<(i64, i32, i32)> {
        let uses = uses.iter().map(|(order, span)| (*order, SpanId(*span)));
        let made = Prefetch::of_uses(uses).unwrap();
        let spans = made.spans.iter();
        spans
            .map(|span| (span.priority, span.start_span, span.end_span))
            .collect()
    }

    #[test]
    fn the_first_use_counts_in_whatever_order_uses_come() {
        assert_eq!(of_uses(&[(9, 5), (2, 5), (4, 5)]), [(2, 5, 5)]);
        assert_eq!(of_uses(&[(2, 5), (9, 5)]), [(2, 5, 5)]);
    }

    #[test]
    fn spans_are_one_entry_only_in_their_order_and_near_each_other() {
        // used one after the other, or by the same read
        assert_eq!(of_uses(&[(1, 5), (2, 6)]), [(1, 5, 6)]);
        assert_eq!(of_uses(&[(1, 5), (1, 6)]), [(1, 5, 6)]);
        // the second was used first
        assert_eq!(of_uses(&[(2, 5), (1, 6)]), [(2, 5, 5), (1, 6, 6)]);
        // the third before the second
        let uses = [(1, 5), (3, 6), (2, 7)];
        assert_eq!(of_uses(&uses), [(1, 5, 6), (2, 7, 7)]);
        // not adjacent
        assert_eq!(of_uses(&[(1, 5), (2, 7)]), [(1, 5, 5), (2, 7, 7)]);
        // near the entry's first, and not its last
        assert_eq!(of_uses(&[(1, 5), (1 + NEAR, 6)]), [(1, 5, 6)]);
        let far = 2 + NEAR;
        assert_eq!(of_uses(&[(1, 5), (far, 6)]), [(1, 5, 5), (far, 6, 6)]);
        let uses = [(1, 5), (10, 6), (far, 7)];
        assert_eq!(of_uses(&uses), [(1, 5, 6), (far, 7, 7)]);
    }
}
