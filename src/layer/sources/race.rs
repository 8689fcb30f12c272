//! The bytes of a range of a blob, from whichever of its sources has them.
//!
//! One source is asked. When it is late, or stops, the next one is asked too, and whoever is the first to bring a few kilobytes goes on
//! alone. When one fails, the next takes its place. What is remembered of them ([`super::health`]) decides who is asked first.

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

use super::places::LayerSource;
use crate::{
    error::{Error, Kind, Result},
    layer::services::Services,
    oci::Digest,
};

/// How long the last source is tried without any progress. One that has others behind it has one try.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that a source brings to be in use, and then again and again to stay so.
const PROGRESS: u64 = 16 << 10;

/// A source that has begun has at least this long for each [`PROGRESS`]: it shares its link with others.
const LEAST_PACE: Duration = Duration::from_secs(1);

/// How long a source that is down may take when it is tried again.
const TRIAL: Duration = Duration::from_secs(10);

/// Some of the bytes, from one source.
pub(crate) struct RacePiece {
    /// Where they are in the blob.
    pub start: u64,
    pub bytes: Bytes,
    pub place: Arc<LayerSource>,
}

/// A range of a blob on its way.
pub(crate) struct Race {
    blob: Digest,
    end: u64,
    /// Those that have not been asked.
    rest: VecDeque<Arc<LayerSource>>,
    runners: Vec<RacingGet>,
    failures: Vec<Error>,
    /// How often a source was asked that nobody has counted yet.
    asked: u64,
    /// How much later than usual a source may be: where the one that was late was still the first, the link is slow.
    tolerance: u32,
}

/// A source that was asked.
struct RacingGet {
    place: Arc<LayerSource>,
    pieces: BoxStream<'static, Result<Bytes>>,
    /// The next byte that it brings.
    position: u64,
    /// What has come while it is not decided who goes on.
    held: VecDeque<RacePiece>,
    /// Where it has to be for that.
    goal: u64,
    /// It has brought all, or failed.
    is_done: bool,
    asked: Instant,
    has_begun: bool,
    /// Its last progress, and bytes since.
    seen: Instant,
    gained: u64,
}

impl Race {
    /// Of these places, the first ones first. None is asked yet.
    pub(crate) fn new(
        places: impl IntoIterator<Item = Arc<LayerSource>>,
        blob: Digest,
        end: u64,
    ) -> Self {
        let rest: VecDeque<_> = places.into_iter().collect();
        let failures = match rest.is_empty() {
            true => vec![Error::new(Kind::Unavailable, "no source is known")],
            false => Vec::new(),
        };
        Self {
            blob,
            end,
            rest,
            runners: Vec::new(),
            failures,
            asked: 0,
            tolerance: 1,
        }
    }

