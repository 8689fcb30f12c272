//! A request, as it is understood.

use std::{collections::HashMap, ops::Range};

use hyper::{Method, Request, body::Incoming, header};
use socinbd::oci::Digest;

use super::Kind;

/// A request as it was understood.
pub(super) struct Asked {
    pub(super) kind: Kind,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) query: HashMap<String, String>,
    pub(super) repository: String,
    /// The part of the path after `manifests/`, `blobs/`, ...
    pub(super) rest: String,
    pub(super) digest: Option<Digest>,
    pub(super) range: Option<Range<u64>>,
    /// The first byte that `Content-Range` of an upload names.
    pub(super) upload_from: Option<usize>,
    pub(super) authorization: Option<String>,
    pub(super) content_type: String,
    pub(super) host: String,
    /// Its number in the log.
    pub(super) number: usize,
}

impl Asked {
    pub(super) fn new(request: &Request<Incoming>, cdn: bool) -> Self {
        let path = percent_encoding::percent_decode_str(request.uri().path())
            .decode_utf8_lossy()
            .into_owned();
        let header = |name: header::HeaderName| {
            let value = request.headers().get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let query = url::form_urlencoded::parse(request.uri().query().unwrap_or("").as_bytes());
        let (mut kind, mut repository, mut rest) = (Kind::Other, String::new(), String::new());
        if cdn {
            kind = Kind::Cdn;
            (repository, rest) = path
                .trim_start_matches('/')
                .rsplit_once('/')
                .map(|(repository, rest)| (repository.to_owned(), rest.to_owned()))
                .unwrap_or_default();
        } else if path == "/token" {
            kind = Kind::Token;
        } else if path == "/v2/" || path == "/v2" {
            kind = Kind::Ping;
        } else if let Some(below) = path.strip_prefix("/v2/") {
            for (word, of) in [
                ("/blobs/uploads", Kind::Upload),
                ("/manifests/", Kind::Manifest),
                ("/blobs/", Kind::Blob),
                ("/referrers/", Kind::Referrers),
                ("/tags/", Kind::Tags),
            ] {
                if let Some(at) = below.rfind(word) {
                    kind = of;
                    repository = below[..at].to_owned();
                    rest = below[at + word.len()..].trim_start_matches('/').to_owned();
                    break;
                }
            }
        }
        Self {
            kind,
            method: request.method().clone(),
            query: query.into_owned().collect(),
            digest: rest.parse().ok(),
            range: header(header::RANGE).and_then(|range| {
                let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
                let start = start.parse().ok()?;
                let end = match end {
                    "" => u64::MAX,
                    end => end.parse::<u64>().ok()?.checked_add(1)?,
                };
                (start < end).then_some(start..end)
            }),
            upload_from: header(header::CONTENT_RANGE)
                .and_then(|range| range.split('-').next()?.parse().ok()),
            authorization: header(header::AUTHORIZATION),
            content_type: header(header::CONTENT_TYPE).unwrap_or_default(),
            host: header(header::HOST).unwrap_or_default(),
            number: 0,
            path,
            repository,
            rest,
        }
    }
}
