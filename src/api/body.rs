//! Bodies of requests and answers.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::{Request, Response, StatusCode, body::Frame};

use crate::error::{Error, Kind, Result, ResultExt};

/// Bytes of a request's body, at most.
const BODY_LIMIT: usize = 1 << 20;
/// Maximum time for receiving a request.
pub(super) const REQUEST_TIME: Duration = Duration::from_secs(30);

/// The body of an answer.
pub type Body = BoxBody<Bytes, Infallible>;

/// Parses the body of a request.
pub(super) async fn read<B, T: serde::de::DeserializeOwned>(request: Request<B>) -> Result<T>
where
    B: hyper::body::Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
    let body = tokio::time::timeout(REQUEST_TIME, body)
        .await
        .or_kind(Kind::InvalidArgument, || "waiting for the request".into())?;
    let body = body
        .map_err(|error| Error::with_source(Kind::InvalidArgument, "reading the request", error))?
        .to_bytes();
    serde_json::from_slice(&body).or_kind(Kind::InvalidArgument, || "reading the request".into())
}

/// An answer that is sent as events happen, each a line of JSON.
pub(super) fn answer_in_lines<T: serde::Serialize>(
    lines: impl Stream<Item = T> + Send + Sync + 'static,
) -> Response<Body> {
    let lines = lines.map(|line| {
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default(); // plain data with string keys always serialises
        bytes.push(b'\n');
        Ok(Frame::data(Bytes::from(bytes)))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(lines)));
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static("application/x-ndjson"),
    );
    response
}

/// An answer of one JSON value.
pub(super) fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    let body = serde_json::to_vec(value).unwrap_or_default(); // plain data with string keys always serialises
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

/// An answer of one text.
pub(super) fn text(content_type: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(text)).boxed());
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static(content_type),
    );
    response
}
