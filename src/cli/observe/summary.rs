//! A report of fetches, summed up by file.

use std::{collections::HashMap, ops::Add as _};

use crate::{
    engine::{FetchReport, UnreadFile},
    layer::{DiskCounters, FetchReason},
    oci::Digest,
};

/// Bars of one file, at most.
const BARS: usize = 100;
/// Files that no start has read, at most.
const UNREAD: usize = 100;

/// What a report says of an image as a whole, and of each file that was waited for.
pub(super) struct Summary<'a> {
    /// Compressed bytes of all layers.
    pub(super) size: u64,
    pub(super) counters: DiskCounters,
    pub(super) spans: u64,
    pub(super) present: u64,
    /// Time in which at least one read has waited.
    pub(super) waited_ms: f64,
    /// End of the last wait or fetch.
    pub(super) end_ms: f64,
    pub(super) dropped: u64,
    /// Layers whose files are not known, and why.
    pub(super) unknown: Vec<(String, &'a str)>,
    /// In the order of their first wait.
    pub(super) files: Vec<FileSummary<'a>>,
    pub(super) unread_files: u64,
    pub(super) unread_bytes: u64,
    pub(super) all_files: u64,
    pub(super) all_bytes: u64,
    /// The largest files that no start has read.
    pub(super) largest: Vec<(&'a Digest, &'a UnreadFile)>,
}

/// A file that reads have waited for.
pub(super) struct FileSummary<'a> {
    pub(super) layer: &'a Digest,
    /// `None`: the files that are not known.
    pub(super) path: Option<&'a str>,
    pub(super) first_ms: f64,
    pub(super) waits: u64,
    /// Sum over all waits.
    pub(super) waited_ms: f64,
    /// Compressed bytes of the fetches that its reads have caused.
    pub(super) fetched_bytes: u64,
    pub(super) fetches: u64,
    /// Kind, beginning and duration.
    pub(super) bars: Vec<(&'static str, f64, f64)>,
}

impl<'a> Summary<'a> {
    pub(super) fn of(report: &'a FetchReport) -> Self {
        let layers = &report.layers;
        let sum = |of: fn(&crate::engine::LayerFetches) -> u64| layers.iter().map(of).sum::<u64>();
        let waits = layers.iter().flat_map(|layer| &layer.waits);
        let mut waits: Vec<(f64, f64)> = waits
            .map(|wait| (wait.at_ms as f64, wait.at_ms as f64 + wait.took_ms))
            .collect();
        let fetch_ends = layers.iter().flat_map(|layer| &layer.fetches);
        let fetch_ends = fetch_ends.map(|fetch| fetch.at_ms as f64 + fetch.took_ms);
        let end_ms = waits.iter().map(|wait| wait.1).chain(fetch_ends);
        let end_ms = end_ms.fold(0.0, f64::max);
        let mut largest: Vec<_> = layers
            .iter()
            .flat_map(|layer| {
                layer
                    .unread
                    .largest
                    .iter()
                    .map(|file| (&layer.digest, file))
            })
            .collect();
        largest.sort_by_key(|(_, file)| std::cmp::Reverse(file.bytes));
        largest.truncate(UNREAD);
        Self {
            size: sum(|layer| layer.size),
            counters: layers
                .iter()
                .map(|layer| layer.counters)
                .fold(DiskCounters::default(), DiskCounters::add),
            spans: sum(|layer| layer.spans.into()),
            present: sum(|layer| {
                let runs = layer.present.iter();
                runs.map(|run| u64::from(run.1.saturating_sub(run.0))).sum()
            }),
            waited_ms: union_ms(&mut waits),
            end_ms,
            dropped: sum(|layer| layer.dropped),
            unknown: layers
                .iter()
                .filter_map(|layer| {
                    Some((layer.digest.to_string(), layer.unknown_files.as_deref()?))
                })
                .collect(),
            files: files(report),
            unread_files: sum(|layer| layer.unread.files),
            unread_bytes: sum(|layer| layer.unread.bytes),
            all_files: sum(|layer| layer.unread.all_files),
            all_bytes: sum(|layer| layer.unread.all_bytes),
            largest,
        }
    }
}

fn files(report: &FetchReport) -> Vec<FileSummary<'_>> {
    let mut files: HashMap<(&Digest, Option<&str>), FileSummary<'_>> = HashMap::new();
    for layer in &report.layers {
        let digest = &layer.digest;
        for wait in &layer.waits {
            let path = wait.path.as_deref();
            let file = files.entry((digest, path)).or_insert_with(|| FileSummary {
                layer: digest,
                path,
                first_ms: wait.at_ms as f64,
                waits: 0,
                waited_ms: 0.0,
                fetched_bytes: 0,
                fetches: 0,
                bars: Vec::new(),
            });
            file.first_ms = file.first_ms.min(wait.at_ms as f64);
            file.waits += 1;
            file.waited_ms += wait.took_ms;
            file.bar("wait", wait.at_ms, wait.took_ms);
        }
        for fetch in &layer.fetches {
            // those ahead of reads are shown with the first file of their spans
            let (path, class) = match fetch.reason {
                FetchReason::Read => (fetch.cause.as_deref(), "read"),
                FetchReason::Ahead => (fetch.files.first().map(String::as_str), "ahead"),
                FetchReason::Background => (fetch.files.first().map(String::as_str), "background"),
            };
            let Some(file) = files.get_mut(&(digest, path)) else {
                continue;
            };
            file.bar(class, fetch.at_ms, fetch.took_ms);
            if fetch.reason == FetchReason::Read {
                file.fetches += 1;
                file.fetched_bytes += fetch.bytes;
            }
        }
    }
    let mut files: Vec<_> = files.into_values().collect();
    files.sort_by(|a, b| {
        let order = a.first_ms.partial_cmp(&b.first_ms);
        order
            .unwrap_or(std::cmp::Ordering::Equal)
            .then_with(|| (a.layer, a.path).cmp(&(b.layer, b.path)))
    });
    files
}

impl FileSummary<'_> {
    fn bar(&mut self, class: &'static str, at_ms: u64, took_ms: f64) {
        if self.bars.len() < BARS {
            self.bars.push((class, at_ms as f64, took_ms));
        }
    }
}

/// The length of the union of intervals.
fn union_ms(intervals: &mut [(f64, f64)]) -> f64 {
    intervals.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(std::cmp::Ordering::Equal));
    let (mut sum, mut covered) = (0.0, 0.0_f64);
    for (start, end) in intervals {
        sum += (*end - start.max(covered)).max(0.0);
        covered = covered.max(*end);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_at_the_same_time_count_once() {
        assert_eq!(
            union_ms(&mut [(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.0, 2.0)]),
            5.0
        );
        assert_eq!(union_ms(&mut []), 0.0);
    }
}
