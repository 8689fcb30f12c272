//! Blobs and manifests as they are sent: piece by piece, through the link, with the script's faults.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Method, Response, body::Frame, header};

use super::{
    Fault, Shared,
    reply::{Body, empty, internal, redirect, refusal, unsatisfiable, whole},
    request::Asked,
    store::Data,
};

/// Bytes sent at a time, the fewest and the most: small, so that connections share a shaped link fairly.
const PIECE: Range<u64> = 16 << 10..64 << 10;
/// Pieces that a link carries in a second where that is between the two: each costs a wait, and a processor that is busy with waits is
/// not there for who reads.
const PIECES_A_SECOND: u64 = 2000;
/// Time for what was sent to leave, before a connection is cut.
const FLUSH: Duration = Duration::from_millis(20);

impl Shared {
    pub(super) fn manifest(
        self: &Arc<Self>,
        asked: &Asked,
        fault: Option<Fault>,
    ) -> Response<Body> {
        let found = {
            let state = self.state();
            let Some(repository) = state.repositories.get(&asked.repository) else {
                return refusal(404, "NAME_UNKNOWN", "no such repository");
            };
            let digest = asked
                .digest
                .or_else(|| repository.tags.get(&asked.rest).copied());
            digest.and_then(|digest| Some((digest, repository.manifests.get(&digest)?.clone())))
        };
        let Some((digest, (media_type, bytes))) = found else {
            return refusal(404, "MANIFEST_UNKNOWN", "no such manifest");
        };
        let reply = Response::builder()
            .header(header::CONTENT_TYPE, media_type)
            .header(header::CONTENT_LENGTH, bytes.len())
            .header("docker-content-digest", digest.to_string());
        let body = match asked.method {
            Method::HEAD => empty(),
            _ => self.body(asked, Data::Memory(bytes), None, fault),
        };
        reply.body(body).unwrap_or_else(|_| internal())
    }

    pub(super) fn find_blob(&self, asked: &Asked) -> Option<Data> {
        let state = self.state();
        let repository = state.repositories.get(&asked.repository)?;
        repository.blobs.get(&asked.digest?).cloned()
    }

    pub(super) fn blob(self: &Arc<Self>, asked: &Asked, fault: Option<Fault>) -> Response<Body> {
        let Some(data) = self.find_blob(asked) else {
            return refusal(404, "BLOB_UNKNOWN", "no such blob");
        };
        if asked.method == Method::GET {
            let mut state = self.state();
            if let Some(redirects) = state.redirects {
                state.next_number += 1;
                let signature = format!("signature-{}", state.next_number);
                let expiry = Instant::now() + redirects.lifetime;
                state.signatures.insert(signature.clone(), expiry);
                return redirect(&format!(
                    "http://{}/{}/{}?signature={signature}",
                    self.cdn, asked.repository, asked.rest
                ));
            }
        }
        self.bytes_of(asked, data, fault)
    }

    pub(super) fn cdn_blob(
        self: &Arc<Self>,
        asked: &Asked,
        fault: Option<Fault>,
    ) -> Response<Body> {
        {
            let state = self.state();
            let signature = asked.query.get("signature");
            let expiry = signature.and_then(|signature| state.signatures.get(signature));
            if expiry.is_none_or(|expiry| *expiry <= Instant::now()) {
                let status = state
                    .redirects
                    .map_or(403, |redirects| redirects.expired_status);
                // as Amazon's storage
                let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";
                return whole(status, "application/xml", body);
            }
        }
        match self.find_blob(asked) {
            Some(data) => self.bytes_of(asked, data, fault),
            None => refusal(404, "BLOB_UNKNOWN", "no such blob"),
        }
    }

