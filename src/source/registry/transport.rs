//! HTTP: connections, TLS, proxies, time limits. It has no knowledge of registries, and follows no redirects.

mod no_proxy;
mod permits;
mod trust;

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{Client, ClientBuilder, NoProxy, Proxy, Request, Response, Url, redirect};
use tokio::{sync::OnceCell, time::timeout};

pub(super) use self::permits::DOCUMENT;
use self::permits::RequestPermit;
pub(crate) use self::permits::{RequestLoad, request_load};
use super::{refusal::host_of, retry::Failure};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt as _},
    metrics::RetryReason,
    source::{
        Limits,
        access::{Access, without_password},
        hosts::host::{DatedFile, TlsFiles},
    },
};

const USER_AGENT: &str = concat!("socinbd/", env!("CARGO_PKG_VERSION"));

/// A body is to bring at least this much in each stall time.
const LEAST_PROGRESS: u64 = 4 << 10;

/// An established connection gets more time than a new one may get from a host's `dial_timeout`.
const LEAST_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// So many stall times a registry may take to answer once it has the whole of a blob: it may be moving gigabytes.
const WHOLE_STALLS: u32 = 20;

/// The connections of all requests with the same network settings.
pub(super) struct Transport {
    way: Way,
    /// For plain HTTP: with the proxies, and without.
    plain: [OnceCell<Client>; 2],
    /// For TLS, as `plain`.
    tls: [OnceCell<Client>; 2],
}

/// All that two users must have in common to share connections.
#[derive(Clone, PartialEq, Eq)]
struct Way {
    limits: Limits,
    https_proxy: Option<String>,
    http_proxy: Option<String>,
    no_proxy: Option<String>,
    /// The certificates of the access and of the host. A file that has changed is read again by the next source that is opened.
    tls: TlsFiles,
}

/// Transports in use. A daemon has as many as its users have different settings: few.
static SHARED: Mutex<Vec<Weak<Transport>>> = Mutex::new(Vec::new());

