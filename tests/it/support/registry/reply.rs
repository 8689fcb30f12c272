//! Answers.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{Response, StatusCode, body::Frame, header};
use serde_json::{Value, json};
use socinbd::oci::Digest;

pub(super) type Body = BoxBody<Bytes, std::io::Error>;

/// RFC 4648, section 4.
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let mut bits = 0_u32;
        for at in 0..3 {
            bits = bits << 8 | u32::from(three.get(at).copied().unwrap_or(0));
        }
        for at in 0..4 {
            match at <= three.len() {
                true => text.push(ALPHABET[(bits >> (18 - 6 * at) & 63) as usize] as char),
                false => text.push('='),
            }
        }
    }
    text
}

pub(super) fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or("").to_owned()
}

pub(super) fn full(bytes: Bytes) -> Body {
    http_body_util::Full::new(bytes)
        .map_err(|never: Infallible| match never {})
        .boxed()
}

pub(super) fn empty() -> Body {
    full(Bytes::new())
}

pub(super) fn whole(status: u16, content_type: &str, body: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, content_type)
        .body(full(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap_or_else(|_| internal())
}

pub(super) fn refusal(status: u16, code: &str, message: &str) -> Response<Body> {
    let errors = json!({ "errors": [{ "code": code, "message": message }] });
    whole(status, "application/json", &errors.to_string())
}

pub(super) fn redirect(location: &str) -> Response<Body> {
    Response::builder()
        .status(307)
        .header(header::LOCATION, location)
        .body(empty())
        .unwrap_or_else(|_| internal())
}

pub(super) fn created(repository: &str, digest: &Digest) -> Response<Body> {
    Response::builder()
        .status(201)
        .header(header::LOCATION, format!("/v2/{repository}/blobs/{digest}"))
        .header("docker-content-digest", digest.to_string())
        .body(empty())
        .unwrap_or_else(|_| internal())
}

pub(super) fn unsatisfiable(size: u64, said: Option<u64>) -> Response<Body> {
    // the length with no body behind it is docker-registry's: a client that waits for the body hangs
    let mut reply = Response::builder()
        .status(StatusCode::RANGE_NOT_SATISFIABLE)
        .header(header::CONTENT_LENGTH, size);
    if let Some(said) = said {
        reply = reply.header(header::CONTENT_RANGE, format!("bytes */{said}"));
    }
    let never = stream::pending::<Result<Frame<Bytes>, std::io::Error>>();
    let body = BodyExt::boxed(StreamBody::new(never));
    reply.body(body).unwrap_or_else(|_| internal())
}

pub(super) fn internal() -> Response<Body> {
    let mut reply = Response::new(empty());
    *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    reply
}
