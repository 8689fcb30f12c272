//! Reading a range of a blob, however the server treats `Range`: one state machine, for ranges, streams and whole blobs.
//!
//! It keeps its position in the blob. An answer is checked against that position before a byte of it is used; after an incomplete answer
//! the next request starts at the new position.

mod content_range;

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt as _, try_unfold};
use reqwest::StatusCode;

use self::content_range::ContentRange;
use super::{
    client::{Client, Wanted},
    retry::{Failure, Tries},
    transport::Body,
};
use crate::{
    error::{Error, Kind, Result},
    metrics::RetryReason,
    oci::Digest,
};

/// Minimum number of bytes of a try that counts as progress: a server that sends a byte and disconnects must not be asked for ever.
const PROGRESS: u64 = 4 << 10;
/// After so many ranges that are not the ones asked for, the blob is asked for as a whole.
const WRONG_RANGES: u32 = 2;

pub(super) struct Reader {
    client: Arc<Client>,
    digest: Digest,
    /// The next byte to give out.
    position: u64,
    end: u64,
    /// The blob's size, where it is known.
    size: Option<u64>,
    answer: Option<RangeAnswer>,
    tries: Tries,
    /// Bytes since the last progress.
    gained: u64,
    wrong_ranges: u32,
    /// The server answers ranges with nothing useful: ask without.
    whole: bool,
    /// The server has answered a range with the whole blob.
    ignores_ranges: bool,
}

/// An answer being read.
struct RangeAnswer {
    body: Body,
    /// Bytes of it that lie before the position.
    skip: u64,
    /// The part of the blob, from `Content-Range`.
    part: Option<Range<u64>>,
}

impl RangeAnswer {
    /// Whether it is complete, and counts as progress: a server may send less than the requested range (RFC 9110, 14.2).
    fn is_whole_at(&self, position: u64) -> bool {
        let part = self.part.as_ref();
        part.is_some_and(|part| part.end == position && part.end - part.start >= PROGRESS)
    }
}

impl Reader {
    pub(super) fn new(
        client: &Arc<Client>,
        digest: &Digest,
        range: Range<u64>,
        size: Option<u64>,
    ) -> Self {
        let what = match size {
            Some(size) if range == (0..size) => {
                format!("reading blob {digest} of {}", client.name())
            }
            _ => format!(
                "reading bytes {}-{} of blob {digest} of {}",
                range.start,
                range.end.saturating_sub(1),
                client.name()
            ),
        };
        Self {
            tries: Tries::new(what, client.limits.data_patience),
            client: Arc::clone(client),
            digest: *digest,
            position: range.start,
            end: range.end,
            whole: false,
            size,
            answer: None,
            gained: 0,
            wrong_ranges: 0,
            ignores_ranges: false,
        }
    }

