//! One request at a repository. Credentials are sent to the registry alone; redirects are followed by hand, and their targets are kept per
//! blob.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use lru::LruCache;
use reqwest::{Method, Request, StatusCode, header, header::HeaderValue};
use url::Url;

use super::{
    auth::{Authenticator, Authorization, Purpose, challenge::Challenge},
    refusal::{Refusal, host_of},
    retry::{Failure, LONGEST_RETRY_AFTER},
    transport::{Body, Transport},
};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, reference::DOCKER_HUB},
    source::{Access, Limits},
};

/// The host of Docker Hub's API.
const DOCKER_HUB_API: &str = "registry-1.docker.io";
const MAX_REDIRECTS: usize = 8;
/// An image has a few dozen layers; a signed URL is about a kilobyte.
const MAX_TARGETS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// The client of one repository.
pub(super) struct Client {
    /// `HOST/REPOSITORY`, for errors.
    name: String,
    /// `https://HOST/v2/REPOSITORY/`.
    base: Url,
    pub(super) limits: Limits,
    transport: Arc<Transport>,
    auth: Authenticator,
    /// The redirect target of a blob at the registry. It may be a signed URL: it must not reach a log.
    targets: Mutex<LruCache<Digest, Url>>,
    /// Hosts that have asked not to be asked before a time (`Retry-After`).
    resting: Mutex<HashMap<String, Instant>>,
}

/// A request.
#[derive(Clone, Default)]
pub(super) struct Wanted {
    /// GET by default.
    pub(super) method: Method,
    pub(super) accept: Option<&'static str>,
    /// Bytes of the body; `None` is the whole.
    pub(super) range: Option<Range<u64>>,
    /// The content: media type and bytes. It may be sent more than once.
    pub(super) content: Option<(String, Bytes)>,
}

impl Client {
    pub(super) fn new(
        host: &str,
        repository: &str,
        access: &Access,
        limits: Limits,
        purpose: Purpose,
    ) -> Result<Self> {
        let api = match host {
            DOCKER_HUB => DOCKER_HUB_API,
            host => host,
        };
        let scheme = match access.plain_http || (is_loopback(host) && !access.tls) {
            true => "http",
            false => "https",
        };
        let base: Url = format!("{scheme}://{api}/v2/{repository}/")
            .parse()
            .map_err(|error| {
                Error::with_source(
                    Kind::InvalidArgument,
                    format!("{host}/{repository} is not valid in a URL"),
                    error,
                )
            })?;
        let transport = Transport::shared(access, limits);
        Ok(Self {
            name: format!("{host}/{repository}"),
            auth: Authenticator::new(
                host,
                repository,
                scheme == "https",
                access,
                &transport,
                purpose,
            ),
            base,
            limits,
            transport,
            targets: Mutex::new(LruCache::new(MAX_TARGETS)),
            resting: Mutex::default(),
        })
    }

    /// `HOST/REPOSITORY`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A URL of this repository, e.g. of `manifests/latest`.
    pub(super) fn url(&self, below: &str) -> Result<Url> {
        self.base.join(below).map_err(|error| {
            Error::with_source(
                Kind::InvalidArgument,
                format!("{below:?} of {} is not valid in a URL", self.name),
                error,
            )
        })
    }

    /// Whether credentials of this repository may be sent to a URL.
    pub(super) fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// One request at the registry, whatever its answer.
    pub(super) async fn ask(&self, url: &Url, wanted: &Wanted) -> Result<Body, Failure> {
        Ok(self.ask_with_target(url, wanted).await?.0)
    }

