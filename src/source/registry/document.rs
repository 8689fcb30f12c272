//! Small JSON documents of a registry: manifests, and lists of referrers.

mod link;

use bytes::{Bytes, BytesMut};
use reqwest::{StatusCode, header::HeaderValue};
use url::Url;

use super::{
    client::{Client, Wanted},
    refusal::Refusal,
    retry::{Failure, Tries},
};
use crate::error::{Error, Kind, Result};

/// Maximum size of a manifest, as registries accept it.
const MAX_DOCUMENT: usize = 4 << 20;

/// A document as it came.
pub(super) struct Document {
    /// `Content-Type` without parameters, in lower case; empty if it is missing.
    pub(super) content_type: String,
    /// `Docker-Content-Digest`.
    pub(super) digest: Option<String>,
    /// All `Link`s.
    pub(super) links: Vec<HeaderValue>,
    /// `OCI-Filters-Applied`.
    pub(super) filters: String,
    /// What [`Body::packed`](super::transport::Body::packed) says.
    pub(super) packed: String,
    pub(super) bytes: Bytes,
}

impl Document {
    /// The next page of a list; an error if the header is malformed or leads to another host.
    pub(super) fn next_page(&self, client: &Client, at: &Url, what: &str) -> Result<Option<Url>> {
        let corrupt = |why: &str| Error::new(Kind::Corrupt, format!("{what}: {why}"));
        for header in &self.links {
            let next = header
                .to_str()
                .map_err(|_| link::Unreadable)
                .and_then(link::next_target)
                .map_err(|link::Unreadable| corrupt("its Link header is malformed"))?;
            if let Some(target) = next {
                return match at.join(target) {
                    Ok(next) if client.is_own(&next) => Ok(Some(client.with_namespace(next))),
                    _ => Err(corrupt("its list continues on another host")),
                };
            }
        }
        Ok(None)
    }
}

/// The answer of a registry to a request for a document.
pub(super) enum Answer {
    Document(Document),
    /// 204: no document.
    Nothing,
    /// A refusal that may tell the caller what the registry has; credentials are not the reason.
    Refused(Refusal),
}

/// Gets a document. Tries again inside.
pub(super) async fn get(
    client: &Client,
    url: &Url,
    accept: &'static str,
    what: &str,
) -> Result<Answer> {
    let _waiting = client.activity.wait();
    let mut tries = Tries::new(what, client.limits.control_patience);
    let wanted = Wanted {
        accept: Some(accept),
        ..Wanted::default()
    };
    loop {
        match try_get(client, url, &wanted).await {
            // a hasty no is asked again, and is a no in the end
            Ok(Answer::Refused(refusal)) if refusal.is_passing() => {
                if tries.after(refusal.failure()).await.is_err() {
                    return Ok(Answer::Refused(refusal));
                }
            }
            Ok(answer) => {
                client.activity.completed();
                return Ok(answer);
            }
            Err(failure) => tries.after(failure).await?,
        }
    }
}

async fn try_get(client: &Client, url: &Url, wanted: &Wanted) -> Result<Answer, Failure> {
    let mut body = client.ask(url, wanted).await?;
    match body.head().status() {
        StatusCode::OK => {}
        StatusCode::NO_CONTENT => return Ok(Answer::Nothing),
        // about credentials or haste
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS => {
            return Err(client.refuse(body).await);
        }
        status if status.is_client_error() || status == StatusCode::NOT_IMPLEMENTED => {
            return Ok(Answer::Refused(Refusal::read(body.into_response()).await));
        }
        _ => return Err(client.refuse(body).await),
    }
    let text = |name| body.header(name).unwrap_or("").trim().to_owned();
    let content_type = text("content-type");
    let mut document = Document {
        content_type: content_type
            .split(';')
            .next()
            .unwrap_or("")
            .trim()
            .to_ascii_lowercase(),
        digest: body.header("docker-content-digest").map(str::to_owned),
        links: body
            .head()
            .headers()
            .get_all("link")
            .iter()
            .cloned()
            .collect(),
        filters: text("oci-filters-applied"),
        packed: body.packed(),
        bytes: Bytes::new(),
    };
    let mut bytes = BytesMut::new();
    while let Some(piece) = body.next().await? {
        if bytes.len() + piece.len() > MAX_DOCUMENT {
            return Err(Failure::Final(Error::new(
                Kind::Corrupt,
                format!("{} sent more than {MAX_DOCUMENT} bytes", body.host()),
            )));
        }
        bytes.extend_from_slice(&piece);
    }
    document.bytes = bytes.freeze();
    Ok(Answer::Document(document))
}
