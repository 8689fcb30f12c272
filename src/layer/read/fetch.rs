//! One fetch: asks the sources, in rounds, until its spans are on the disk or no reader waits any more.

use std::{ops::Range, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::mpsc;

use super::{
    arrivals::{Arrival, Arrivals},
    before::{SpanJoint, SpanWindow},
    in_flight::FetchClaim,
    place_span::{SpanRefused, decode},
    windows::CompactWindows,
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{ahead::on_the_way::OnTheWay, disk::Disk, sources::places::LayerSource},
    units::{DiskOffset, SpanId},
};

/// Rounds through all sources after which an answer that is not going to change is believed.
const ROUNDS: u32 = 3;

/// The pause after the first round; doubled after each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Brings the spans of a claim to the disk. Whatever happens, all its flights end. `on_the_way`: its bytes, unless it is one in the
/// background.
pub(crate) async fn fetch(disk: Arc<Disk>, claim: FetchClaim, on_the_way: Option<OnTheWay>) {
    let on_the_way = on_the_way.as_ref();
    let mut missing: Vec<SpanId> = claim.spans().map(SpanId).collect();
    let rounds = async {
        let mut pause = FIRST_PAUSE;
        for round in 1.. {
            let failures = fetch_round(&disk, &claim, on_the_way, &mut missing).await;
            if missing.is_empty() {
                return;
            }
            if disk.table_repair().lacks_table() {
                // what the spans are decoded with comes first; without it they are in vain
                let Err(error) = disk.bring_table().await else {
                    continue;
                };
                let error = Arc::new(error);
                disk.health().failed(&missing, &error);
                for span in missing.drain(..) {
                    claim.end(span, Err(Arc::clone(&error)));
                }
                return;
            }
            let error = Arc::new(summary(&disk, &missing, round, &failures));
            claim.effort().note(&error);
            if disk.health().failed(&missing, &error) {
                tracing::warn!("{}", error.report());
            }
            let hopeless = failures.iter().all(|failure| is_definite(failure.kind()));
            if hopeless && round >= ROUNDS {
                for span in missing.drain(..) {
                    claim.end(span, Err(Arc::clone(&error)));
                }
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    };
    tokio::select! {
        () = rounds => {}
        () = claim.effort().passed() => {
            // those who wait have given up, or do so now
            let error = claim.effort().last_error();
            let error = error.unwrap_or_else(|| silent(&disk, &claim.spans()));
            for span in claim.spans() {
                claim.end(SpanId(span), Err(Arc::clone(&error)));
            }
        }
    }
}

/// Asks each source once, one for what another could not give. Gives what failed.
async fn fetch_round(
    disk: &Arc<Disk>,
    claim: &FetchClaim,
    on_the_way: Option<&OnTheWay>,
    missing: &mut Vec<SpanId>,
) -> Vec<Error> {
    let mut failures = Vec::new();
    let mut places = disk.sources().in_order();
    loop {
        let mut outcome = RoundOutcome {
            disk,
            claim,
            on_the_way,
            places: &places,
            left: Vec::new(),
            failures: Vec::new(),
            wrong: Vec::new(),
        };
        for run in runs(missing) {
            match disk.reader().compact_windows() {
                None => fetch_apart(&mut outcome, run).await,
                Some(windows) => fetch_in_order(&mut outcome, windows, run).await,
            }
        }
        let RoundOutcome { left, wrong, .. } = outcome;
        failures.extend(outcome.failures);
        *missing = left;
        missing.sort_unstable();
        places.retain(|place| !wrong.iter().any(|wrong| Arc::ptr_eq(place, wrong)));
        if missing.is_empty() || wrong.is_empty() || places.is_empty() {
            return failures;
        }
    }
}

/// One ranged GET for adjacent spans. Each is decoded as soon as its bytes are here, while those of the next ones come. For spans that each
/// have a window of their own: several are decoded at a time.
async fn fetch_apart(outcome: &mut RoundOutcome<'_>, run: Range<u32>) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes = Arrivals::new(disk, outcome.on_the_way, outcome.places, run.clone()).await;
    let mut decoding = FuturesUnordered::new();
    let mut arriving = run.clone();
    loop {
        tokio::select! {
            part = bytes.next(arriving.start), if !arriving.is_empty() => {
                let Some(Arrival { bytes, place }) = part else {
                    outcome.absent(arriving.clone());
                    arriving = run.end..run.end;
                    continue;
                };
                let span = SpanId(arriving.start);
                decoding.push(async move {
                    let (span, placed) = decode(disk, effort, span, bytes, None).await;
                    (span, placed, place)
                });
                arriving.start += 1;
            },
            Some((span, placed, place)) = decoding.next(), if !decoding.is_empty() => {
                outcome.settle(span, placed.map(drop), place);
            }
            else => break,
        }
    }
    drop(decoding);
    outcome.failures.extend(bytes.failures());
}

/// As [`fetch_apart`], for spans that take their window from the span before: one is decoded after another. The window of the first, and
/// of one whose predecessor failed or was too short, is fetched.
async fn fetch_in_order(outcome: &mut RoundOutcome<'_>, windows: &CompactWindows, run: Range<u32>) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes = Arrivals::new(disk, outcome.on_the_way, outcome.places, run.clone()).await;
    let (arrived, mut parts) = mpsc::unbounded_channel();
    let arrive = async {
        for span in run.clone() {
            let part = bytes.next(span).await;
            let failed = part.is_none();
            // the other side ends after this one
            let _ = arrived.send((span, part));
            if failed {
                break;
            }
        }
        drop(arrived);
    };
    let decode_all = async {
        let mut before = seek(disk, windows, SpanId(run.start)).await;
        while let Some((number, part)) = parts.recv().await {
            let span = SpanId(number);
            let Some(part) = part else {
                if let (true, Ok(before)) = (number > run.start, &before) {
                    keep(windows, span, before);
                }
                return outcome.absent(number..run.end);
            };
            let known = match before {
                Ok(before) => before,
                Err(error) => {
                    outcome.failures.push(error);
                    outcome.absent(number..number + 1);
                    before = seek_next(disk, windows, number + 1, &run).await;
                    continue;
                }
            };
            let joint = SpanJoint {
                before: known,
                is_followed: number + 1 < run.end,
            };
            let (_, placed) = decode(disk, effort, span, part.bytes, Some(joint.clone())).await;
            before = match &placed {
                Ok(Some(tail)) => Ok(SpanWindow::True(tail.clone())),
                Ok(None) => seek_next(disk, windows, number + 1, &run).await,
                Err(_) => {
                    if number > run.start {
                        keep(windows, span, &joint.before);
                    }
                    seek_next(disk, windows, number + 1, &run).await
                }
            };
            outcome.settle(span, placed.map(drop), part.place);
        }
    };
    tokio::join!(arrive, decode_all);
    outcome.failures.extend(bytes.failures());
}

/// Keeps what the span before has left to a span that comes again later.
fn keep(windows: &CompactWindows, span: SpanId, before: &SpanWindow) {
    if let SpanWindow::True(window) = before
        && let Err(error) = windows.joints().leave_known(span, window)
    {
        // it is fetched then
        tracing::debug!("the window of span {span} is not kept: {error}");
    }
}

/// As [`seek`], for a span of the run; there is none at its end, and nobody asks.
async fn seek_next(
    disk: &Disk,
    windows: &CompactWindows,
    span: u32,
    run: &Range<u32>,
) -> Result<SpanWindow> {
    if span >= run.end {
        return Ok(SpanWindow::unknown());
    }
    seek(disk, windows, SpanId(span)).await
}

/// What stands before a span: known here, or fetched.
async fn seek(disk: &Disk, windows: &CompactWindows, span: SpanId) -> Result<SpanWindow> {
    if span == SpanId(0) {
        return Ok(SpanWindow::start());
    }
    let local = || format!("the window of span {span} cannot be read");
    if let Some(window) = windows.known(span).or_kind(Kind::Io, local)? {
        return Ok(SpanWindow::True(window));
    }
    let record = disk
        .layout()
        .spans()
        .read(span)
        .or_kind(Kind::Io, local)?
        .span;
    let Some(range) = record.window else {
        return Ok(SpanWindow::unknown()); // it refers to nothing
    };
    disk.count_fetch(|counters| counters.fetches += 1);
    let range = range.start as u64..range.end as u64;
    let stored = windows.fetch(disk.services(), range).await?;
    disk.count_fetch(|counters| counters.fetched_bytes += stored.len() as u64);
    SpanWindow::stated(stored)
}

/// What becomes of the spans that were asked for.
struct RoundOutcome<'a> {
    disk: &'a Arc<Disk>,
    claim: &'a FetchClaim,
    on_the_way: Option<&'a OnTheWay>,
    places: &'a [Arc<LayerSource>],
    /// Spans that are to be tried again.
    left: Vec<SpanId>,
    failures: Vec<Error>,
    /// Those who have sent what is not the blob's.
    wrong: Vec<Arc<LayerSource>>,
}

impl RoundOutcome<'_> {
    /// A span was placed, or refused. `place` has sent its bytes.
    fn settle(
        &mut self,
        span: SpanId,
        result: Result<(), SpanRefused>,
        place: Option<Arc<LayerSource>>,
    ) {
        match result {
            Ok(()) => {
                if let Some(place) = place {
                    place.is_right();
                }
                self.claim.end(span, Ok(()));
            }
            Err(SpanRefused::Mismatch(error)) => {
                self.failures.push(match &place {
                    Some(place) => {
                        place.failed(&error.to_shared());
                        error.context(format!("from {}", place.reference()))
                    }
                    None => error,
                });
                self.wrong.extend(place);
                self.left.push(span);
            }
            Err(SpanRefused::Lasting(error)) => {
                let error = Arc::new(error);
                if self.disk.health().failed(&[span], &error) {
                    tracing::warn!("{}", error.report());
                }
                self.claim.end(span, Err(error));
            }
        }
    }

    /// What these spans need did not come.
    fn absent(&mut self, spans: Range<u32>) {
        self.left.extend(spans.map(SpanId));
    }
}

/// Adjacent spans, as ranges.
fn runs(spans: &[SpanId]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for span in spans.iter().map(|span| span.get()) {
        match runs.last_mut() {
            Some(run) if run.end == span => run.end += 1,
            _ => runs.push(span..span + 1),
        }
    }
    runs
}

/// Whether the same question will get the same answer.
fn is_definite(kind: Kind) -> bool {
    !matches!(kind, Kind::Unavailable | Kind::Io | Kind::Kernel)
}

/// What was tried, in one error. Its kind is that of the last failure.
fn summary(disk: &Disk, missing: &[SpanId], round: u32, failures: &[Error]) -> Error {
    let tried: Vec<_> = failures.iter().map(Error::report).collect();
    let (first, last) = (missing[0], missing[missing.len() - 1]); // called with at least one
    let spans = if first == last {
        format!("span {first}")
    } else {
        format!("spans {first} to {last}")
    };
    let kind = failures.last().map_or(Kind::Unavailable, Error::kind);
    Error::new(
        kind,
        format!(
            "{spans} of layer {} could not be fetched (tried {round} times): {}",
            disk.layer().digest,
            tried.join("; ")
        ),
    )
}

/// The error of a fetch that has not heard from any source.
fn silent(disk: &Disk, spans: &Range<u32>) -> Arc<Error> {
    let error = Arc::new(Error::new(
        Kind::Unavailable,
        format!(
            "span {} of layer {} could not be fetched: no source has answered in the time that a read may wait",
            spans.start,
            disk.layer().digest
        ),
    ));
    disk.health().failed(&[SpanId(spans.start)], &error);
    error
}

/// The error of a reader whose time is over before its fetch has failed even once.
pub(super) fn unanswered(disk: &Disk, range: &Range<DiskOffset>) -> Arc<Error> {
    let missing = disk.reader().missing(range);
    silent(
        disk,
        &missing.map_or(0..0, |span| span.get()..span.get() + 1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_adjacent_spans() {
        let spans = [1, 2, 3, 7, 9, 10].map(SpanId);
        assert_eq!(runs(&spans), [1..4, 7..8, 9..11]);
        assert_eq!(runs(&[]), []);
    }
}