impl Transport {
    /// The transport for this access, shared with others of the same settings.
    pub(super) fn shared(access: &Access, host: &TlsFiles, limits: Limits) -> Arc<Self> {
        let own = access.ca_certificates.iter().cloned().map(DatedFile::new);
        let way = Way {
            limits,
            https_proxy: access.https_proxy.clone(),
            http_proxy: access.http_proxy.clone(),
            no_proxy: access.no_proxy.clone(),
            tls: TlsFiles {
                ca: own.chain(host.ca.iter().cloned()).collect(),
                ..host.clone()
            },
        };
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|weak| weak.strong_count() > 0);
        for transport in shared.iter().filter_map(Weak::upgrade) {
            if transport.way == way {
                return transport;
            }
        }
        let transport = Arc::new(Self {
            way,
            plain: Default::default(),
            tls: Default::default(),
        });
        shared.push(Arc::downgrade(&transport));
        transport
    }

    /// Sends a request and waits for the head of its answer, whose body has about this length ([`DOCUMENT`]: it is not known). Waits first
    /// while too many requests or bytes are in flight.
    pub(super) async fn send(&self, request: Request, length: u64) -> Result<Body, Failure> {
        let host = host_of(request.url());
        let permit = permits::permit(&host, length).await;
        let client = self.client(request.url()).await.map_err(Failure::Final)?;
        let Limits {
            first_byte, stall, ..
        } = self.way.limits;
        // connecting has its own limit inside
        match timeout(first_byte, client.execute(request)).await {
            Ok(Ok(response)) => Ok(Body {
                // the body of a redirect or a failure is short, and another request follows while it is there
                permit: response.status().is_success().then_some(permit),
                response,
                host,
                pace: Pace::new(stall),
            }),
            Ok(Err(error)) => Err(network_failure(error, &host)),
            Err(_) => Err(Failure::passing(
                RetryReason::Timeout,
                Error::new(
                    Kind::Unavailable,
                    format!(
                        "no answer from {host} within {} s",
                        first_byte.as_secs_f64()
                    ),
                ),
            )),
        }
    }

    /// Sends a request with a long body, as far as it moves: `pulse` tells how far it is. Waits for the head of the answer.
    pub(super) async fn upload(&self, request: Request, pulse: &Pulse) -> Result<Body, Failure> {
        let host = host_of(request.url());
        let client = self.client(request.url()).await.map_err(Failure::Final)?;
        let stall = self.way.limits.stall;
        let answer = client.execute(request);
        tokio::pin!(answer);
        let mut seen = pulse.sent();
        let mut idle_since = Instant::now();
        loop {
            match timeout(stall, &mut answer).await {
                Ok(Ok(response)) => {
                    return Ok(Body {
                        response,
                        host,
                        pace: Pace::new(stall),
                        permit: None,
                    });
                }
                Ok(Err(error)) => return Err(network_failure(error, &host)),
                Err(_) => {}
            }
            // an upload that waits for its source, which has its own time limits, is not blamed on the registry
            let sent = pulse.sent();
            if sent != seen || pulse.is_starved() {
                (seen, idle_since) = (sent, Instant::now());
            }
            let allowed = match pulse.is_whole() {
                true => stall.saturating_mul(WHOLE_STALLS),
                false => stall,
            };
            if idle_since.elapsed() >= allowed {
                return Err(Failure::passing(
                    RetryReason::Timeout,
                    Error::new(
                        Kind::Unavailable,
                        format!(
                            "{host} has accepted no data for {} s",
                            allowed.as_secs_f64()
                        ),
                    ),
                ));
            }
        }
    }

    /// The client for requests to this URL.
    async fn client(&self, url: &Url) -> Result<&Client> {
        let is_direct = no_proxy::names(self.way.no_proxy.as_deref().unwrap_or(""), url);
        let way = usize::from(is_direct);
        match url.scheme() {
            "https" => {
                let make = || self.tls_client(is_direct);
                self.tls[way].get_or_try_init(make).await
            }
            _ => {
                let make = || async { self.plain_client(is_direct) };
                self.plain[way].get_or_try_init(make).await
            }
        }
    }

    fn plain_client(&self, is_direct: bool) -> Result<Client> {
        // TLS is not used here; without a configuration reqwest would load the system's certificates, and fail if there are none
        build(
            self.builder(is_direct)?
                .tls_backend_preconfigured(trust::no_configuration()?),
        )
    }

    async fn tls_client(&self, is_direct: bool) -> Result<Client> {
        let files = self.way.tls.clone();
        let configuration = blocking(move || trust::configuration(&files)).await?;
        build(
            self.builder(is_direct)?
                .tls_backend_preconfigured(configuration),
        )
    }

    fn builder(&self, is_direct: bool) -> Result<ClientBuilder> {
        // HTTP/1.1 alone: HTTP/2 would put parallel ranges on one TCP connection
        let mut builder = Client::builder()
            .no_proxy()
            .http1_only()
            .user_agent(USER_AGENT)
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.way.limits.connect)
            .tcp_keepalive(Duration::from_secs(30))
            // a peer whose machine is gone acknowledges nothing, also on a connection that stood before
            .tcp_user_timeout((self.way.limits.connect * 2).max(LEAST_USER_TIMEOUT));
        if is_direct {
            return Ok(builder);
        }
        // as curl and Go do: hosts on this machine are not reached through a proxy
        let exceptions = format!(
            "localhost,127.0.0.0/8,::1,{}",
            self.way.no_proxy.as_deref().unwrap_or("")
        );
        let http = self
            .way
            .http_proxy
            .as_deref()
            .map(|url| (url, Proxy::http(url)));
        let https = self
            .way
            .https_proxy
            .as_deref()
            .map(|url| (url, Proxy::https(url)));
        for (url, proxy) in [http, https].into_iter().flatten() {
            let proxy = proxy.map_err(|error| {
                let shown = without_password(url);
                Error::with_source(
                    Kind::InvalidArgument,
                    format!("{shown:?} is not a valid proxy URL"),
                    error.without_url(),
                )
            })?;
            builder = builder.proxy(proxy.no_proxy(NoProxy::from_string(&exceptions)));
        }
        Ok(builder)
    }
}

fn build(builder: ClientBuilder) -> Result<Client> {
    builder
        .build()
        .map_err(reqwest::Error::without_url)
        .or_kind(Kind::Io, || "setting up the HTTP client".to_owned())
}

/// How far a request's body is.
#[derive(Default)]
pub(super) struct Pulse {
    sent: AtomicU64,
    starved: AtomicBool,
    whole: AtomicBool,
}

