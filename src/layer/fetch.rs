//! A fetch: from the sources, in order and again, until its spans are on the disk or nobody waits any more.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    Disk,
    flight::Claim,
    scatter::scatter,
    truth::{Decoded, Lie},
};
use crate::{
    error::{Error, Kind, Result},
    gzip::inflate::SpanDecoder,
    oci::Digest,
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

/// Why a span whose compressed bytes have come is not present.
enum Refused {
    /// The bytes are not the span's: another source, or another try, may have them.
    Mismatch(Error),
    /// They are, and no try will help: the table lies, or the local disk fails.
    Lasting(Error),
}

/// Brings the spans of a claim to the disk. Whatever happens, all its flights end.
pub(super) async fn fetch(disk: Arc<Disk>, claim: Claim) {
    let mut missing: Vec<SpanId> = claim.spans().map(SpanId).collect();
    let rounds = async {
        let mut pause = FIRST_PAUSE;
        for round in 1.. {
            let failures = fetch_round(&disk, &claim, &mut missing).await;
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
async fn fetch_round(disk: &Arc<Disk>, claim: &Claim, missing: &mut Vec<SpanId>) -> Vec<Error> {
    let mut failures = Vec::new();
    for index in 0..disk.sources().len().max(1) {
        let source = match disk.sources().get(index).await {
            Ok(source) => source,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        let mut left = Vec::new();
        for run in runs(missing) {
            let results = match fetch_run(disk, &source, run.clone()).await {
                Ok(results) => results,
                Err(error) => {
                    let place = format!("from {}", source.reference());
                    failures.push(error.context(place));
                    left.extend(run.map(SpanId));
                    continue;
                }
            };
            for (span, result) in results {
                match result {
                    Ok(()) => {
                        disk.health().fetched(span);
                        claim.end(span, Ok(()));
                    }
                    Err(Refused::Mismatch(error)) => {
                        let place = format!("from {}", source.reference());
                        failures.push(error.context(place));
                        left.push(span);
                    }
                    Err(Refused::Lasting(error)) => {
                        let error = Arc::new(error);
                        tracing::warn!("{}", error.report());
                        disk.health().failed(&[span], &error);
                        claim.end(span, Err(error));
                    }
                }
            }
        }
        *missing = left;
        if missing.is_empty() {
            break;
        }
    }
    failures
}

/// One ranged GET for adjacent spans, and what became of each.
async fn fetch_run(
    disk: &Arc<Disk>,
    source: &Source,
    run: Range<u32>,
) -> Result<Vec<(SpanId, Result<(), Refused>)>> {
    let spans = disk.spans();
    let start = spans.compressed(SpanId(run.start)).start.get();
    let end = spans.compressed(SpanId(run.end - 1)).end.get();
    let _room = disk.store().memory(end - start).await;
    let bytes = if start < end {
        disk.count_fetch(|counters| counters.fetches += 1);
        source
            .range_within(&disk.layer().digest, start..end, PATIENCE)
            .await?
    } else {
        Bytes::new()
    };
    if bytes.len() as u64 != end - start {
        return Err(Error::new(
            Kind::Corrupt,
            format!("{} bytes came for bytes {start} to {end}", bytes.len()),
        ));
    }
    disk.count_fetch(|counters| counters.fetched_bytes += bytes.len() as u64);
    let jobs = run.map(|span| {
        let span = SpanId(span);
        let range = spans.compressed(span);
        // inside `bytes`: spans follow each other in the blob
        let part =
            bytes.slice((range.start.get() - start) as usize..(range.end.get() - start) as usize);
        let disk = Arc::clone(disk);
        async move {
            let worker = Arc::clone(&disk);
            let result = disk
                .store()
                .decoders()
                .run(move |decoder| place(&worker, span, &part, decoder))
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
    });
    Ok(futures_util::future::join_all(jobs).await)
}

/// Verifies, inflates and scatters one span, and sets its bit. On a decoding thread.
fn place(
    disk: &Arc<Disk>,
    span: SpanId,
    compressed: &[u8],
    decoder: &mut SpanDecoder,
) -> Result<(), Refused> {
    let name = || format!("span {span} of layer {}", disk.layer().digest);
    let local = |error: std::io::Error| {
        Refused::Lasting(Error::with_source(
            Kind::Io,
            format!("{} cannot be kept in {}", name(), disk.path().display()),
            error,
        ))
    };
    let record = disk.spans().read(span).map_err(local)?;
    let found = Digest::of(compressed);
    if found != record.digest {
        return Err(Refused::Mismatch(Error::new(
            Kind::Corrupt,
            format!("its bytes have digest {found}, and not {}", record.digest),
        )));
    }
    let refused = |lie: Lie| {
        let context = format!(
            "{} has the digest that its table {} states, and is not what the table says",
            name(),
            disk.table()
        );
        Refused::Lasting(Error::with_source(Kind::Corrupt, context, lie))
    };
    if disk.is_disowned(span) {
        return Err(refused(Lie::Disowned));
    }
    let window = disk.window(&record).map_err(local)?;
    let decoded = Decoded::new(disk, &record, compressed, window.as_deref(), decoder);
    let decoded = decoded.map_err(refused)?;
    if let Some(lie) = decoded.check(disk, span).map_err(Refused::Lasting)? {
        if let Lie::Window { next } = lie {
            disown(disk, next).map_err(local)?;
        }
        return Err(refused(lie));
    }
    let (start, bytes) = (record.uncompressed.start, decoded.bytes);
    let regions = disk.regions().in_layer(&record.uncompressed);
    scatter(disk.data(), regions, start, bytes).map_err(local)?;
    if !disk.set_present(span) {
        return Err(refused(Lie::Disowned));
    }
    Ok(())
}

/// Takes back a span that the one before has shown to be wrong, and says so.
fn disown(disk: &Disk, span: SpanId) -> std::io::Result<()> {
    let context = format!(
        "span {span} of layer {} is not what its table {} says",
        disk.layer().digest,
        disk.table()
    );
    let error = Error::with_source(Kind::Corrupt, context, Lie::Disowned);
    disk.health().failed(&[span], &Arc::new(error));
    disk.disown(span)
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
