//! One fetch: asks the sources, in rounds, until its spans are present or its deadline has passed.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::mpsc;

use super::{
    arrivals::{Arrival, Arrivals},
    compact_windows::CompactWindows,
    in_flight::FetchClaim,
    place_span::{SpanRefused, decode},
    span_window::{SpanJoint, SpanWindow},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{
        ahead::bytes_in_flight::BytesInFlight,
        disk::{Disk, fetch_log::FetchReason},
        sources::layer_sources::LayerSource,
    },
    metrics::{METRICS, Outcome},
    units::{DiskOffset, SpanId},
};

/// Rounds through all sources after which the fetch ends if all errors are definite.
const ROUNDS: u32 = 3;

/// The pause after the first round; doubled after each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Makes the spans of a claim present. In all cases the fetches of all its spans end. `in_flight_bytes`: the bytes of this fetch; `None`
/// for a fetch in the background.
pub(crate) async fn fetch(
    disk: Arc<Disk>,
    claim: FetchClaim,
    in_flight_bytes: Option<BytesInFlight>,
) {
    let in_flight_bytes = in_flight_bytes.as_ref();
    let began = Instant::now();
    let reason = match (in_flight_bytes, claim.effort().is_awaited()) {
        (None, _) => FetchReason::Background,
        (Some(_), true) => FetchReason::Read,
        (Some(_), false) => FetchReason::Ahead,
    };
    let mut missing: Vec<SpanId> = claim.spans().map(SpanId).collect();
    let rounds = async {
        let mut pause = FIRST_PAUSE;
        for round in 1.. {
            let failures = fetch_round(&disk, &claim, in_flight_bytes, &mut missing).await;
            for failure in &failures {
                METRICS.fetch_failures.count(failure.kind() as usize);
            }
            if missing.is_empty() {
                return;
            }
            if disk.table_repair().lacks_table() {
                // the table is needed to decode the spans: it is fetched first
                let Err(error) = disk.ensure_table().await else {
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
            claim.effort().record_error(&error);
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
        () = claim.effort().deadline_passed() => {
            // the waiters have given up, or do so now
            let error = claim.effort().last_error();
            let error = error.unwrap_or_else(|| no_answer(&disk, &claim.spans()));
            for span in claim.spans() {
                claim.end(SpanId(span), Err(Arc::clone(&error)));
            }
        }
    }
    let bytes = disk.layout().compressed_length(&claim.spans());
    let is_ok = claim
        .spans()
        .all(|span| disk.reader().is_readable(SpanId(span)));
    if reason == FetchReason::Background {
        let outcome = match is_ok {
            true => Outcome::Success,
            false => Outcome::Failure,
        };
        let spans = claim.spans().len() as u64;
        METRICS.background_spans.add(outcome as usize, spans);
    }
    disk.log()
        .fetched(began, claim.spans(), bytes, reason, is_ok);
}

/// Asks each source once; spans that a source could not give are asked from the others. Returns the errors.
async fn fetch_round(
    disk: &Arc<Disk>,
    claim: &FetchClaim,
    in_flight_bytes: Option<&BytesInFlight>,
    missing: &mut Vec<SpanId>,
) -> Vec<Error> {
    let mut failures = Vec::new();
    let mut sources = disk.sources().in_order().await;
    loop {
        let mut outcome = RoundOutcome {
            disk,
            claim,
            in_flight_bytes,
            sources: &sources,
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
        sources.retain(|source| !wrong.iter().any(|wrong| Arc::ptr_eq(source, wrong)));
        if missing.is_empty() || wrong.is_empty() || sources.is_empty() {
            return failures;
        }
    }
}

/// One ranged GET for adjacent spans that each have a stored window. Each span is decoded as soon as its bytes have arrived, while the
/// bytes of the next spans arrive. Several spans are decoded at the same time.
async fn fetch_apart(outcome: &mut RoundOutcome<'_>, run: Range<u32>) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes =
        Arrivals::new(disk, outcome.in_flight_bytes, outcome.sources, run.clone()).await;
    let mut decoding = FuturesUnordered::new();
    let mut arriving = run.clone();
    loop {
        tokio::select! {
            part = bytes.next(arriving.start), if !arriving.is_empty() => {
                let Some(Arrival { bytes, source }) = part else {
                    outcome.not_fetched(arriving.clone());
                    arriving = run.end..run.end;
                    continue;
                };
                let span = SpanId(arriving.start);
                decoding.push(async move {
                    let (span, placed) = decode(disk, effort, span, bytes, None).await;
                    (span, placed, source)
                });
                arriving.start += 1;
            },
            Some((span, placed, source)) = decoding.next(), if !decoding.is_empty() => {
                outcome.settle(span, placed.map(drop), source);
            }
            else => break,
        }
    }
    drop(decoding);
    outcome.failures.extend(bytes.failures());
}

/// As [`fetch_apart`], for spans that take their window from the previous span: they are decoded one after another. The window of the first
/// span is fetched, and that of a span whose predecessor failed or was too short.
async fn fetch_in_order(outcome: &mut RoundOutcome<'_>, windows: &CompactWindows, run: Range<u32>) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes =
        Arrivals::new(disk, outcome.in_flight_bytes, outcome.sources, run.clone()).await;
    let (arrived, mut parts) = mpsc::unbounded_channel();
    let arrive = async {
        for span in run.clone() {
            let part = bytes.next(span).await;
            let failed = part.is_none();
            // the receiver ends after this sender
            let _ = arrived.send((span, part));
            if failed {
                break;
            }
        }
        drop(arrived);
    };
    let decode_all = async {
        let mut before = find_window(disk, windows, SpanId(run.start)).await;
        while let Some((number, part)) = parts.recv().await {
            let span = SpanId(number);
            let Some(part) = part else {
                if let (true, Ok(before)) = (number > run.start, &before) {
                    store_window(windows, span, before);
                }
                return outcome.not_fetched(number..run.end);
            };
            let window = match before {
                Ok(before) => before,
                Err(error) => {
                    outcome.failures.push(error);
                    outcome.not_fetched(number..number + 1);
                    before = next_window(disk, windows, number + 1, &run).await;
                    continue;
                }
            };
            let joint = SpanJoint {
                before: window,
                is_followed: number + 1 < run.end,
            };
            let (_, placed) = decode(disk, effort, span, part.bytes, Some(joint.clone())).await;
            before = match &placed {
                Ok(Some(tail)) => Ok(SpanWindow::Verified(tail.clone())),
                Ok(None) => next_window(disk, windows, number + 1, &run).await,
                Err(_) => {
                    if number > run.start {
                        store_window(windows, span, &joint.before);
                    }
                    next_window(disk, windows, number + 1, &run).await
                }
            };
            outcome.settle(span, placed.map(drop), part.source);
        }
    };
    tokio::join!(arrive, decode_all);
    outcome.failures.extend(bytes.failures());
}

/// Stores the window that the previous span has left, for a span that is fetched later.
fn store_window(windows: &CompactWindows, span: SpanId, before: &SpanWindow) {
    if let SpanWindow::Verified(window) = before
        && let Err(error) = windows.joints().store_verified(span, window)
    {
        // then the window is fetched
        tracing::debug!(
            "the window of span {span} cannot be stored, and is fetched when it is needed: {error}"
        );
    }
}

/// As [`find_window`], for a span of the run. At the end of the run no window is needed.
async fn next_window(
    disk: &Disk,
    windows: &CompactWindows,
    span: u32,
    run: &Range<u32>,
) -> Result<SpanWindow> {
    if span >= run.end {
        return Ok(SpanWindow::unknown());
    }
    find_window(disk, windows, SpanId(span)).await
}

/// The window of a span: stored here, or fetched.
async fn find_window(disk: &Disk, windows: &CompactWindows, span: SpanId) -> Result<SpanWindow> {
    if span == SpanId(0) {
        return Ok(SpanWindow::start());
    }
    let local = || format!("the window of span {span} cannot be read");
    if let Some(window) = windows.verified(span).or_kind(Kind::Io, local)? {
        return Ok(SpanWindow::Verified(window));
    }
    let record = disk
        .layout()
        .spans()
        .read(span)
        .or_kind(Kind::Io, local)?
        .span;
    let Some(range) = record.window else {
        return Ok(SpanWindow::unknown()); // the span refers to no bytes before it
    };
    let range = range.start as u64..range.end as u64;
    let stored = windows.fetch(disk.services(), range).await?;
    disk.activity().fetched(1, stored.len() as u64);
    SpanWindow::stated(stored)
}

/// The results for the spans of one round.
struct RoundOutcome<'a> {
    disk: &'a Arc<Disk>,
    claim: &'a FetchClaim,
    in_flight_bytes: Option<&'a BytesInFlight>,
    sources: &'a [Arc<LayerSource>],
    /// Spans that are fetched again in the next round.
    left: Vec<SpanId>,
    failures: Vec<Error>,
    /// Sources that have sent bytes that are not those of the blob.
    wrong: Vec<Arc<LayerSource>>,
}

impl RoundOutcome<'_> {
    /// A span was placed, or refused. `source` has sent its bytes.
    fn settle(
        &mut self,
        span: SpanId,
        result: Result<(), SpanRefused>,
        source: Option<Arc<LayerSource>>,
    ) {
        match result {
            Ok(()) => {
                if let Some(source) = source {
                    source.sent_right_bytes();
                }
                self.claim.end(span, Ok(()));
            }
            Err(SpanRefused::Mismatch(error)) => {
                self.failures.push(match &source {
                    Some(source) => {
                        source.failed(&error.to_shared());
                        error.context(format!("from {}", source.name()))
                    }
                    None => error,
                });
                self.wrong.extend(source);
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

    /// No source has sent the bytes of these spans.
    fn not_fetched(&mut self, spans: Range<u32>) {
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

/// Whether the same request gets the same error again.
fn is_definite(kind: Kind) -> bool {
    !matches!(kind, Kind::Unavailable | Kind::Io | Kind::Kernel)
}

/// All failures in one error. Its kind is that of the last failure.
fn summary(disk: &Disk, missing: &[SpanId], round: u32, failures: &[Error]) -> Error {
    let reasons: Vec<_> = failures.iter().map(Error::report).collect();
    let (first, last) = (missing[0], missing[missing.len() - 1]); // at least one span is missing
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
            reasons.join("; ")
        ),
    )
}

/// The error of a fetch without an answer from any source.
fn no_answer(disk: &Disk, spans: &Range<u32>) -> Arc<Error> {
    let error = Arc::new(Error::new(
        Kind::Unavailable,
        format!(
            "span {} of layer {} could not be fetched: no source has answered within the time limit of a read; check the network and the registry",
            spans.start,
            disk.layer().digest
        ),
    ));
    disk.health().failed(&[SpanId(spans.start)], &error);
    error
}

/// The error of a reader whose deadline passes before its fetch has failed once.
pub(super) fn reader_timed_out(disk: &Disk, range: &Range<DiskOffset>) -> Arc<Error> {
    let missing = disk.reader().missing(range);
    no_answer(
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
