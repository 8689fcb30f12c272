//! The write of one blob: a stream of messages with an answer to each.

use std::{
    collections::HashMap,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, stream::StreamExt as _};
use tokio::sync::mpsc;

use super::{
    Containerd,
    channel::{number, of_status},
    proto::content::{WriteAction, WriteContentRequest, WriteContentResponse},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
    source::registry::Outgoing,
};

/// Bytes of one message.
const PIECE_BYTES: usize = 1 << 20;
/// For the end of a write, when containerd syncs the blob.
const COMMIT: Duration = Duration::from_secs(600);

/// The name of the write of a blob.
pub(super) fn ingest(digest: &Digest) -> String {
    format!("socinbd-{digest}")
}

/// A receiver of a blob's bytes, which gets each once.
#[derive(Default)]
pub(super) struct Listener {
    pub(super) seen: u64,
    pub(super) sender: Option<mpsc::Sender<Bytes>>,
}

impl Listener {
    /// Takes a piece that starts at this offset of the blob.
    async fn take(&mut self, offset: u64, piece: &Bytes) {
        let known = usize::try_from(self.seen.saturating_sub(offset)).unwrap_or(usize::MAX);
        if known >= piece.len() {
            return;
        }
        self.seen = offset.saturating_add(piece.len() as u64); // at most the blob's size
        if let Some(sender) = &self.sender
            && sender.send(piece.slice(known..)).await.is_err()
        {
            self.sender = None; // it has failed, and says so itself
        }
    }
}

/// The messages of a write, as they are sent. A type of its own: the compiler cannot prove that a future with another stream in it is `Send`.
struct Messages(mpsc::Receiver<WriteContentRequest>);

impl Stream for Messages {
    type Item = WriteContentRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// The write of a blob.
pub(super) struct Session<'a> {
    to: &'a Containerd,
    messages: mpsc::Sender<WriteContentRequest>,
    answers: tonic::Streaming<WriteContentResponse>,
    /// The number of bytes that containerd has.
    pub(super) offset: u64,
}

impl<'a> Session<'a> {
    pub(super) async fn begin(to: &'a Containerd, blob: Outgoing<'_>) -> Result<Self> {
        let (messages, receiver) = mpsc::channel(1);
        let first = message(blob, WriteAction::Stat, 0, Bytes::new())?;
        let _ = messages.try_send(first); // there is room for one
        let request = to.request(Messages(receiver)).await?;
        let mut content = to.content();
        let answers = to.channel.answer(content.write(request)).await?;
        let mut session = Self {
            to,
            messages,
            answers,
            offset: 0,
        };
        let answer = to.channel.next(&mut session.answers).await?;
        let offset = answer.map_or(0, |answer| answer.offset);
        session.offset = u64::try_from(offset).unwrap_or(0);
        Ok(session)
    }

    /// Sends the rest of the blob from the offset on, and ends the write.
    pub(super) async fn send(
        &mut self,
        blob: Outgoing<'_>,
        labels: &HashMap<String, String>,
        listener: &mut Listener,
    ) -> Result<()> {
        let mut pieces = (blob.feed)(self.offset).await?;
        while self.offset < blob.size {
            let Some(piece) = pieces.next().await else {
                break;
            };
            let mut piece = piece?;
            listener.take(self.offset, &piece).await;
            while !piece.is_empty() {
                let part = piece.split_to(piece.len().min(PIECE_BYTES));
                let next = self.offset.saturating_add(part.len() as u64);
                if next > blob.size {
                    return Err(other_size(blob, "more"));
                }
                let message = message(blob, WriteAction::Write, self.offset, part)?;
                let answer = self.exchange(message, self.to.limits.stall).await?;
                if u64::try_from(answer.offset) != Ok(next) {
                    let text = format!("containerd has {} bytes, not {next}", answer.offset);
                    return Err(Error::new(Kind::Unavailable, text));
                }
                self.offset = next;
            }
        }
        if self.offset < blob.size {
            return Err(other_size(blob, "fewer"));
        }
        let mut message = message(blob, WriteAction::Commit, blob.size, Bytes::new())?;
        message.labels.clone_from(labels);
        self.exchange(message, COMMIT).await.map(drop)
    }

    async fn exchange(
        &mut self,
        message: WriteContentRequest,
        limit: Duration,
    ) -> Result<WriteContentResponse> {
        let exchanged = async {
            // if it is not taken, the answer has the reason
            let _ = self.messages.send(message).await;
            self.answers.message().await
        };
        match tokio::time::timeout(limit, exchanged).await {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Ok(None)) => Err(Error::new(
                Kind::Unavailable,
                "containerd ended the write without a reason",
            )),
            Ok(Err(status)) => Err(of_status(status)),
            Err(_) => Err(self.to.channel.silent()),
        }
    }
}

fn other_size(blob: Outgoing<'_>, what: &str) -> Error {
    let text = format!("its source sent {what} than its {} bytes", blob.size);
    Error::new(Kind::Corrupt, text)
}

fn message(
    blob: Outgoing<'_>,
    action: WriteAction,
    offset: u64,
    data: Bytes,
) -> Result<WriteContentRequest> {
    Ok(WriteContentRequest {
        action: action.into(),
        r#ref: ingest(blob.digest),
        total: number(blob.size)?,
        expected: blob.digest.to_string(),
        offset: number(offset)?,
        data: data.into(),
        ..WriteContentRequest::default()
    })
}
