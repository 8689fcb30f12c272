//! A fetch: from the sources, in order and again, until its spans are on the disk or nobody waits any more.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream::BoxStream, stream::FuturesUnordered};
use tokio::sync::{SemaphorePermit, mpsc};

use super::{
    Disk,
    flight::{Claim, Effort},
    place::{Joint, Refused, place},
    upcoming::OnTheWay,
    windows::{Before, Windows},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    source::Source,
    units::{DiskOffset, SpanId},
};

/// Rounds through all sources after which an answer that is not going to change is believed.
const ROUNDS: u32 = 3;

/// The pause after the first round; doubled after each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// How long one source is tried without any progress, before the next one, and before the disk says that it is degraded.
const PATIENCE: Duration = Duration::from_secs(2);

/// Brings the spans of a claim to the disk. Whatever happens, all its flights end. `on_the_way`: its bytes, unless it is one in the
/// background.
pub(super) async fn fetch(disk: Arc<Disk>, claim: Claim, on_the_way: Option<OnTheWay>) {
    let on_the_way = on_the_way.as_ref();
    let mut missing: Vec<SpanId> = claim.spans().map(SpanId).collect();
    let rounds = async {
        let mut pause = FIRST_PAUSE;
        for round in 1.. {
            let failures = fetch_round(&disk, &claim, on_the_way, &mut missing).await;
            if missing.is_empty() {
                return;
            }
            let error = Arc::new(summary(&disk, &missing, round, &failures));
            claim.effort().note(&error);
            disk.health().failed(&missing, &error);
            if round == 1 {
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

/// Asks each source once, the next one for what is then still missing. Gives what failed.
async fn fetch_round(
    disk: &Arc<Disk>,
    claim: &Claim,
    on_the_way: Option<&OnTheWay>,
    missing: &mut Vec<SpanId>,
) -> Vec<Error> {
    let mut failures = Vec::new();
    for index in 0..disk.sources().len().max(1) {
        let source = match disk.sources().get(index).await {
            Ok(source) => source,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        let from = |error: Error| error.context(format!("from {}", source.reference()));
        let mut left = Vec::new();
        for run in runs(missing) {
            let outcome = Outcome {
                disk,
                claim,
                on_the_way,
                left: &mut left,
                failures: Vec::new(),
            };
            let results = fetch_run(outcome, &source, run).await;
            failures.extend(results.into_iter().map(from));
        }
        *missing = left;
        if missing.is_empty() {
            break;
        }
    }
    failures
}

/// One ranged GET for adjacent spans. Each is decoded as soon as its bytes are here, while those of the next ones come. Spans that are
/// to be tried again are `left`; gives what failed.
async fn fetch_run(mut outcome: Outcome<'_>, source: &Source, run: Range<u32>) -> Vec<Error> {
    match outcome.disk.windows() {
        None => fetch_apart(&mut outcome, source, run).await,
        Some(windows) => fetch_in_order(&mut outcome, windows, source, run).await,
    }
    let Outcome { left, failures, .. } = outcome;
    left.sort_unstable();
    failures
}

/// As [`fetch_run`], for spans that each have a window of their own: several are decoded at a time.
async fn fetch_apart(outcome: &mut Outcome<'_>, source: &Source, run: Range<u32>) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes = Arrivals::new(disk, outcome.on_the_way, source, run.clone()).await;
    let mut decoding = FuturesUnordered::new();
    let mut arriving = run.clone();
    loop {
        tokio::select! {
            part = bytes.next(arriving.start), if !arriving.is_empty() => match part {
                Ok(part) => {
                    decoding.push(decode(disk, effort, SpanId(arriving.start), part, None));
                    arriving.start += 1;
                }
                Err(error) => {
                    outcome.failed(arriving, error);
                    arriving = run.end..run.end;
                }
            },
            Some((span, result)) = decoding.next(), if !decoding.is_empty() => {
                outcome.settle(span, result.map(drop));
            }
            else => break,
        }
    }
}

/// As [`fetch_run`], for spans that take their window from the span before: one is decoded after another. The window of the first, and
/// of one whose predecessor failed or was too short, is fetched.
async fn fetch_in_order(
    outcome: &mut Outcome<'_>,
    windows: &Windows,
    source: &Source,
    run: Range<u32>,
) {
    let (disk, effort) = (outcome.disk, outcome.claim.effort());
    let mut bytes = Arrivals::new(disk, outcome.on_the_way, source, run.clone()).await;
    let (arrived, mut parts) = mpsc::unbounded_channel();
    let arrive = async {
        for span in run.clone() {
            let part = bytes.next(span).await;
            let failed = part.is_err();
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
            let part = match part {
                Ok(part) => part,
                Err(error) => {
                    if let (true, Ok(before)) = (number > run.start, &before) {
                        keep(windows, span, before);
                    }
                    return outcome.failed(number..run.end, error);
                }
            };
            let known = match before {
                Ok(before) => before,
                Err(error) => {
                    outcome.failed(number..number + 1, error);
                    before = seek_next(disk, windows, number + 1, &run).await;
                    continue;
                }
            };
            let joint = Joint {
                before: known,
                is_followed: number + 1 < run.end,
            };
            let (_, placed) = decode(disk, effort, span, part, Some(joint.clone())).await;
            before = match &placed {
                Ok(Some(tail)) => Ok(Before::True(tail.clone())),
                Ok(None) => seek_next(disk, windows, number + 1, &run).await,
                Err(_) => {
                    if number > run.start {
                        keep(windows, span, &joint.before);
                    }
                    seek_next(disk, windows, number + 1, &run).await
                }
            };
            outcome.settle(span, placed.map(drop));
        }
    };
    tokio::join!(arrive, decode_all);
}

/// Keeps what the span before has left to a span that comes again later.
fn keep(windows: &Windows, span: SpanId, before: &Before) {
    if let Before::True(window) = before
        && let Err(error) = windows.joints().leave_known(span, window)
    {
        // it is fetched then
        tracing::debug!("the window of span {span} is not kept: {error}");
    }
}

/// As [`seek`], for a span of the run; there is none at its end, and nobody asks.
async fn seek_next(disk: &Disk, windows: &Windows, span: u32, run: &Range<u32>) -> Result<Before> {
    if span >= run.end {
        return Ok(Before::unknown());
    }
    seek(disk, windows, SpanId(span)).await
}

/// What stands before a span: known here, or fetched.
async fn seek(disk: &Disk, windows: &Windows, span: SpanId) -> Result<Before> {
    if span == SpanId(0) {
        return Ok(Before::start());
    }
    let local = || format!("the window of span {span} cannot be read");
    if let Some(window) = windows.known(span).or_kind(Kind::Io, local)? {
        return Ok(Before::True(window));
    }
    let record = disk.spans().read(span).or_kind(Kind::Io, local)?;
    let Some(range) = record.window else {
        return Ok(Before::unknown()); // it refers to nothing
    };
    disk.count_fetch(|counters| counters.fetches += 1);
    let range = range.start as u64..range.end as u64;
    let stored = windows.fetch(range, PATIENCE).await?;
    disk.count_fetch(|counters| counters.fetched_bytes += stored.len() as u64);
    Before::stated(stored)
}

/// What becomes of the spans of a run.
struct Outcome<'a> {
    disk: &'a Arc<Disk>,
    claim: &'a Claim,
    on_the_way: Option<&'a OnTheWay>,
    /// Spans that are to be tried again.
    left: &'a mut Vec<SpanId>,
    failures: Vec<Error>,
}

impl Outcome<'_> {
    /// A span was placed, or refused.
    fn settle(&mut self, span: SpanId, result: Result<(), Refused>) {
        match result {
            Ok(()) => self.claim.end(span, Ok(())),
            Err(Refused::Mismatch(error)) => {
                self.failures.push(error);
                self.left.push(span);
            }
            Err(Refused::Lasting(error)) => {
                let error = Arc::new(error);
                tracing::warn!("{}", error.report());
                self.disk.health().failed(&[span], &error);
                self.claim.end(span, Err(error));
            }
        }
    }

    /// What these spans need did not come.
    fn failed(&mut self, spans: Range<u32>, error: Error) {
        self.failures.push(error);
        self.left.extend(spans.map(SpanId));
    }
}

/// The bytes of adjacent spans as they come. The spans overlap where one ends inside a byte.
struct Arrivals<'a> {
    disk: &'a Arc<Disk>,
    on_the_way: Option<&'a OnTheWay>,
    pieces: BoxStream<'a, Result<Bytes>>,
    /// Bytes of the blob from `start` on.
    bytes: BytesMut,
    start: u64,
    /// The end of the last span.
    end: u64,
    /// Bytes asked for, and those of them that have come.
    asked: u64,
    came: u64,
    asked_at: Instant,
    /// When the first piece came, and its bytes.
    first: Option<(Instant, u64)>,
    _room: Option<SemaphorePermit<'a>>,
}

impl<'a> Arrivals<'a> {
    /// Waits for room in memory, and asks the source.
    async fn new(
        disk: &'a Arc<Disk>,
        on_the_way: Option<&'a OnTheWay>,
        source: &'a Source,
        run: Range<u32>,
    ) -> Self {
        let start = disk.spans().compressed(SpanId(run.start)).start.get();
        let end = disk.spans().compressed(SpanId(run.end - 1)).end.get(); // a run is not empty
        let room = disk.store().memory(end - start).await;
        let pieces = if start < end {
            disk.count_fetch(|counters| counters.fetches += 1);
            source.pieces(&disk.layer().digest, start..end, PATIENCE)
        } else {
            futures_util::stream::empty().boxed()
        };
        Self {
            disk,
            on_the_way,
            pieces,
            bytes: BytesMut::new(),
            start,
            end,
            asked: end - start,
            came: 0,
            asked_at: Instant::now(),
            first: None,
            _room: room,
        }
    }

    /// Takes note of a piece; once all have come, of how long they took.
    fn note(&mut self, length: u64) {
        self.disk
            .count_fetch(|counters| counters.fetched_bytes += length);
        if let Some(on_the_way) = self.on_the_way {
            on_the_way.came(length);
        }
        let now = Instant::now();
        self.came += length;
        let (first, first_piece) = *self.first.get_or_insert((now, length));
        if self.came == self.asked {
            self.disk
                .whole()
                .measured(|cost| cost.came(self.asked, first_piece, self.asked_at, first, now));
        }
    }

    /// The bytes of a span; each is asked for in its turn. May be dropped while it waits, and called again.
    async fn next(&mut self, span: u32) -> Result<Bytes> {
        let range = self.disk.spans().compressed(SpanId(span));
        let (start, end) = (range.start.get(), range.end.get());
        while self.start + (self.bytes.len() as u64) < end {
            let Some(piece) = self.pieces.next().await.transpose()? else {
                let at = self.start + self.bytes.len() as u64;
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("byte {at} of a range to {} is the last that came", self.end),
                ));
            };
            self.note(piece.len() as u64);
            if self.bytes.is_empty() {
                self.bytes.reserve((end - self.start) as usize); // at most MAX_SPAN_BYTES
            }
            self.bytes.extend_from_slice(&piece);
        }
        let whole = self.bytes.split().freeze();
        // inside `whole`: spans follow each other in the blob
        let part = whole.slice((start - self.start) as usize..(end - self.start) as usize);
        let next = match span + 1 {
            next if next < self.disk.spans().count() => {
                self.disk.spans().compressed(SpanId(next)).start.get()
            }
            _ => end,
        };
        let next = next.clamp(start, self.start + whole.len() as u64);
        self.bytes
            .extend_from_slice(&whole[(next - self.start) as usize..]);
        self.start = next;
        Ok(part)
    }
}

/// Has a span placed by one of the decoding threads. Gives the window of the span after it, as [`place`].
async fn decode(
    disk: &Arc<Disk>,
    effort: &Arc<Effort>,
    span: SpanId,
    bytes: Bytes,
    joint: Option<Joint>,
) -> (SpanId, Result<Option<Bytes>, Refused>) {
    let worker = Arc::clone(disk);
    let result = disk
        .store()
        .decoders()
        .run(effort, move |decoder| {
            let began = Instant::now();
            let placed = place(&worker, span, &bytes, joint.as_ref(), decoder);
            let took = began.elapsed();
            worker
                .whole()
                .measured(|cost| cost.decoded(bytes.len() as u64, took));
            placed
        })
        .await;
    let failed = |failed| {
        let context = format!("span {span} of layer {}", disk.layer().digest);
        Err(Refused::Lasting(Error::with_source(
            Kind::Io,
            context,
            failed,
        )))
    };
    (span, result.unwrap_or_else(failed))
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
    let missing = disk.missing(range);
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