    /// Like [`Self::ask`], with a body that can be sent only once: a 401 renews the credentials and is a failure of this try.
    pub(super) async fn upload(
        &self,
        mut request: Request,
        pulse: &super::transport::Pulse,
    ) -> Result<Body, Failure> {
        let is_own = self.is_own(request.url());
        let shown = self.auth.current().await;
        if let Some(value) = shown.header.clone().filter(|_| is_own) {
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        let body = self.transport.upload(request, pulse).await?;
        if body.head().status() == StatusCode::UNAUTHORIZED && is_own {
            self.auth.answer(&challenges(&body), &shown).await?;
            return Err(Failure::passing(
                Refusal::read(body.into_response()).await.error(),
            ));
        }
        Ok(body)
    }

    /// Asks for tokens that let blobs of this repository of the same registry be mounted, too.
    pub(super) async fn also_pull_from(&self, repository: &str) {
        self.auth.also_pull_from(repository).await;
    }

    /// One GET of a blob: where the last redirect of this blob led, else at the registry.
    pub(super) async fn get_blob(&self, digest: &Digest, wanted: &Wanted) -> Result<Body, Failure> {
        let known = self.targets().get(digest).cloned();
        if let Some(target) = known {
            let answer = self.send(&target, wanted, None).await;
            match &answer {
                Ok(body) if is_usable(body.head().status()) => return answer,
                // the signature has ended, or the blob has moved: the registry knows
                Ok(body) if is_stale(body.head().status()) => self.forget(digest, &target),
                // this server has trouble: the next try asks the registry, which may name another
                _ => {
                    self.forget(digest, &target);
                    return answer;
                }
            }
        }
        let url = self
            .url(&format!("blobs/{digest}"))
            .map_err(Failure::Final)?;
        let (body, target) = self.ask_with_target(&url, wanted).await?;
        if let Some(target) = target
            && is_usable(body.head().status())
        {
            self.targets().put(*digest, target);
        }
        Ok(body)
    }

    /// Forgets the redirect target of a blob, because its content was wrong.
    pub(super) fn forget_target(&self, digest: &Digest) {
        self.targets().pop(digest);
    }

    /// The failure of a refused request, with advice if it is about credentials.
    pub(super) async fn refuse(&self, body: Body) -> Failure {
        let by_registry = self.is_own(body.head().url());
        let host = host_of(body.head().url());
        let refusal = Refusal::read(body.into_response()).await;
        if let Some(after) = refusal.retry_after() {
            self.let_rest(host, after);
        }
        match by_registry {
            true => self.refuse_at_registry(refusal).await,
            false => refusal.failure(),
        }
    }

    async fn refuse_at_registry(&self, refusal: Refusal) -> Failure {
        let status = refusal.status;
        let is_explained = refusal.is_explained();
        match refusal.failure() {
            Failure::Final(error) if error.kind() == Kind::Immutable => Failure::Final(error),
            Failure::Final(error)
                if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) =>
            {
                Failure::Final(Error::with_source(
                    Kind::Unauthorized,
                    self.auth.advice().await,
                    error,
                ))
            }
            // the answer of Go's and nginx's servers; a registry that explains its refusal has understood the request
            Failure::Final(error)
                if status == StatusCode::BAD_REQUEST
                    && self.base.scheme() == "http"
                    && !is_explained =>
            {
                Failure::Final(error.context(format!(
                    "{} was asked over plain HTTP; if it needs TLS, use --tls",
                    self.name
                )))
            }
            failure => failure,
        }
    }

    /// The answer, and the URL that it came from if that is not the registry's. Redirects are followed for reads only.
    async fn ask_with_target(
        &self,
        url: &Url,
        wanted: &Wanted,
    ) -> Result<(Body, Option<Url>), Failure> {
        let mut at = url.clone();
        let mut shown = self.auth.current().await;
        let mut renewed = false;
        let mut redirects = 0;
        loop {
            let is_own = self.is_own(&at);
            let body = self.send(&at, wanted, is_own.then_some(&shown)).await?;
            let status = body.head().status();
            if status == StatusCode::UNAUTHORIZED && is_own && !renewed {
                self.auth.answer(&challenges(&body), &shown).await?;
                shown = self.auth.current().await;
                renewed = true;
            } else if status == StatusCode::FORBIDDEN && is_own && shown.header.is_some() {
                let refusal = Refusal::read(body.into_response()).await;
                if renewed || !refusal.is_about_expiry() {
                    return Err(self.refuse_at_registry(refusal).await);
                }
                self.auth.answer_again(&shown).await?;
                shown = self.auth.current().await;
                renewed = true;
            } else if is_redirect(status) && wanted.method == Method::GET {
                redirects += 1;
                if redirects > MAX_REDIRECTS {
                    return Err(Failure::Final(Error::new(
                        Kind::Unavailable,
                        format!("{} redirects more than {MAX_REDIRECTS} times", self.name),
                    )));
                }
                at = next_location(&body, &at).map_err(Failure::Final)?;
            } else {
                // the URL of the registry itself needs credentials, and is not kept
                return Ok((body, (!is_own).then_some(at)));
            }
        }
    }