    /// The next bytes; `None` when no source is left, and [`Self::failures`] say why. They follow those before, or begin anew at
    /// `restart`: the bytes from there on are then from one source. May be dropped while it waits, and called again.
    pub(crate) async fn next(&mut self, restart: u64) -> Option<RacePiece> {
        loop {
            if let [only] = &mut self.runners[..]
                && let Some(held) = only.held.pop_front()
            {
                return Some(held);
            }
            if self.runners.is_empty() && !self.ask_next(restart) {
                return None;
            }
            let late_at = match self.rest.is_empty() {
                true => None,
                false => self.runners.last().map(|last| last.late_at(self.tolerance)),
            };
            let late = async {
                match late_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let came = tokio::select! {
                biased;
                came = poll_fn(|context| poll_runners(&mut self.runners, context)) => came,
                () = late => {
                    self.ask_next(restart);
                    continue;
                }
            };
            match came {
                (index, Some(Ok(bytes))) => {
                    if let Some(piece) = self.take(index, bytes) {
                        return Some(piece);
                    }
                }
                (index, end) => {
                    let runner = self.runners.remove(index);
                    let error = match end {
                        Some(Err(error)) => error,
                        _ => Error::new(
                            Kind::Corrupt,
                            format!(
                                "byte {} of a range to {} is the last that came",
                                runner.position, self.end
                            ),
                        ),
                    };
                    self.failures.push(runner.fail(error));
                }
            }
        }
    }

    /// What the sources that failed have said.
    pub(crate) fn failures(self) -> Vec<Error> {
        self.failures
    }

    /// How many requests were made since this was asked.
    pub(crate) fn take_asked(&mut self) -> u64 {
        std::mem::take(&mut self.asked)
    }

    /// All bytes from `start` on, from one source.
    pub(crate) async fn collect(mut self, start: u64) -> Result<Bytes, Vec<Error>> {
        let mut bytes = BytesMut::new();
        while start + (bytes.len() as u64) < self.end {
            let Some(piece) = self.next(start).await else {
                return Err(self.failures());
            };
            // at most as many as have come
            bytes.truncate((piece.start - start) as usize);
            bytes.extend_from_slice(&piece.bytes);
        }
        Ok(bytes.freeze())
    }

    /// Asks the next source for what begins at `from`, if there is one.
    fn ask_next(&mut self, from: u64) -> bool {
        let Some(place) = self.rest.pop_front() else {
            return false;
        };
        let patience = match self.rest.is_empty() && self.runners.is_empty() {
            true => PATIENCE,
            false => Duration::ZERO,
        };
        let now = Instant::now();
        for runner in &mut self.runners {
            runner.goal = runner.goal.max(runner.position + PROGRESS).min(self.end);
        }
        self.asked += 1;
        self.runners.push(RacingGet {
            pieces: pieces(&place, self.blob, from..self.end, patience),
            place,
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

    /// Takes what a source has brought; gives what of it may be used now.
    fn take(&mut self, index: usize, bytes: Bytes) -> Option<RacePiece> {
        let is_alone = self.runners.len() == 1;
        let runner = &mut self.runners[index]; // one that was polled just now
        let piece = runner.came(bytes, self.end);
        if is_alone {
            return Some(piece);
        }
        runner.held.push_back(piece);
        if runner.position < runner.goal {
            return None;
        }
        let winner = self.runners.remove(index);
        if index == 0 {
            self.tolerance = self.tolerance.saturating_mul(2);
        }
        // they end here, what they have held goes with them, and those who had no time may be asked again
        for other in std::mem::take(&mut self.runners) {
            self.rest.push_back(Arc::clone(&other.place));
        }
        self.runners.push(winner);
        None // it is what it holds
    }
}

impl RacingGet {
    /// When another one is asked too, unless it brings something before.
    fn late_at(&self, tolerance: u32) -> Instant {
        let late = self.place.host().late_after();
        let late = match self.has_begun {
            true => late.max(LEAST_PACE),
            false => late,
        };
        self.seen + late.saturating_mul(tolerance)
    }

    fn came(&mut self, bytes: Bytes, end: u64) -> RacePiece {
        let now = Instant::now();
        let host = self.place.host();
        if !self.has_begun {
            self.has_begun = true;
            host.began_to_answer(now - self.asked);
        }
        let start = self.position;
        self.position = start.saturating_add(bytes.len() as u64).min(end);
        self.gained += self.position - start;
        self.is_done = self.position >= end;
        if self.gained >= PROGRESS || self.is_done {
            self.gained = 0;
            self.seen = now;
            self.place.answered();
        }
        RacePiece {
            start,
            bytes,
            place: Arc::clone(&self.place),
        }
    }

    /// It has ended without all that it was asked for.
    fn fail(mut self, error: Error) -> Error {
        self.is_done = true;
        self.place.failed(&error.to_shared());
        error.context(format!("from {}", self.place.reference()))
    }
}

impl Drop for RacingGet {
    fn drop(&mut self) {
        if self.is_done || Instant::now() < self.late_at(1) {
            return;
        }
        let text = format!(
            "{} bytes have come of what was asked for {:.1} s ago",
            self.gained,
            self.seen.elapsed().as_secs_f64()
        );
        self.place
            .failed(&Arc::new(Error::new(Kind::Unavailable, text)));
    }
}

/// The first of the runners that has something; `None` is the end of what it brings.
fn poll_runners(
    runners: &mut [RacingGet],
    context: &mut Context<'_>,
) -> Poll<(usize, Option<Result<Bytes>>)> {
    for (index, runner) in runners.iter_mut().enumerate() {
        if let Poll::Ready(item) = runner.pieces.poll_next_unpin(context) {
            return Poll::Ready((index, item));
        }
    }
    Poll::Pending
}

/// What a source sends of a range. It is opened first, where nobody has done that.
fn pieces(
    place: &Arc<LayerSource>,
    blob: Digest,
    range: Range<u64>,
    patience: Duration,
) -> BoxStream<'static, Result<Bytes>> {
    let place = Arc::clone(place);
    async move { Ok(place.open().await?.pieces(&blob, range, patience)) }
        .try_flatten_stream()
        .boxed()
}

/// Tries those sources again that are down, by a few bytes that nobody waits for, where there is another one for who does.
pub(crate) fn try_again(
    services: &Services,
    places: &[Arc<LayerSource>],
    blob: Digest,
    range: &Range<u64>,
) {
    if places.first().is_none_or(|first| first.is_down()) {
        return;
    }
    for place in places.iter().filter(|place| place.begin_trial()) {
        let place = Arc::clone(place);
        let range = range.start..range.end.min(range.start.saturating_add(PROGRESS));
        services.spawn(async move {
            let read = pieces(&place, blob, range, Duration::ZERO).try_for_each(async |_| Ok(()));
            match tokio::time::timeout(TRIAL, read).await {
                Ok(Ok(())) => {
                    place.answered();
                    place.is_right();
                }
                Ok(Err(error)) => place.failed(&error.to_shared()),
                Err(_) => {
                    let text = format!("no answer within {} s", TRIAL.as_secs());
                    place.failed(&Arc::new(Error::new(Kind::Unavailable, text)));
                }
            }
        });
    }
}
