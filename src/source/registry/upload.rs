//! Uploads of blobs to a registry (OCI distribution 1.1, "Pushing blobs"): found there, mounted from another repository, or sent.
//!
//! A blob is sent in one streamed PUT, which all registries accept. If the connection breaks, the registry is asked how much it has, and
//! the rest is sent; if it has forgotten the upload, a new one begins.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{
    future::BoxFuture,
    stream::{self, BoxStream, StreamExt as _},
};
use reqwest::{Method, Request, StatusCode, header, header::HeaderValue};
use tokio::sync::mpsc;
use url::Url;

use super::{
    client::{Client, Wanted, is_redirect, next_location},
    refusal::Refusal,
    retry::{Failure, Tries},
    transport::{Body, Pulse},
};
use crate::{
    error::{Error, Kind, Result},
    metrics::RetryReason,
    oci::{Digest, digest::Hasher},
    source::Copied,
};

/// Bytes that the connection is given at a time: how finely a stall is seen.
const PIECE: usize = 64 << 10;

/// The bytes of a blob from an offset on.
pub(in crate::source) type Feed<'a> =
    &'a (dyn Fn(u64) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes>>>> + Send + Sync);

/// Bytes in memory from an offset on, as a [`Feed`] gives them.
pub(in crate::source) fn rest_of(
    bytes: &Bytes,
    offset: u64,
) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes>>>> {
    // at most the length, which is a usize
    let rest = bytes.slice(usize::try_from(offset).unwrap_or(bytes.len())..);
    Box::pin(async move { Ok(stream::once(async { Ok(rest) }).boxed()) })
}

/// Starts the receiver of a blob's bytes, which it gets once and in order.
pub(in crate::source) type Tap<'a> = &'a mut (dyn FnMut() -> mpsc::Sender<Bytes> + Send);

/// Whether the repository has a blob.
pub(super) async fn has(client: &Client, digest: &Digest) -> Result<bool> {
    let url = client.url(&format!("blobs/{digest}"))?;
    let what = format!("looking for blob {digest} in {}", client.name());
    let mut tries = Tries::new(what, client.limits.control_patience);
    let wanted = Wanted {
        method: Method::HEAD,
        ..Wanted::default()
    };
    loop {
        let asked = async {
            let body = client.ask(&url, &wanted).await?;
            match body.head().status() {
                // a redirect leads to the blob's bytes
                status if status.is_success() || is_redirect(status) => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(client.refuse(body).await),
            }
        };
        match asked.await {
            Ok(found) => return Ok(found),
            Err(failure) => tries.after(failure).await?,
        }
    }
}

/// A blob to upload to a repository.
#[derive(Clone, Copy)]
pub(in crate::source) struct Outgoing<'a> {
    pub(in crate::source) digest: &'a Digest,
    pub(in crate::source) size: u64,
    /// A repository of the same registry that has it.
    pub(in crate::source) mount: Option<&'a str>,
    pub(in crate::source) feed: Feed<'a>,
}

/// Brings a blob to the repository, by the cheapest way that works.
pub(super) async fn copy(
    client: &Client,
    blob: Outgoing<'_>,
    tap: Option<Tap<'_>>,
) -> Result<Copied> {
    let Outgoing { digest, mount, .. } = blob;
    if has(client, digest).await? {
        return Ok(Copied::Present);
    }
    let mut tries = Tries::new(
        format!("uploading blob {digest} to {}", client.name()),
        client.limits.data_patience,
    );
    if let Some(from) = mount {
        client.also_pull_from(from).await;
    }
    let mut upload = Upload {
        client,
        blob,
        session: None,
        tee: Arc::new(tokio::sync::Mutex::new(Tee::default())),
    };
    let mut tap = tap;
    loop {
        let before = upload.offset();
        let failure = match upload.attempt(&mut tap).await {
            Ok(Copied::Uploaded) => return upload.passed().await,
            Ok(copied) => return Ok(copied),
            Err(failure) => failure,
        };
        tries.after(failure).await?;
        // the answer may have been lost, not the blob
        if has(client, digest).await? {
            return upload.passed().await;
        }
        upload.resume().await;
        if upload.offset() > before {
            tries.progress();
        }
    }
}

