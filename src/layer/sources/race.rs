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
        for request in &mut self.requests {
            request.goal = request.goal.max(request.position + PROGRESS).min(self.end);
        }
        self.requested += 1;
        let range = from..self.end;
        let pieces = pieces(&source, self.blob, range.clone(), patience);
        self.requests
            .push(RacingRequest::new(source, pieces, range));
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
    /// A request that begins now.
    fn new(
        source: Arc<LayerSource>,
        pieces: BoxStream<'static, Result<Bytes>>,
        range: Range<u64>,
    ) -> Self {
        let now = Instant::now();
        Self {
            source,
            pieces,
            position: range.start,
            held: VecDeque::new(),
            goal: (range.start + PROGRESS).min(range.end),
            is_done: false,
            asked: now,
            has_begun: false,
            seen: now,
            gained: 0,
        }
    }

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
        error.context(format!("from {}", self.source.name()))
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

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, stream};
    use tokio::{sync::mpsc, time::advance};

    use super::*;
    use crate::layer::{services::StoreOptions, sources::health::Hosts};

    const END: u64 = 100_000;
    const MOMENT: Duration = Duration::from_millis(1);
    const LATE: Duration = Duration::from_secs(1);

    /// A source that cannot be opened.
    fn source(number: u32) -> Arc<LayerSource> {
        LayerSource::of_test(&format!("oci:/nothing/here/{number}:1"), &Hosts::default())
    }

    type Sender = mpsc::UnboundedSender<Result<Bytes>>;

    fn send(sender: &Sender, length: u64) {
        sender.send(Ok(vec![7; length as usize].into())).unwrap();
    }

    /// A race to [`END`] with the requests of these sources under way, and what lets them send.
    fn race<const COUNT: usize>(rest: &[u32]) -> (Race, [Sender; COUNT]) {
        let mut race = Race::new(
            rest.iter().map(|number| source(*number)),
            Digest::of(b""),
            END,
        );
        let senders = std::array::from_fn(|number| {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            let pieces = stream::poll_fn(move |context| receiver.poll_recv(context)).boxed();
            let asked = RacingRequest::new(source(100 + number as u32), pieces, 0..END);
            race.requests.push(asked);
            sender
        });
        race.failures.clear();
        (race, senders)
    }

    fn names(sources: impl IntoIterator<Item = Arc<LayerSource>>) -> Vec<String> {
        let names = sources.into_iter().map(|source| source.name().to_owned());
        names.collect()
    }

    fn name(number: u32) -> String {
        source(number).name().to_owned()
    }

    /// The next piece, if there is one without waiting.
    fn now(race: &mut Race) -> Option<Option<RacePiece>> {
        race.next(0).now_or_never()
    }

    #[tokio::test]
    async fn without_a_source_the_error_says_what_to_do() {
        let mut race = Race::new([], Digest::of(b""), END);
        assert!(race.next(0).await.is_none());
        assert_eq!(race.take_requests(), 0);
        let failures = race.failures();
        assert_eq!(failures.len(), 1);
        assert!(failures[0].report().contains("attach an image"));
    }

    #[tokio::test(start_paused = true)]
    async fn each_source_is_asked_once_and_all_reasons_are_kept() {
        let mut race = Race::new([1, 2, 3].map(source), Digest::of(b""), END);
        assert!(race.next(0).await.is_none());
        assert_eq!((race.take_requests(), race.take_requests()), (3, 0));
        let failures: Vec<_> = race.failures().iter().map(Error::report).collect();
        assert_eq!(failures.len(), 3);
        for (number, failure) in (1..).zip(&failures) {
            assert!(failure.contains(&name(number)), "{failure}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_only_source_s_bytes_are_passed_as_they_come() {
        let (mut race, [one]) = race(&[]);
        let mut starts = Vec::new();
        for length in [1, 20_000, END] {
            send(&one, length);
            let piece = now(&mut race).unwrap().unwrap();
            starts.push((piece.start, piece.bytes.len() as u64));
        }
        assert_eq!(starts, [(0, 1), (1, 20_000), (20_001, END)]);
        assert_eq!(race.requests[0].position, END, "no more is expected");
        assert!(race.requests[0].is_done);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_that_sends_enough_goes_on_alone() {
        for winner in [0, 1] {
            let (mut race, senders) = race::<2>(&[]);
            let (won, lost) = (&senders[winner], &senders[1 - winner]);
            send(lost, PROGRESS - 1);
            send(won, PROGRESS - 1);
            assert!(now(&mut race).is_none(), "it is not decided");
            assert_eq!(race.requests.len(), 2);
            send(won, 1);
            // what it has sent before comes first
            let pieces: Vec<_> = std::iter::from_fn(|| now(&mut race)?).collect();
            let expected = 100 + winner as u32;
            let found = pieces.iter().map(|piece| Arc::clone(&piece.source));
            assert_eq!(names(found), [name(expected), name(expected)]);
            assert_eq!((pieces[0].start, pieces[1].start), (0, PROGRESS - 1));
            // the other one may be asked again
            assert_eq!(names(race.rest.clone()), [name(101 - winner as u32)]);
            // the first source has won although it was late: it is given more time
            assert_eq!(race.tolerance, if winner == 0 { 2 } else { 1 });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_under_way_has_to_send_more_when_another_one_begins() {
        let (mut race, [one]) = race(&[1]);
        send(&one, 5000);
        now(&mut race).unwrap().unwrap();
        assert!(race.ask_next(0));
        assert_eq!(race.requests[0].goal, 5000 + PROGRESS);
        assert_eq!(race.requests[1].goal, PROGRESS);
        assert_eq!(race.take_requests(), 1);
        assert!(!race.ask_next(0), "there is no other");
        let (mut race, [one]) = self::race(&[1]);
        send(&one, END - 5);
        now(&mut race).unwrap().unwrap();
        assert!(race.ask_next(END - 5));
        assert_eq!(race.requests[0].goal, END);
        assert_eq!(race.requests[1].goal, END);
    }

    #[tokio::test(start_paused = true)]
    async fn another_source_is_asked_when_the_first_is_late() {
        let (mut race, [one]) = race(&[1]);
        let early = tokio::time::timeout(LATE - MOMENT, race.next(0)).await;
        assert!(early.is_err() && race.rest.len() == 1);
        let asked = tokio::time::timeout(MOMENT * 2, race.next(0)).await;
        assert!(asked.is_err() && race.rest.is_empty());
        // it cannot be opened, and the first one is still waited for
        assert_eq!((race.requests.len(), race.failures.len()), (1, 1));
        send(&one, 10);
        assert!(race.next(0).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_source_is_never_late() {
        let (mut race, [one]) = race(&[]);
        let waited = tokio::time::timeout(LATE * 100, race.next(0)).await;
        assert!(waited.is_err() && race.requests.len() == 1);
        send(&one, 10);
        assert!(race.next(0).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_gives_a_source_more_time() {
        let (mut race, [one]) = race(&[1]);
        let began = Instant::now();
        assert_eq!(race.requests[0].late_at(1), began + LATE);
        assert_eq!(race.requests[0].late_at(3), began + LATE * 3);
        advance(LATE / 10).await;
        send(&one, PROGRESS - 1);
        now(&mut race).unwrap().unwrap();
        assert_eq!(race.requests[0].seen, began, "that was too little");
        // the first byte was fast, but a source that has begun has at least this long
        assert_eq!(race.requests[0].late_at(1), began + LEAST_PACE);
        advance(LATE / 10).await;
        send(&one, 1);
        now(&mut race).unwrap().unwrap();
        assert_eq!(race.requests[0].late_at(1), began + LATE / 5 + LEAST_PACE);
        assert_eq!(race.requests[0].gained, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_to_the_first_byte_is_measured_once() {
        let (mut race, [one]) = race(&[]);
        let host = Arc::clone(&race.requests[0].source);
        advance(Duration::from_millis(100)).await;
        send(&one, 1);
        now(&mut race).unwrap().unwrap();
        let late = host.host().late_after();
        assert_eq!(late, Duration::from_millis(400));
        advance(LATE).await;
        send(&one, 1);
        now(&mut race).unwrap().unwrap();
        assert_eq!(host.host().late_after(), late);
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_ends_early_is_an_error_and_the_next_source_is_asked() {
        let (mut race, [one]) = race(&[1]);
        send(&one, 10);
        now(&mut race).unwrap().unwrap();
        drop(one);
        assert!(race.next(10).await.is_none());
        assert_eq!(race.take_requests(), 1);
        let failures = race.failures();
        assert_eq!(failures[0].kind(), Kind::Corrupt);
        let report = failures[0].report();
        assert!(report.contains("ended at byte 10, expected bytes up to 100000"));
        assert!(report.contains(&name(100)), "{report}");
        assert!(failures[1].report().contains(&name(1)));
    }

    /// Whether a request that is dropped counts as a failure: two make a source down.
    async fn is_failure(prepare: impl AsyncFn(&mut Race, &Sender)) -> bool {
        let hosts = Hosts::default();
        let source = LayerSource::of_test("registry.example/a:1", &hosts);
        let _ = source
            .host()
            .failed(&Arc::new(Error::new(Kind::Unavailable, "")));
        let (mut race, [one]) = race(&[]);
        race.requests[0].source = Arc::clone(&source);
        prepare(&mut race, &one).await;
        drop(race);
        source.is_down()
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_request_that_is_late_counts_as_a_failure_when_it_is_dropped() {
        assert!(!is_failure(async |_, _| advance(LATE - MOMENT).await).await);
        assert!(is_failure(async |_, _| advance(LATE).await).await);
        let done = async |race: &mut Race, one: &Sender| {
            send(one, END);
            now(race).unwrap().unwrap();
            advance(LATE * 2).await;
        };
        assert!(!is_failure(done).await);
        let fails = async |race: &mut Race, one: &Sender| {
            one.send(Err(Error::new(Kind::Unavailable, "away")))
                .unwrap();
            assert!(race.next(0).await.is_none());
        };
        assert!(is_failure(fails).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_collected_is_from_one_source() {
        let (mut race, [one, other]) = race(&[]);
        race.end = 5;
        for request in &mut race.requests {
            (request.position, request.goal) = (0, 5);
        }
        // the first one sends a part, and fails
        one.send(Ok(Bytes::from_static(b"wro"))).unwrap();
        one.send(Err(Error::new(Kind::Unavailable, "away")))
            .unwrap();
        other.send(Ok(Bytes::from_static(b"rig"))).unwrap();
        other.send(Ok(Bytes::from_static(b"ht"))).unwrap();
        assert_eq!(race.collect(0).await.unwrap(), &b"right"[..]);

        let (mut race, [one]) = self::race(&[1]);
        race.end = 5;
        one.send(Ok(Bytes::from_static(b"rig"))).unwrap();
        drop(one);
        assert_eq!(race.collect(0).await.unwrap_err().len(), 2);
    }

    #[tokio::test]
    async fn bytes_of_a_source_that_failed_are_not_kept() {
        let layout = tempfile::tempdir().unwrap();
        let at = |name: &str| layout.path().join(name);
        let blob = Digest::of(b"right");
        std::fs::create_dir_all(at("blobs/sha256")).unwrap();
        std::fs::write(at("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(at("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        std::fs::write(at("blobs/sha256").join(blob.hex()), b"right").unwrap();
        let reference = format!("oci:{}:1", layout.path().display());
        let (mut race, [one]) = race(&[]);
        (race.end, race.blob) = (5, blob);
        race.requests[0].goal = 5;
        race.rest
            .push_back(LayerSource::of_test(&reference, &Hosts::default()));
        one.send(Ok(Bytes::from_static(b"wro"))).unwrap();
        one.send(Err(Error::new(Kind::Unavailable, "away")))
            .unwrap();
        assert_eq!(race.collect(0).await.unwrap(), &b"right"[..]);
    }

    /// Sources in their order: whether each is down, and whether it is tried.
    async fn tried(down: &[bool], wait: Duration) -> Vec<bool> {
        let root = tempfile::tempdir().unwrap();
        let lock = crate::layer::lock_root(root.path(), None).unwrap();
        let services = Services::start(root.path(), lock, StoreOptions::default()).unwrap();
        services.enter();
        let all: Vec<_> = (0..).map(source).take(down.len()).collect();
        let error = Arc::new(Error::new(Kind::Unavailable, "away"));
        for (source, is_down) in all.iter().zip(down) {
            for _ in 0..if *is_down { 2 } else { 0 } {
                let _ = source.host().failed(&error);
            }
        }
        advance(wait).await;
        retry_down(&services, &all, Digest::of(b""), &(0..END));
        // a trial has begun where another one cannot
        let tried = all.iter().zip(down);
        tried
            .map(|(source, down)| *down && !source.begin_trial())
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn sources_that_are_down_are_tried_while_another_one_serves() {
        let pause = Duration::from_secs(1);
        assert_eq!(
            tried(&[false, true, true], pause).await,
            [false, true, true]
        );
        // readers ask it anyway
        assert_eq!(tried(&[true, true], pause).await, [false, false]);
    }
}