    /// A blob or a range of it.
    pub(super) fn bytes_of(
        self: &Arc<Self>,
        asked: &Asked,
        data: Data,
        fault: Option<Fault>,
    ) -> Response<Body> {
        let size = data.size();
        let mut range = asked.range.clone();
        match &fault {
            Some(Fault::IgnoreRange) => range = None,
            Some(Fault::Unsatisfiable) => return unsatisfiable(size, None),
            _ => {}
        }
        let mut reply = Response::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::ACCEPT_RANGES, "bytes");
        let mut sent = 0..size;
        if let Some(asked_range) = range {
            if asked_range.start >= size {
                return unsatisfiable(size, Some(size));
            }
            sent = asked_range.start..asked_range.end.min(size);
            if let Some(Fault::WrongRange { shift }) = fault {
                sent = (sent.start + shift).min(size - 1)..(sent.end + shift).min(size);
            }
            if let Some(Fault::Part { of }) = fault {
                sent.end = sent.end.min(sent.start + of);
            }
            let said = match &fault {
                Some(Fault::ContentRange(said)) => said.clone(),
                _ => format!("bytes {}-{}/{size}", sent.start, sent.end - 1),
            };
            reply = reply.status(206);
            if !said.is_empty() {
                reply = reply.header(header::CONTENT_RANGE, said);
            }
            if matches!(fault, Some(Fault::Multipart)) {
                reply = Response::builder()
                    .status(206)
                    .header(header::CONTENT_TYPE, "multipart/byteranges; boundary=b");
            }
        }
        let length = match &fault {
            Some(Fault::Truncate { to }) => Some((sent.end - sent.start).min(*to)),
            Some(Fault::TooLong { .. }) => None,
            _ => Some(sent.end - sent.start),
        };
        if let Some(length) = length {
            reply = reply.header(header::CONTENT_LENGTH, length);
        }
        let body = match asked.method {
            Method::HEAD => empty(),
            _ => self.body(asked, data, Some(sent), fault),
        };
        reply.body(body).unwrap_or_else(|_| internal())
    }

    /// A body piece by piece through the link, with the script's fault.
    pub(super) fn body(
        self: &Arc<Self>,
        asked: &Asked,
        data: Data,
        range: Option<Range<u64>>,
        fault: Option<Fault>,
    ) -> Body {
        let range = range.unwrap_or(0..data.size());
        let start = range.start;
        let mut end = range.end;
        match &fault {
            Some(Fault::Truncate { to }) => end = end.min(start.saturating_add(*to)),
            Some(Fault::TooLong { by }) => end = end.saturating_add(*by),
            _ => {}
        }
        let shared = Arc::clone(self);
        let number = asked.number;
        let begin = (start, Instant::now());
        let pieces = stream::try_unfold(begin, move |(at, ready_at)| {
            let (shared, data, fault) = (Arc::clone(&shared), data.clone(), fault.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let rate = shared.state().link.bytes_per_second;
                let piece = (rate / PIECES_A_SECOND).clamp(PIECE.start, PIECE.end);
                let mut until = end.min(at + piece);
                match fault {
                    Some(Fault::Cut { after }) => {
                        if at - start >= after {
                            // hyper drops what it has not flushed yet
                            tokio::time::sleep(FLUSH).await;
                            return Err(std::io::Error::other("cut by script"));
                        }
                        until = until.min(start + after);
                    }
                    Some(Fault::Stall { after }) => {
                        if at - start >= after {
                            std::future::pending::<()>().await;
                        }
                        until = until.min(start + after);
                    }
                    Some(Fault::Drip { bytes, pause }) => {
                        if at > start {
                            tokio::time::sleep(pause).await;
                        }
                        until = until.min(at + bytes.max(1));
                    }
                    _ => {}
                }
                // past the blob's end (a body that is too long): zeros
                let known = until.min(data.size());
                let mut piece = match known > at {
                    true => data.read(at..known)?.to_vec(),
                    false => Vec::new(),
                };
                piece.resize((until - at) as usize, 0);
                if let Some(Fault::WrongByte { at: wrong }) = fault
                    && (at..until).contains(&(start + wrong))
                {
                    piece[(start + wrong - at) as usize] ^= 0x40;
                }
                let carried_at = shared.carry(until - at, ready_at).await;
                if let Some(entry) = shared.state().counters.log.get_mut(number) {
                    entry.bytes += until - at;
                }
                Ok(Some((Frame::data(Bytes::from(piece)), (until, carried_at))))
            }
        });
        BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(pieces)))))
    }
}

/// `BoxBody` wants `Sync`; the lock is never contended, since a body has one reader.
pub(super) struct SyncStream<S>(Mutex<std::pin::Pin<Box<S>>>);

impl<S: stream::Stream> stream::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.as_mut().poll_next(context)
    }
}