struct Upload<'a, 'b> {
    client: &'a Client,
    blob: Outgoing<'b>,
    /// The URL of the next request of the upload, and the number of bytes that the registry has.
    session: Option<(Url, u64)>,
    tee: Arc<tokio::sync::Mutex<Tee>>,
}

/// The other receivers of the bytes, each of which gets them once: the digest, and the tap.
#[derive(Default)]
struct Tee {
    hasher: Hasher,
    seen: u64,
    tap: Option<mpsc::Sender<Bytes>>,
}

impl Tee {
    /// Takes a piece that starts at this offset of the blob.
    async fn take(&mut self, offset: u64, piece: &Bytes) {
        let known = self.seen.saturating_sub(offset);
        let Some(new) = usize::try_from(known)
            .ok()
            .filter(|known| *known < piece.len())
        else {
            return;
        };
        let new = piece.slice(new..);
        self.hasher.update(&new);
        self.seen = self.seen.saturating_add(new.len() as u64);
        if let Some(tap) = &self.tap
            && tap.send(new).await.is_err()
        {
            self.tap = None; // it has failed, and says so itself
        }
    }
}

impl Upload<'_, '_> {
    fn offset(&self) -> u64 {
        self.session.as_ref().map_or(0, |(_, offset)| *offset)
    }

    /// The blob is there: whether all of it has passed here, as it should be. Another client may have been faster with the rest.
    async fn passed(&self) -> Result<Copied> {
        let tee = self.tee.lock().await;
        let found = tee.hasher.clone().finish();
        match tee.seen == self.blob.size {
            true if found == *self.blob.digest => Ok(Copied::Uploaded),
            true => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "blob {}: its source sent content with the digest {found}",
                    self.blob.digest
                ),
            )),
            false => Ok(Copied::Present),
        }
    }

    async fn attempt(&mut self, tap: &mut Option<Tap<'_>>) -> Result<Copied, Failure> {
        let (session, offset) = match self.session.clone() {
            Some(session) => session,
            None => match self.begin().await? {
                Some(session) => (session, 0),
                None => return Ok(Copied::Mounted),
            },
        };
        self.session = Some((session.clone(), offset));
        if let Some(tap) = tap.take() {
            self.tee.lock().await.tap = Some(tap());
        }
        self.send(session, offset).await
    }

    /// Begins an upload. `None` when the blob was mounted instead.
    async fn begin(&mut self) -> Result<Option<Url>, Failure> {
        let mut url = self.client.url("blobs/uploads/").map_err(Failure::Final)?;
        if let Some(from) = self.blob.mount {
            url.query_pairs_mut()
                .append_pair("mount", &self.blob.digest.to_string())
                .append_pair("from", from);
        }
        let wanted = Wanted {
            method: Method::POST,
            content: Some(("application/octet-stream".to_owned(), Bytes::new())),
            ..Wanted::default()
        };
        let body = self.client.ask(&url, &wanted).await;
        // one that may not be mounted can still be sent
        let refused = match &body {
            Ok(body) => body.head().status().is_client_error(),
            Err(Failure::Final(_)) => true,
            Err(Failure::Passing { .. }) => false,
        };
        if refused && self.blob.mount.take().is_some() {
            return Box::pin(self.begin()).await;
        }
        let body = body?;
        match body.head().status() {
            StatusCode::CREATED => Ok(None),
            StatusCode::ACCEPTED => next_location(&body, &url).map(Some).map_err(Failure::Final),
            _ => Err(self.client.refuse(body).await),
        }
    }

    /// Sends the rest of the blob, and ends the upload.
    async fn send(&self, mut session: Url, offset: u64) -> Result<Copied, Failure> {
        session
            .query_pairs_mut()
            .append_pair("digest", &self.blob.digest.to_string());
        let pulse = Arc::new(Pulse::default());
        let source_error = Arc::new(Mutex::new(None));
        let body = Sending {
            pieces: (self.blob.feed)(offset).await.map_err(Failure::Final)?,
            rest: Bytes::new(),
            offset,
            end: self.blob.size,
            tee: Arc::clone(&self.tee),
            pulse: Arc::clone(&pulse),
            error: Arc::clone(&source_error),
        };
        let mut request = Request::new(Method::PUT, session);
        let headers = request.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        headers.insert(
            header::CONTENT_LENGTH,
            HeaderValue::from(self.blob.size.saturating_sub(offset)),
        );
        if offset > 0 {
            let range = format!("{offset}-{}", self.blob.size.saturating_sub(1));
            let range = HeaderValue::try_from(range).map_err(|error| {
                Failure::Final(Error::with_source(Kind::InvalidArgument, "a range", error))
            })?;
            headers.insert(header::CONTENT_RANGE, range);
        }
        *request.body_mut() = Some(reqwest::Body::wrap_stream(body.into_stream()));
        let answer = self.client.upload(request, &pulse).await;
        let of_source = source_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(error) = of_source {
            return Err(Failure::Final(error));
        }
        let body = answer?;
        match body.head().status() {
            status if status.is_success() => Ok(Copied::Uploaded),
            // the upload is forgotten, or has another offset: `resume` finds out
            StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE => Err(Failure::passing(
                RetryReason::Status,
                Refusal::read(body.into_response()).await.error(),
            )),
            StatusCode::BAD_REQUEST => Err(self.bad_request(body).await),
            _ => Err(self.client.refuse(body).await),
        }
    }

    async fn bad_request(&self, body: Body) -> Failure {
        let refusal = Refusal::read(body.into_response()).await;
        let tee = self.tee.lock().await;
        let digest = tee.hasher.clone().finish();
        if tee.seen == self.blob.size && digest != *self.blob.digest {
            return Failure::Final(Error::with_source(
                Kind::Corrupt,
                format!("its source sent content with another digest: {digest}"),
                refusal.error(),
            ));
        }
        refusal.failure()
    }

    /// Asks how far the registry has come; forgets an upload that it does not know.
    async fn resume(&mut self) {
        let Some((session, _)) = self.session.take() else {
            return;
        };
        let Ok(body) = self.client.ask(&session, &Wanted::default()).await else {
            return;
        };
        let status = body.head().status();
        if status != StatusCode::NO_CONTENT && status != StatusCode::ACCEPTED {
            return;
        }
        let next = match body.header("location") {
            Some(_) => next_location(&body, &session).ok(),
            None => Some(session),
        };
        // `0-N`, inclusive; `0-0` means none, or one byte: a new upload is then as good
        let received = body
            .header("range")
            .and_then(|range| range.trim_start_matches("bytes=").strip_prefix("0-"))
            .and_then(|last| last.parse::<u64>().ok())
            .filter(|last| *last > 0)
            .map(|last| last.saturating_add(1));
        let seen = self.tee.lock().await.seen;
        if let (Some(next), Some(received)) = (next, received)
            && received <= seen
            && received < self.blob.size
        {
            self.session = Some((next, received));
        }
    }
}

