//! Fetches a range of a blob from the first of its sources that sends it.
//!
//! One source is asked first. When it is late or stalls, the next source is asked too, and the first that sends a few kilobytes continues
//! alone. When a source fails, the next one is asked. The order follows from the health of the sources ([`super::health`]).

use std::{
    collections::VecDeque,
    future::poll_fn,
    ops::Range,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryFutureExt as _, TryStreamExt as _, stream::BoxStream};
use tokio::time::Instant;

use super::layer_sources::LayerSource;
use crate::{
    error::{Error, Kind, Result},
    layer::services::Services,
    oci::Digest,
};

/// How long the last source is retried without any progress. A source with others left after it has one attempt.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that a source must send to win the race, and then again and again to count as making progress.
const PROGRESS: u64 = 16 << 10;

/// After its first byte, a source has at least this long for each [`PROGRESS`] bytes: it shares its link with others.
const LEAST_PACE: Duration = Duration::from_secs(1);

/// Time limit for the trial of a source that is down.
const TRIAL: Duration = Duration::from_secs(10);

/// Some of the bytes, from one source.
pub(crate) struct RacePiece {
    /// Offset of the bytes in the blob.
    pub start: u64,
    pub bytes: Bytes,
    pub source: Arc<LayerSource>,
}

/// A range of a blob that is being fetched.
pub(crate) struct Race {
    blob: Digest,
    end: u64,
    /// Sources that have not been asked.
    rest: VecDeque<Arc<LayerSource>>,
    requests: Vec<RacingRequest>,
    failures: Vec<Error>,
    /// Requests that were made since [`Self::take_requests`] was called.
    requested: u64,
    /// Factor for the time after which a source is late. It grows when a late source still was the first: then the link is slow.
    tolerance: u32,
}

/// A request to one source.
struct RacingRequest {
    source: Arc<LayerSource>,
    pieces: BoxStream<'static, Result<Bytes>>,
    /// The offset of the next byte that it sends.
    position: u64,
    /// Bytes that have arrived before the race is decided.
    held: VecDeque<RacePiece>,
    /// The offset that it must reach to win the race.
    goal: u64,
    /// It has sent all bytes, or failed.
    is_done: bool,
    asked: Instant,
    has_begun: bool,
    /// Time of its last progress, and bytes since then.
    seen: Instant,
    gained: u64,
}

impl Race {
    /// A race of these sources, in their order. None is asked yet.
    pub(crate) fn new(
        sources: impl IntoIterator<Item = Arc<LayerSource>>,
        blob: Digest,
        end: u64,
    ) -> Self {
        let rest: VecDeque<_> = sources.into_iter().collect();
        let failures = match rest.is_empty() {
            true => vec![Error::new(
                Kind::Unavailable,
                "no source of the blob is known; attach an image with this layer again",
            )],
            false => Vec::new(),
        };
        Self {
            blob,
            end,
            rest,
            requests: Vec::new(),
            failures,
            requested: 0,
            tolerance: 1,
        }
    }

    /// The next bytes; `None`: no source is left, and [`Self::failures`] has the reasons. The bytes follow the previous ones, or they start
    /// at `restart` again: then all bytes from there on are from one other source. The future may be dropped while it waits, and the call
    /// be repeated.
    pub(crate) async fn next(&mut self, restart: u64) -> Option<RacePiece> {
        loop {
            if let [only] = &mut self.requests[..]
                && let Some(held) = only.held.pop_front()
            {
                return Some(held);
            }
            if self.requests.is_empty() && !self.ask_next(restart) {
                return None;
            }
            let late_at = match self.rest.is_empty() {
                true => None,
                false => self
                    .requests
                    .last()
                    .map(|last| last.late_at(self.tolerance)),
            };
            let late = async {
                match late_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let arrived = tokio::select! {
                biased;
                arrived = poll_fn(|context| poll_requests(&mut self.requests, context)) => arrived,
                () = late => {
                    self.ask_next(restart);
                    continue;
                }
            };
            match arrived {
                (index, Some(Ok(bytes))) => {
                    if let Some(piece) = self.take(index, bytes) {
                        return Some(piece);
                    }
                }
                (index, end) => {
                    let request = self.requests.remove(index);
                    let error = match end {
                        Some(Err(error)) => error,
                        _ => Error::new(
                            Kind::Corrupt,
                            format!(
                                "the response ended at byte {}, expected bytes up to {}",
                                request.position, self.end
                            ),
                        ),
                    };
                    self.failures.push(request.fail(error));
                }
            }
        }
    }

    /// The errors of the sources that failed.
    pub(crate) fn failures(self) -> Vec<Error> {
        self.failures
    }

    /// The number of requests since the last call.
    pub(crate) fn take_requests(&mut self) -> u64 {
        std::mem::take(&mut self.requested)
    }

    /// All bytes from `start` on, from one source.
    pub(crate) async fn collect(mut self, start: u64) -> Result<Bytes, Vec<Error>> {
        let mut bytes = BytesMut::new();
        while start + (bytes.len() as u64) < self.end {
            let Some(piece) = self.next(start).await else {
                return Err(self.failures());
            };
            // not more than have arrived
            bytes.truncate((piece.start - start) as usize);
            bytes.extend_from_slice(&piece.bytes);
        }
        Ok(bytes.freeze())
    }

    /// Asks the next source for the bytes from `from` on. False: there is none.
    fn ask_next(&mut self, from: u64) -> bool {
        let Some(source) = self.rest.pop_front() else {
            return false;
        };
        let patience = match self.rest.is_empty() && self.requests.is_empty() {
            true => PATIENCE,
            false => Duration::ZERO,
        };
        let now = Instant::now();
        for request in &mut self.requests {
            request.goal = request.goal.max(request.position + PROGRESS).min(self.end);
        }
        self.requested += 1;
        self.requests.push(RacingRequest {
            pieces: pieces(&source, self.blob, from..self.end, patience),
            source,
            position: from,
            held: VecDeque::new(),
            goal: (from + PROGRESS).min(self.end),
            is_done: false,
            asked: now,
            has_begun: false,
            seen: now,
            gained: 0,
        });
        true
    }

    /// Takes bytes that a source has sent. Returns them if the race is decided.
    fn take(&mut self, index: usize, bytes: Bytes) -> Option<RacePiece> {
        let is_alone = self.requests.len() == 1;
        let request = &mut self.requests[index]; // the one that was polled just now
        let piece = request.receive(bytes, self.end);
        if is_alone {
            return Some(piece);
        }
        request.held.push_back(piece);
        if request.position < request.goal {
            return None;
        }
        let winner = self.requests.remove(index);
        if index == 0 {
            self.tolerance = self.tolerance.saturating_mul(2);
        }
        // the requests of the others end here; a source that had no time to answer may be asked again
        for other in std::mem::take(&mut self.requests) {
            self.rest.push_back(Arc::clone(&other.source));
        }
        self.requests.push(winner);
        None // the next call returns its held bytes
    }
}

impl RacingRequest {
    /// The time at which another source is asked too, unless this one makes progress before.
    fn late_at(&self, tolerance: u32) -> Instant {
        let late = self.source.host().late_after();
        let late = match self.has_begun {
            true => late.max(LEAST_PACE),
            false => late,
        };
        self.seen + late.saturating_mul(tolerance)
    }