    /// The next bytes of the range; `None` when all of it was given out. Tries again inside.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        self.tries.begin();
        let activity = Arc::clone(&self.client.activity);
        let _waiting = activity.wait();
        while self.position < self.end {
            match self.try_next().await {
                Ok(bytes) => {
                    match self.position < self.end {
                        true => activity.arrived(bytes.len()),
                        false => activity.completed(),
                    }
                    self.gained = self.gained.saturating_add(bytes.len() as u64);
                    if self.gained >= PROGRESS {
                        self.gained = 0;
                        self.tries.progress();
                    }
                    return Ok(Some(bytes));
                }
                Err(failure) => {
                    self.answer = None;
                    self.tries.after(failure).await?;
                }
            }
        }
        Ok(None)
    }

    /// All of its bytes.
    pub(super) fn into_stream(self) -> BoxStream<'static, Result<Bytes>> {
        try_unfold(self, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        })
        .boxed()
    }

    /// Gives up after another time without progress than the client's limit.
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.tries.set_patience(patience);
    }

    /// Whether the server answered a range with the whole blob. Known after the first [`Reader::next`].
    pub(super) fn ignores_ranges(&self) -> bool {
        self.ignores_ranges
    }

    /// Goes on to a later end, with the answer at hand if it reaches that far.
    pub(super) fn extend(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    async fn try_next(&mut self) -> Result<Bytes, Failure> {
        let mut answer = match self.answer.take() {
            Some(answer) => answer,
            None => self.ask().await?,
        };
        loop {
            let Some(mut piece) = answer.body.next().await? else {
                if answer.is_whole_at(self.position) {
                    answer = self.ask().await?;
                    continue;
                }
                return Err(Failure::passing(
                    RetryReason::Answer,
                    Error::new(
                        Kind::Unavailable,
                        format!(
                            "{} ended its answer at byte {} of {}",
                            answer.body.host(),
                            self.position,
                            self.end
                        ),
                    ),
                ));
            };
            let length = piece.len() as u64;
            if answer.skip >= length {
                answer.skip -= length;
                continue;
            }
            // at most the piece's own length, which is a usize
            let _ = piece.split_to(usize::try_from(answer.skip).unwrap_or(usize::MAX));
            answer.skip = 0;
            // more than was asked for is left where it is
            let room = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
            piece.truncate(room);
            if piece.is_empty() {
                continue;
            }
            self.position += piece.len() as u64;
            self.answer = Some(answer);
            return Ok(piece);
        }
    }

    /// Requests the missing bytes, and checks that the answer has them.
    async fn ask(&mut self) -> Result<RangeAnswer, Failure> {
        loop {
            // the whole blob needs no range, until it breaks off
            let is_all = self.position == 0 && self.size == Some(self.end);
            let wanted = Wanted {
                range: (!self.whole && !is_all).then_some(self.position..self.end),
                length: Some(self.end - self.position),
                ..Wanted::default()
            };
            let body = self.client.get_blob(&self.digest, &wanted).await?;
            match body.head().status() {
                StatusCode::PARTIAL_CONTENT => {
                    if let Some(answer) = self.partial(body)? {
                        return Ok(answer);
                    }
                }
                // the server presents a part as the whole: its own statement about the part is used
                StatusCode::OK if is_part(&body, wanted.range.is_some()) => {
                    if let Some(answer) = self.partial(body)? {
                        return Ok(answer);
                    }
                }
                StatusCode::OK => {
                    self.ignores_ranges |= wanted.range.is_some();
                    if let Some(length) = body.head().content_length() {
                        self.check_size(length, &body)?;
                    }
                    return Ok(RangeAnswer {
                        body,
                        skip: self.position,
                        part: None,
                    });
                }
                StatusCode::RANGE_NOT_SATISFIABLE if !self.whole => {
                    if let Some(ContentRange::Unsatisfied { total }) =
                        body.header("content-range").and_then(ContentRange::parse)
                    {
                        self.check_size(total, &body)?;
                    }
                    // the server does not accept this form of range, or does not say what is wrong: a request for the whole blob will show
                    // it
                    self.whole = true;
                }
                _ => return Err(self.client.refuse(body).await),
            }
        }
    }

    /// Handles a part: the answer if it is the requested one, `None` to ask again. A 206 must begin at the position; a 200 with a
    /// `Content-Range` must only include it.
    fn partial(&mut self, body: Body) -> Result<Option<RangeAnswer>, Failure> {
        let said = body.header("content-range");
        let range = said.and_then(ContentRange::parse);
        if let Some(ContentRange::Bytes { start, end, total }) = range {
            if let Some(total) = total {
                self.check_size(total, &body)?;
            }
            let is_wanted = match body.head().status() {
                StatusCode::OK => {
                    let length = body.head().content_length();
                    (start..end).contains(&self.position)
                        && length.is_none_or(|length| length == end - start)
                }
                _ => start == self.position,
            };
            if is_wanted {
                self.wrong_ranges = 0;
                let skip = self.position - start;
                let part = Some(start..end);
                return Ok(Some(RangeAnswer { body, skip, part }));
            }
        }
        self.wrong_ranges += 1;
        if self.wrong_ranges >= WRONG_RANGES && !self.whole {
            self.whole = true;
            return Ok(None);
        }
        // also multipart/byteranges, which has no Content-Range of its own and was not requested
        let said: String = said.unwrap_or("nothing").chars().take(80).collect();
        Err(Failure::passing(
            RetryReason::Answer,
            Error::new(
                Kind::Corrupt,
                format!(
                    "{} was asked for bytes {}-{}, but sent a range of {said:?}",
                    body.host(),
                    self.position,
                    self.end - 1
                ),
            ),
        ))
    }

    /// Compares the size of the blob according to the server with the known one.
    fn check_size(&self, said: u64, body: &Body) -> Result<(), Failure> {
        match self.size {
            Some(size) if size != said => Err(Failure::Final(Error::new(
                Kind::Corrupt,
                format!(
                    "{} has {said} bytes of it, but its size in the manifest is {size}{}",
                    body.host(),
                    body.packed()
                ),
            ))),
            None if said < self.end => Err(Failure::Final(Error::new(
                Kind::Corrupt,
                format!(
                    "{} has {said} bytes of it, but byte {} was requested",
                    body.host(),
                    self.end - 1
                ),
            ))),
            _ => Ok(()),
        }
    }
}

/// Whether a 200 is a part of the blob according to its `Content-Range`. If no part was requested, a `Content-Range` without one is
/// ignored.
fn is_part(body: &Body, asked_for_part: bool) -> bool {
    body.header("content-range").is_some_and(|said| {
        asked_for_part || matches!(ContentRange::parse(said), Some(ContentRange::Bytes { .. }))
    })
}