/// A body on its way out.
struct Sending {
    pieces: BoxStream<'static, Result<Bytes>>,
    rest: Bytes,
    offset: u64,
    end: u64,
    tee: Arc<tokio::sync::Mutex<Tee>>,
    pulse: Arc<Pulse>,
    /// Why the source has failed.
    error: Arc<Mutex<Option<Error>>>,
}

impl Sending {
    fn into_stream(self) -> BoxStream<'static, std::io::Result<Bytes>> {
        stream::unfold(self, |mut body| async move {
            let piece = body.next().await?;
            Some((piece, body))
        })
        .boxed()
    }

    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        if self.rest.is_empty() {
            if self.offset >= self.end {
                self.pulse.set_whole();
                return None;
            }
            self.pulse.set_starved(true);
            let piece = self.pieces.next().await;
            match piece {
                Some(Ok(piece)) => {
                    self.tee.lock().await.take(self.offset, &piece).await;
                    self.rest = piece;
                }
                Some(Err(error)) => {
                    *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Some(Err(std::io::Error::other("the blob's source failed")));
                }
                None => return None, // shorter than said: the length tells the registry
            }
            self.pulse.set_starved(false);
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        self.offset = self.offset.saturating_add(piece.len() as u64);
        self.pulse.add(piece.len() as u64);
        if self.offset >= self.end {
            self.pulse.set_whole();
        }
        Some(Ok(piece))
    }
}