    fn receive(&mut self, bytes: Bytes, end: u64) -> RacePiece {
        let now = Instant::now();
        let host = self.source.host();
        if !self.has_begun {
            self.has_begun = true;
            host.first_byte_after(now - self.asked);
        }
        let start = self.position;
        self.position = start.saturating_add(bytes.len() as u64).min(end);
        self.gained += self.position - start;
        self.is_done = self.position >= end;
        if self.gained >= PROGRESS || self.is_done {
            self.gained = 0;
            self.seen = now;
            self.source.answered();
        }
        RacePiece {
            start,
            bytes,
            source: Arc::clone(&self.source),
        }
    }

    /// The request has ended without all its bytes.
    fn fail(mut self, error: Error) -> Error {
        self.is_done = true;
        self.source.failed(&error.to_shared());
        error.context(format!("from {}", self.source.reference()))
    }
}

impl Drop for RacingRequest {
    fn drop(&mut self) {
        if self.is_done || Instant::now() < self.late_at(1) {
            return;
        }
        let text = format!(
            "{} bytes have arrived in {:.1} s",
            self.gained,
            self.seen.elapsed().as_secs_f64()
        );
        self.source
            .failed(&Arc::new(Error::new(Kind::Unavailable, text)));
    }
}

/// The first request that has bytes or an error; `None`: its body has ended.
fn poll_requests(
    requests: &mut [RacingRequest],
    context: &mut Context<'_>,
) -> Poll<(usize, Option<Result<Bytes>>)> {
    for (index, request) in requests.iter_mut().enumerate() {
        if let Poll::Ready(item) = request.pieces.poll_next_unpin(context) {
            return Poll::Ready((index, item));
        }
    }
    Poll::Pending
}

/// The bytes that a source sends of a range. The source is opened first if it is not open.
fn pieces(
    source: &Arc<LayerSource>,
    blob: Digest,
    range: Range<u64>,
    patience: Duration,
) -> BoxStream<'static, Result<Bytes>> {
    let source = Arc::clone(source);
    async move { Ok(source.open().await?.pieces(&blob, range, patience)) }
        .try_flatten_stream()
        .boxed()
}

/// Tries sources that are down by fetching a few bytes that no reader waits for, if another source serves the readers.
pub(crate) fn retry_down(
    services: &Services,
    sources: &[Arc<LayerSource>],
    blob: Digest,
    range: &Range<u64>,
) {
    if sources.first().is_none_or(|first| first.is_down()) {
        return;
    }
    for source in sources.iter().filter(|source| source.begin_trial()) {
        let source = Arc::clone(source);
        let range = range.start..range.end.min(range.start.saturating_add(PROGRESS));
        services.spawn(async move {
            let read = pieces(&source, blob, range, Duration::ZERO).try_for_each(async |_| Ok(()));
            match tokio::time::timeout(TRIAL, read).await {
                Ok(Ok(())) => {
                    source.answered();
                    source.sent_right_bytes();
                }
                Ok(Err(error)) => source.failed(&error.to_shared()),
                Err(_) => {
                    let text = format!("no answer within {} s", TRIAL.as_secs());
                    source.failed(&Arc::new(Error::new(Kind::Unavailable, text)));
                }
            }
        });
    }
}
