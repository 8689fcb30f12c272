//! Reading of content in order, across failures of containerd.

use std::{ops::Range, time::Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{BoxStream, StreamExt as _, try_unfold};
use tokio::time::sleep;

use super::{
    Containerd,
    channel::{Waits, number},
    proto::content::{ReadContentRequest, ReadContentResponse},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
};

impl Containerd {
    /// A range of a blob: exactly these bytes, not verified.
    pub(in crate::source) async fn range(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let mut reader = Reader::new(self, digest, range);
        let Some(first) = reader.next().await? else {
            return Ok(Bytes::new());
        };
        if first.len() as u64 == length {
            return Ok(first);
        }
        let mut bytes = BytesMut::from(first);
        while let Some(piece) = reader.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    /// A range of a blob in order, as it comes, not verified. Ends after exactly these bytes or with an error.
    pub(in crate::source) fn pieces(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> BoxStream<'static, Result<Bytes>> {
        let reader = Reader::new(self, digest, range);
        try_unfold(reader, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        })
        .boxed()
    }

    /// A whole blob of this size from an offset on, not verified.
    pub(in crate::source) async fn stream(
        &self,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        self.size(digest, Some(size)).await?;
        Ok(self.pieces(digest, offset..size))
    }
}

/// A blob that is being read. If containerd fails, it is asked again for the rest, until nothing has come for the time of
/// [`Limits::data_patience`](crate::source::Limits).
struct Reader {
    from: Containerd,
    digest: Digest,
    at: u64,
    end: u64,
    answer: Option<tonic::Streaming<ReadContentResponse>>,
    since: Instant,
    waits: Waits,
}

impl Reader {
    fn new(from: &Containerd, digest: &Digest, range: Range<u64>) -> Self {
        Self {
            from: from.clone(),
            digest: *digest,
            at: range.start,
            end: range.end,
            answer: None,
            since: Instant::now(),
            waits: Waits::default(),
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.at < self.end {
            let error = match self.piece().await {
                Ok(piece) if piece.is_empty() => continue,
                Ok(piece) => {
                    self.at = self.at.saturating_add(piece.len() as u64); // at most the end
                    self.since = Instant::now();
                    return Ok(Some(piece));
                }
                Err(error) => error,
            };
            self.answer = None;
            let patience = self.from.limits.data_patience;
            if error.kind() != Kind::Unavailable || self.since.elapsed() > patience {
                return Err(match error.kind() {
                    Kind::NotFound => self.from.missing(&self.digest),
                    _ => error.context(format!("reading blob {} of containerd", self.digest)),
                });
            }
            sleep(self.waits.next()).await;
        }
        Ok(None)
    }

    async fn piece(&mut self) -> Result<Bytes> {
        let channel = &self.from.channel;
        let answer = match &mut self.answer {
            Some(answer) => answer,
            None => {
                let request = ReadContentRequest {
                    digest: self.digest.to_string(),
                    offset: number(self.at)?,
                    size: number(self.end.saturating_sub(self.at))?,
                };
                let request = self.from.request(request).await?;
                let mut content = self.from.content();
                let answer = channel.answer(content.read(request)).await?;
                self.answer.insert(answer)
            }
        };
        let context = |text: &str| {
            let text = format!("{text} at byte {} of {}", self.at, self.end);
            Error::new(Kind::Corrupt, text)
        };
        let Some(message) = channel.next(answer).await? else {
            return Err(context("it ended"));
        };
        let left = self.end.saturating_sub(self.at);
        // the offsets of messages begin with 0 at the requested one, so they say nothing
        if message.data.len() as u64 > left {
            return Err(context("containerd sent more bytes"));
        }
        Ok(message.data.into())
    }
}
