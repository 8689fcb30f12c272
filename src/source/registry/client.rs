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
use reqwest::{
    Method, Request, StatusCode, header,
    header::{HeaderMap, HeaderValue},
};
use url::Url;

use super::{
    activity::Activity,
    auth::{Authenticator, Authorization, Purpose, challenge::Challenge, renewals::Renewals},
    refusal::{Refusal, host_of},
    retry::{Failure, LONGEST_RETRY_AFTER},
    transport::{Body, DOCUMENT, Transport},
};
use crate::{
    error::{Error, Kind, Result},
    metrics::RetryReason,
    oci::Digest,
    source::{Access, Limits, hosts::RegistryHost},
};

const MAX_REDIRECTS: usize = 8;
/// The parameter with which containerd tells a mirror the registry.
const NAMESPACE: &str = "ns";
/// An image has a few dozen layers; a signed URL is about a kilobyte.
const MAX_TARGETS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// The client of one repository at one host.
pub(super) struct Client {
    /// `HOST/REPOSITORY` of the registry, and the mirror, for errors.
    name: String,
    host: RegistryHost,
    /// `https://HOST/v2/REPOSITORY/`.
    base: Url,
    pub(super) limits: Limits,
    transport: Arc<Transport>,
    pub(super) activity: Arc<Activity>,
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
    /// The length of the body, where it is known.
    pub(super) length: Option<u64>,
    /// The content: media type and bytes. It may be sent more than once.
    pub(super) content: Option<(String, Bytes)>,
}

impl Client {
    pub(super) fn new(
        host: RegistryHost,
        registry: &str,
        repository: &str,
        access: &Access,
        mut limits: Limits,
        purpose: Purpose,
    ) -> Result<Self> {
        let name = match host.is_mirror() {
            true => format!("{registry}/{repository} (at {})", host.name()),
            false => format!("{registry}/{repository}"),
        };
        let base = host.root.join(&format!("{repository}/")).map_err(|error| {
            Error::with_source(
                Kind::InvalidArgument,
                format!("{name} is not valid in a URL"),
                error,
            )
        })?;
        limits.connect = host.connect.unwrap_or(limits.connect);
        let transport = Transport::shared(access, &host.tls, limits);
        Ok(Self {
            name,
            auth: Authenticator::new(host.clone(), repository, access, &transport, purpose),
            host,
            base,
            limits,
            transport,
            activity: Arc::default(),
            targets: Mutex::new(LruCache::new(MAX_TARGETS)),
            resting: Mutex::default(),
        })
    }

    /// The host that it asks.
    pub(super) fn host(&self) -> &RegistryHost {
        &self.host
    }

    /// `HOST/REPOSITORY` of the registry, and the mirror.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A URL of this repository, e.g. of `manifests/latest`.
    pub(super) fn url(&self, below: &str) -> Result<Url> {
        let url = self.base.join(below).map_err(|error| {
            Error::with_source(
                Kind::InvalidArgument,
                format!("{below:?} of {} is not valid in a URL", self.name),
                error,
            )
        })?;
        Ok(self.with_namespace(url))
    }

    /// A URL of this repository with the parameter that tells a mirror which registry is meant.
    pub(super) fn with_namespace(&self, mut url: Url) -> Url {
        if let Some(namespace) = &self.host.namespace
            && !url.query_pairs().any(|(name, _)| name == NAMESPACE)
        {
            url.query_pairs_mut().append_pair(NAMESPACE, namespace);
        }
        url
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
        if is_own {
            self.show(&shown, request.headers_mut());
        }
        let body = self.transport.upload(request, pulse).await?;
        if body.head().status() == StatusCode::UNAUTHORIZED && is_own {
            let challenges = challenges(&body);
            self.auth.answer(Some(&challenges), &shown, false).await?;
            return Err(Failure::passing(
                RetryReason::Status,
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
            // a signed URL that the registry has just given: the next try asks it for another one
            false if refusal.is_about_expiry() => {
                Failure::passing(RetryReason::Status, refusal.error())
            }
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
                let (kind, advice) = self.auth.advice().await;
                Failure::Final(Error::with_source(kind, advice, error))
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
        let mut renewals = Renewals::default();
        let mut redirects = 0;
        loop {
            let is_own = self.is_own(&at);
            let mut body = self.send(&at, wanted, is_own.then_some(&shown)).await?;
            let status = body.head().status();
            let has_expired = is_own
                && shown.header.is_some()
                && may_be_about_expiry(status)
                && Refusal::peek(body.response()).await.is_about_expiry();
            let is_refused = status == StatusCode::UNAUTHORIZED && is_own || has_expired;
            if is_refused
                && (renewals.are_left()
                    || renewals.may_use_others() && self.auth.may_have_others().await)
            {
                let challenges = (!has_expired).then(|| challenges(&body));
                let is_again = renewals.are_own();
                let renewed = self.auth.answer(challenges.as_deref(), &shown, is_again);
                renewals.add(renewed.await?);
                shown = self.auth.current().await;
            } else if status == StatusCode::FORBIDDEN && is_own && shown.header.is_some() {
                self.auth.forget_anonymous(&shown).await;
                let refusal = Refusal::read(body.into_response()).await;
                return Err(self.refuse_at_registry(refusal).await);
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
        if let Some(shown) = shown {
            self.show(shown, headers);
        }
        let length = wanted.length.unwrap_or(DOCUMENT);
        self.transport.send(request, length).await
    }

    /// Adds to a request to the host itself what no other host may see: its configured headers, and the authorization.
    fn show(&self, shown: &Authorization, headers: &mut HeaderMap) {
        for name in self.host.headers.keys() {
            // what a request says itself counts
            if headers.contains_key(name) {
                continue;
            }
            for value in self.host.headers.get_all(name) {
                headers.append(name, value.clone());
            }
        }
        if let Some(value) = &shown.header {
            headers.insert(header::AUTHORIZATION, value.clone());
        }
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
            reason: RetryReason::Pause,
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

/// Statuses with which registries report that credentials have expired, besides 401.
fn may_be_about_expiry(status: StatusCode) -> bool {
    matches!(status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST)
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
