//! Refusals: their meaning, and the explanations in their bodies.

use std::time::{Duration, SystemTime};

use reqwest::{Response, StatusCode, header};

use super::retry::{Failure, parse_retry_after};
use crate::{
    error::{Error, Kind},
    metrics::RetryReason,
};

/// Maximum number of bytes of a refusal's body that are read.
const MAX_BODY: usize = 16 << 10;
/// A body that takes longer is done without.
const BODY_TIME: Duration = Duration::from_secs(3);
/// Maximum length of the server's explanation in a message.
const MAX_SHOWN: usize = 300;

/// An answer with a status other than success.
#[derive(Clone)]
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
    errors: Vec<RefusalEntry>,
}

#[derive(serde::Deserialize)]
#[serde(default)]
#[derive(Default)]
struct RefusalEntry {
    code: String,
    message: String,
}

impl RefusalEntry {
    /// The error of a store that answers like S3: `<Error><Code>...</Code><Message>...</Message></Error>`.
    fn of_xml(text: &str) -> Self {
        let element = |start: &str, end: &str| {
            let (_, rest) = text.split_once(start)?;
            Some(rest.split_once(end)?.0.to_owned())
        };
        Self {
            code: element("<Code>", "</Code>").unwrap_or_default(),
            message: element("<Message>", "</Message>").unwrap_or_default(),
        }
    }
}

impl Refusal {
    /// Reads the explanation in the answer, as far as it is short and arrives quickly.
    pub(super) async fn read(mut response: Response) -> Self {
        Self::peek(&mut response).await
    }

    /// As [`Self::read`], for an answer that may be read as a refusal later again.
    pub(super) async fn peek(response: &mut Response) -> Self {
        if let Some(read) = response.extensions().get::<Self>() {
            return read.clone();
        }
        let refusal = Self::of(response).await;
        response.extensions_mut().insert(refusal.clone());
        refusal
    }

    async fn of(response: &mut Response) -> Self {
        let status = response.status();
        let text = |name| {
            let value: &header::HeaderValue = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let retry_after =
            text(header::RETRY_AFTER).and_then(|text| parse_retry_after(&text, SystemTime::now()));
        let media_type = text(header::CONTENT_TYPE).unwrap_or_default();
        let is_xml = media_type.contains("xml");
        let host = host_of(response.url());
        let mut body = Vec::new();
        if (is_xml || media_type.contains("json")) && status != StatusCode::RANGE_NOT_SATISFIABLE {
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
        let entries = match is_xml {
            true => vec![RefusalEntry::of_xml(&String::from_utf8_lossy(&body))],
            false => serde_json::from_slice::<Body>(&body)
                .map(|body| body.errors)
                .unwrap_or_default(),
        };
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

    /// Whether it is about credentials or a signature that have expired: Amazon's registry reports this with 403, its storage with 403 or
    /// 400.
    pub(super) fn is_about_expiry(&self) -> bool {
        let is_status = matches!(
            self.status,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST
        );
        let mut words = self.codes.iter().chain([&self.message]);
        is_status && words.any(|words| words.to_lowercase().contains("expired"))
    }

    /// Whether it is about the credentials of the request.
    pub(super) fn is_about_credentials(&self) -> bool {
        self.is_about_expiry()
            || matches!(
                self.status,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
            )
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
                reason: match self.retry_after {
                    None if self.status != StatusCode::TOO_MANY_REQUESTS => RetryReason::Status,
                    _ => RetryReason::Pause,
                },
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
    fn words_of_an_error_in_xml() {
        let text = "<?xml version=\"1.0\"?>\n<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><Token-0>secret</Token-0></Error>";
        let entry = RefusalEntry::of_xml(text);
        assert_eq!(entry.code, "ExpiredToken");
        assert_eq!(entry.message, "The provided token has expired.");
        for text in [
            "",
            "<Code>",
            "<Code>open",
            "</Code><Code>",
            "<html>403</html>",
        ] {
            let entry = RefusalEntry::of_xml(text);
            assert!(entry.code.is_empty() && entry.message.is_empty(), "{text}");
        }
    }

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
