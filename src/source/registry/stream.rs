//! A whole blob in order, with several ranged GETs in parallel.
//!
//! The answer for the first part shows whether the server supports ranges. If it does, up to [`PARALLEL`] parts of [`PART`] bytes are
//! requested in parallel, each in its own task, so that the network does not wait for the reader; this also bounds the memory. If it does
//! not, that first answer is read to its end.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::{sync::mpsc, task::AbortHandle};

use super::{client::Client, reader::Reader};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
};

/// Bytes of one part.
const PART: u64 = 4 << 20;
/// Parts on their way or waiting to be read.
const PARALLEL: usize = 4;

/// The bytes of a blob, in order. Ends after `size` bytes or an error.
pub(super) fn open(
    client: Arc<Client>,
    digest: Digest,
    size: u64,
) -> BoxStream<'static, Result<Bytes>> {
    let start = StreamState::First {
        client,
        digest,
        size,
    };
    stream::unfold(start, |state| async move {
        match state.next().await {
            Ok(Some((bytes, state))) => Some((Ok(bytes), state)),
            Ok(None) => None,
            Err(error) => Some((Err(error), StreamState::Done)),
        }
    })
    .boxed()
}

enum StreamState {
    First {
        client: Arc<Client>,
        digest: Digest,
        size: u64,
    },
    /// One answer for all.
    Single(Box<Reader>),
    Parallel(Parts),
    Done,
}

impl StreamState {
    async fn next(self) -> Result<Option<(Bytes, Self)>> {
        match self {
            Self::First {
                client,
                digest,
                size,
            } => {
                let end = size.min(PART);
                let mut reader = Reader::new(&client, &digest, 0..end, Some(size));
                let Some(bytes) = reader.next().await? else {
                    return Ok(None);
                };
                if reader.ignores_ranges() || end == size {
                    reader.extend(size);
                    return Ok(Some((bytes, Self::Single(Box::new(reader)))));
                }
                let mut parts = Parts {
                    client,
                    digest,
                    size,
                    started: end,
                    waiting: VecDeque::from([Part::start(reader)]),
                };
                parts.start_more();
                Ok(Some((bytes, Self::Parallel(parts))))
            }
            Self::Single(mut reader) => {
                let bytes = reader.next().await?;
                Ok(bytes.map(|bytes| (bytes, Self::Single(reader))))
            }
            Self::Parallel(mut parts) => {
                let bytes = parts.next().await?;
                Ok(bytes.map(|bytes| (bytes, Self::Parallel(parts))))
            }
            Self::Done => Ok(None),
        }
    }
}

struct Parts {
    client: Arc<Client>,
    digest: Digest,
    size: u64,
    /// Start of the next part.
    started: u64,
    waiting: VecDeque<Part>,
}

impl Parts {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        while let Some(part) = self.waiting.front_mut() {
            if let Some(piece) = part.pieces.recv().await {
                return piece.map(Some);
            }
            if !part.is_whole() {
                return Err(Error::new(
                    Kind::Io,
                    format!("reading blob {}: its task ended early", self.digest),
                ));
            }
            self.waiting.pop_front();
            self.start_more();
        }
        Ok(None)
    }

    fn start_more(&mut self) {
        while self.waiting.len() < PARALLEL && self.started < self.size {
            let end = self.size.min(self.started.saturating_add(PART));
            let range = self.started..end;
            let reader = Reader::new(&self.client, &self.digest, range, Some(self.size));
            self.waiting.push_back(Part::start(reader));
            self.started = end;
        }
    }
}

/// A part on its way. Dropping it ends its request.
struct Part {
    /// Unbounded: the pieces of a part have at most its length.
    pieces: mpsc::UnboundedReceiver<Result<Bytes>>,
    whole: Arc<std::sync::atomic::AtomicBool>,
    task: AbortHandle,
}

impl Part {
    fn start(mut reader: Reader) -> Self {
        let (sender, pieces) = mpsc::unbounded_channel();
        let whole = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = Arc::clone(&whole);
        let task = tokio::spawn(async move {
            while let Some(piece) = reader.next().await.transpose() {
                let failed = piece.is_err();
                if sender.send(piece).is_err() || failed {
                    return;
                }
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
        Self {
            pieces,
            whole,
            task: task.abort_handle(),
        }
    }

    /// Whether all of it was sent, rather than its task lost to a panic or to the runtime's end.
    fn is_whole(&self) -> bool {
        self.whole.load(std::sync::atomic::Ordering::Acquire)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.task.abort();
    }
}
