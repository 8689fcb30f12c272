//! Refusals: their meaning, and the explanations in their bodies.

use std::time::{Duration, SystemTime};

use reqwest::{Response, StatusCode, header};

use super::retry::{Failure, parse_retry_after};
use crate::error::{Error, Kind};

/// Maximum number of bytes of a refusal's body that are read.
const MAX_BODY: usize = 16 << 10;
/// A body that takes longer is done without.
const BODY_TIME: Duration = Duration::from_secs(3);
/// Maximum length of the server's explanation in a message.
const MAX_SHOWN: usize = 300;

/// An answer with a status other than success.
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    /// The host that answered, without path and query.
    host: String,
    /// The codes of an OCI error body, e.g. `NAME_UNKNOWN`.
    codes: Vec<String>,
    /// Its first message.
    message: String,
    retry_after: Option<Duration>,
}

#[derive(serde::Deserialize)]
struct Body {
    errors: Vec<Entry>,
}

#[derive(serde::Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Entry {
    code: String,
    message: String,
}

impl Refusal {
    /// Reads the explanation in the answer, as far as it is short and arrives quickly.
    pub(super) async fn read(mut response: Response) -> Self {
        let status = response.status();
        let text = |name| {
            let value: &header::HeaderValue = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let retry_after =
            text(header::RETRY_AFTER).and_then(|text| parse_retry_after(&text, SystemTime::now()));
        let is_json = text(header::CONTENT_TYPE).is_some_and(|of| of.contains("json"));
        let host = host_of(response.url());
        let mut body = Vec::new();
        if is_json && status != StatusCode::RANGE_NOT_SATISFIABLE {
            let read = async {
                while let Ok(Some(piece)) = response.chunk().await {
                    let room = MAX_BODY - body.len();
                    body.extend_from_slice(&piece[..piece.len().min(room)]);
                    if body.len() == MAX_BODY {
                        break;
                    }
                }
            };
            // too slow is the same as absent
            let _ = tokio::time::timeout(BODY_TIME, read).await;
        }
        let entries = serde_json::from_slice::<Body>(&body)
            .map(|body| body.errors)
            .unwrap_or_default();
        Self {
            status,
            host,
            message: entries
                .first()
                .map(|entry| presentable(&entry.message))
                .unwrap_or_default(),
            codes: entries
                .into_iter()
                .take(8)
                .map(|entry| presentable(&entry.code))
                .collect(),
            retry_after,
        }
    }

    /// Whether the same request may work later.
    pub(super) fn is_passing(&self) -> bool {
        match self.status {
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => true,
            StatusCode::NOT_IMPLEMENTED => false,
            status => status.is_server_error(),
        }
    }

    /// Whether it is about expired credentials: some registries (Amazon's) report this with 403 instead of 401.
    pub(super) fn is_about_expiry(&self) -> bool {
        self.status == StatusCode::FORBIDDEN && self.message.contains("expired")
    }

    /// How long the server asks to be left alone before the same request may work.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        self.retry_after.filter(|_| self.is_passing())
    }

    /// Whether it is about an existing tag that cannot be replaced. Registries have no common code or status for it: Amazon's answers 400
    /// with `TAG_INVALID`, Harbor 412 with `PRECONDITION`, Docker's 403 with `DENIED`, Quay 409; but each has it in its text.
    fn is_about_immutable_tag(&self) -> bool {
        let is_refusal = self.status.is_client_error()
            && !matches!(
                self.status,
                StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND | StatusCode::TOO_MANY_REQUESTS
            );
        let words = self.message.to_lowercase();
        let code = |word: &str| {
            self.codes
                .iter()
                .any(|code| code.to_lowercase().contains(word))
        };
        is_refusal
            && (words.contains("immutable")
                || words.contains("cannot be overwritten")
                || code("immutable")
                || code("tagalreadyexists"))
    }

    pub(super) fn kind(&self) -> Kind {
        match self.status {
            _ if self.is_about_immutable_tag() => Kind::Immutable,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Kind::Unauthorized,
            StatusCode::NOT_FOUND | StatusCode::GONE => Kind::NotFound,
            _ if self.is_passing() => Kind::Unavailable,
            _ => Kind::Unsupported,
        }
    }

    /// `404 Not Found from 127.0.0.1:5000 (MANIFEST_UNKNOWN: no such manifest)`.
    pub(super) fn error(&self) -> Error {
        let mut text = format!("{} from {}", self.status, self.host);
        let said = [self.codes.first().map_or("", String::as_str), &self.message];
        let said: Vec<&str> = said.into_iter().filter(|part| !part.is_empty()).collect();
        if !said.is_empty() {
            text.push_str(&format!(" ({})", said.join(": ")));
        }
        Error::new(self.kind(), text)
    }

    /// Whether the body is an error of the specification's form.
    pub(super) fn is_explained(&self) -> bool {
        self.codes.iter().any(|code| !code.is_empty()) || !self.message.is_empty()
    }

    /// Whether the body has this code of the specification.
    pub(super) fn has_code(&self, code: &str) -> bool {
        self.codes.iter().any(|known| known == code)
    }

    pub(super) fn failure(&self) -> Failure {
        match self.is_passing() {
            true => Failure::Passing {
                error: self.error(),
                after: self.retry_after,
            },
            false => Failure::Final(self.error()),
        }
    }
}

/// Host and port of a URL: the only parts that may appear in an error.
pub(super) fn host_of(url: &url::Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => "?".to_owned(),
    }
}

/// The server's explanation as one short line. Queries are left out, because they may have a signature.
fn presentable(text: &str) -> String {
    let mut shown = String::new();
    for word in text.split_whitespace() {
        let word = word.split('?').next().unwrap_or(word);
        if shown.len() + word.len() >= MAX_SHOWN {
            shown.push_str(" ...");
            break;
        }
        if !shown.is_empty() {
            shown.push(' ');
        }
        shown.extend(word.chars().filter(|letter| !letter.is_control()));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_words_are_short_and_without_signatures() {
        assert_eq!(presentable("no\n such\tthing\u{7}"), "no such thing");
        assert_eq!(
            presentable("see https://x/y?signature=abc for more"),
            "see https://x/y for more"
        );
        assert!(presentable(&"word ".repeat(1000)).len() <= MAX_SHOWN + 4);
        assert!(presentable(&"w".repeat(100_000)).len() <= MAX_SHOWN + 4);
    }
}