impl Pulse {
    /// So many bytes more were taken by the connection.
    pub(super) fn add(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether the body's own source is being waited for.
    pub(super) fn set_starved(&self, starved: bool) {
        self.starved.store(starved, Ordering::Relaxed);
    }

    /// The body has no more.
    pub(super) fn set_whole(&self) {
        self.whole.store(true, Ordering::Relaxed);
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Relaxed)
    }

    fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Relaxed)
    }
}

/// An answer whose body is still coming.
pub(super) struct Body {
    response: Response,
    host: String,
    pace: Pace,
    permit: Option<RequestPermit>,
}

impl Body {
    /// The head.
    pub(super) fn head(&self) -> &Response {
        &self.response
    }

    /// A header's value, where it is text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// A note for error messages that the response has a content encoding; empty if it has none.
    pub(super) fn packed(&self) -> String {
        match self.header("content-encoding") {
            None | Some("" | "identity") => String::new(),
            Some(encoding) => format!(
                " (it was sent with Content-Encoding: {encoding:?}, which was not requested: a proxy may have compressed it)"
            ),
        }
    }

    /// The answer, to be read without its time limits.
    pub(super) fn response(&mut self) -> &mut Response {
        &mut self.response
    }

    /// Without its time limits.
    pub(super) fn into_response(self) -> Response {
        self.response
    }

    /// The host that answered.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// The next bytes, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<bytes::Bytes>, Failure> {
        let asked = Instant::now();
        let piece = timeout(self.pace.left(), self.response.chunk()).await;
        self.pace.waited(asked.elapsed());
        match piece {
            Ok(Ok(Some(piece))) => {
                self.pace.came(piece.len() as u64);
                if let Some(permit) = &mut self.permit {
                    permit.arrived(piece.len() as u64);
                }
                Ok(Some(piece))
            }
            Ok(Ok(None)) => Ok(None),
            Ok(Err(error)) => Err(network_failure(error, &self.host)),
            Err(_) => Err(Failure::passing(
                RetryReason::Timeout,
                Error::new(
                    Kind::Unavailable,
                    format!(
                        "{} sent only {} bytes in {} s",
                        self.host,
                        self.pace.bytes,
                        self.pace.stall.as_secs_f64()
                    ),
                ),
            )),
        }
    }
}

/// Tells a slow body from one that has stopped. Counts only the time spent waiting: the reader may take its own.
struct Pace {
    stall: Duration,
    spent: Duration,
    bytes: u64,
}

impl Pace {
    fn new(stall: Duration) -> Self {
        Self {
            stall,
            spent: Duration::ZERO,
            bytes: 0,
        }
    }

    fn left(&self) -> Duration {
        self.stall.saturating_sub(self.spent)
    }

    fn waited(&mut self, time: Duration) {
        self.spent = self.spent.saturating_add(time);
    }

    fn came(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= LEAST_PROGRESS {
            self.spent = Duration::ZERO;
            self.bytes = 0;
        }
    }
}

/// The meaning of a failure below HTTP. Its URL is left out, because it may be signed.
fn network_failure(error: reqwest::Error, host: &str) -> Failure {
    let error = error.without_url();
    let tls = tls_error(&error).map(|tls| {
        let hint = match tls {
            rustls::Error::InvalidCertificate(what) => trust::hint(what),
            rustls::Error::InvalidMessage(_) => {
                "it does not use TLS: to allow plain HTTP, use --plain-http"
            }
            _ => "TLS failed",
        };
        format!("{host}: {hint}")
    });
    match tls {
        Some(text) => Failure::Final(Error::with_source(Kind::Unavailable, text, error)),
        None if error.is_builder() => Failure::Final(Error::with_source(
            Kind::InvalidArgument,
            format!("{host}: the request is invalid"),
            error,
        )),
        None if error.is_connect() => Failure::passing(
            RetryReason::Connection,
            Error::with_source(
                Kind::Unavailable,
                format!("{host} cannot be reached"),
                error,
            ),
        ),
        None => Failure::passing(
            RetryReason::Connection,
            Error::with_source(
                Kind::Unavailable,
                format!("the connection to {host} failed"),
                error,
            ),
        ),
    }
}

/// The TLS error underneath, if there is one.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // an io::Error's source is that of the error in it, which would itself be passed over
        if let Some(inner) = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref)
        {
            return tls_error(inner);
        }
        next = error.source();
    }
    None
}