    async fn send(
        &self,
        url: &Url,
        wanted: &Wanted,
        shown: Option<&Authorization>,
    ) -> Result<Body, Failure> {
        self.may_ask(&host_of(url))?;
        let mut request = Request::new(wanted.method.clone(), url.clone());
        if let Some((media_type, bytes)) = &wanted.content {
            let media_type = HeaderValue::try_from(media_type).map_err(|error| {
                Failure::Final(Error::with_source(
                    Kind::InvalidArgument,
                    "a media type",
                    error,
                ))
            })?;
            request
                .headers_mut()
                .insert(header::CONTENT_TYPE, media_type);
            *request.body_mut() = Some(bytes.clone().into());
        }
        let headers = request.headers_mut();
        // the digests are those of the bytes as they are stored
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        if let Some(accept) = wanted.accept {
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        }
        if let Some(Range { start, end }) = wanted.range {
            let range = format!("bytes={start}-{}", end.saturating_sub(1));
            let range = HeaderValue::try_from(range).map_err(|error| {
                Failure::Final(Error::with_source(Kind::InvalidArgument, "a range", error))
            })?;
            headers.insert(header::RANGE, range);
        }
        if let Some(value) = shown.and_then(|shown| shown.header.clone()) {
            headers.insert(header::AUTHORIZATION, value);
        }
        self.transport.send(request).await
    }

    /// Notes that a host is not to be asked for a while, by whatever reader of this repository.
    fn let_rest(&self, host: String, after: Duration) {
        let now = Instant::now();
        let mut resting = self.resting();
        resting.retain(|_, until| *until > now);
        resting.insert(host, now + after.min(LONGEST_RETRY_AFTER));
    }

    /// An error while a host is not to be asked.
    fn may_ask(&self, host: &str) -> Result<(), Failure> {
        let left = self
            .resting()
            .get(host)
            .and_then(|until| until.checked_duration_since(Instant::now()))
            .filter(|left| !left.is_zero());
        let Some(left) = left else {
            return Ok(());
        };
        Err(Failure::Passing {
            error: Error::new(
                Kind::Unavailable,
                format!(
                    "{host} has asked for a pause of {:.1} s more",
                    left.as_secs_f64()
                ),
            ),
            after: Some(left),
        })
    }

    fn resting(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn targets(&self) -> MutexGuard<'_, LruCache<Digest, Url>> {
        // no panic can leave the cache half changed
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a target, unless another request has found a new one since.
    fn forget(&self, digest: &Digest, stale: &Url) {
        let mut targets = self.targets();
        if targets.peek(digest) == Some(stale) {
            targets.pop(digest);
        }
    }
}

/// Whether the answer belongs to the range and its redirect target may be kept.
fn is_usable(status: StatusCode) -> bool {
    status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE
}

/// The answers to a signed URL that has expired (S3 sends 400 for some tokens), or whose object has moved.
fn is_stale(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410) || is_redirect(status)
}

pub(super) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn challenges(body: &Body) -> Vec<Challenge> {
    body.head()
        .headers()
        .get_all(header::WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(Challenge::parse)
        .collect()
}

/// The target of an answer's `Location`.
pub(super) fn next_location(body: &Body, at: &Url) -> Result<Url> {
    let host = body.host();
    let status = body.head().status();
    let location = body.header("location").ok_or_else(|| {
        let what = match is_redirect(status) {
            true => "redirects",
            false => "begins an upload",
        };
        Error::new(
            Kind::Unavailable,
            format!("{host} {what} ({status}) without a valid Location"),
        )
    })?;
    let mut next = at.join(location).map_err(|error| {
        Error::with_source(
            Kind::Unavailable,
            format!("{host}: its Location is not a URL ({status})"),
            error,
        )
    })?;
    if at.scheme() == "https" && next.scheme() != "https" {
        return Err(Error::new(
            Kind::Unavailable,
            format!(
                "{host} redirects from https to {}://{}: refused",
                next.scheme(),
                host_of(&next)
            ),
        ));
    }
    if !matches!(next.scheme(), "http" | "https") || next.host_str().is_none() {
        return Err(Error::new(
            Kind::Unavailable,
            format!("{host} redirects to {}: URLs: refused", next.scheme()),
        ));
    }
    // reqwest would make credentials of a URL's user part
    let _ = next.set_username("");
    let _ = next.set_password(None);
    next.set_fragment(None);
    Ok(next)
}

/// Whether a reference's host is this machine: there, plain HTTP is the custom, and TLS is asked for ([`Access::tls`]).
fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(inner) => inner.split(']').next().unwrap_or(inner),
        None => host.split(':').next().unwrap_or(host),
    };
    bare == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts() {
        for host in [
            "localhost",
            "localhost:1",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:1",
            "[::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "128.0.0.1",
            "docker.io",
            "[::2]",
            "127.0.0.1.example:1",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
