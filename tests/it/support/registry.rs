//! A small OCI registry for tests and demonstrations: it counts what it sends, shapes the link, and fails by script.
//!
//! Serves repositories from memory or from OCI layout folders: pull, push, ranges, tags, referrers (by the API or by the tag fallback
//! only), basic and bearer-token auth, redirects to a second listener with signed URLs that expire. It runs on a thread of its own,
//! so that tests may block. All its settings may be changed while it runs.
//!
//! ```ignore
//! let registry = Registry::start();
//! let blob = registry.add_blob("app", b"hello");
//! registry.fail(On::Data, Fault::Cut { after: 3 }, Times::Next(1));
//! // ... fetch ...
//! assert_eq!(registry.counters().blob(&blob).bytes, 5);
//! ```
#![allow(dead_code, reason = "each user of this file uses a part of it")]

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fs::File,
    net::SocketAddr,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use socinbd::oci::Digest;
use tokio::{net::TcpListener, sync::oneshot};

/// Media type of an OCI image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Bytes sent at a time: small, so that connections share a shaped link fairly.
const PIECE: u64 = 16 << 10;

type Body = BoxBody<Bytes, std::io::Error>;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `/v2/`.
    Ping,
    /// A manifest, by tag or digest.
    Manifest,
    /// A blob at the registry itself, also when the answer is a redirect.
    Blob,
    /// A blob at the second listener, where redirects lead.
    Cdn,
    /// The token service.
    Token,
    /// The referrers API.
    Referrers,
    /// The list of tags.
    Tags,
    /// Blob uploads.
    Upload,
    /// Anything else.
    Other,
}

/// Which requests a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All.
    Any,
    /// Those of one kind.
    Kind(Kind),
    /// Those that send a blob's bytes, from whichever listener: not the redirects.
    Data,
    /// As `Data`, of one blob.
    DataOf(Digest),
}

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// The next so many requests that match.
    Next(u64),
    /// Until [`Registry::heal`].
    UntilHealed,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The answer comes this much later.
    Delay(Duration),
    /// No answer ever comes.
    Hang,
    /// The connection ends without an answer.
    Close,
    /// The connection ends after this many bytes of the body.
    Cut {
        /// Bytes that still arrive.
        after: u64,
    },
    /// A body that is shorter than asked, in a well-formed answer that does not admit it.
    Truncate {
        /// Bytes that it has.
        to: u64,
    },
    /// More bytes than asked, without a length.
    TooLong {
        /// How many more.
        by: u64,
    },
    /// Other bytes of the blob than asked, with a `Content-Range` that says so.
    WrongRange {
        /// How much further on they start.
        shift: u64,
    },
    /// The right bytes, with this `Content-Range`; none when it is empty.
    ContentRange(String),
    /// `multipart/byteranges`, which nobody asked for.
    Multipart,
    /// One byte of the body is flipped.
    WrongByte {
        /// Which, from the body's start.
        at: u64,
    },
    /// So many bytes at a time, with a pause after each.
    Drip {
        /// Bytes at a time.
        bytes: u64,
        /// The pause.
        pause: Duration,
    },
    /// Nothing more comes after this many bytes; the connection stays.
    Stall {
        /// Bytes that still arrive.
        after: u64,
    },
    /// This status, with an OCI error body.
    Status {
        /// The code.
        code: u16,
        /// `Retry-After`, as it is to stand in the header.
        retry_after: Option<String>,
    },
    /// 200 and the whole blob, whatever `Range` says.
    IgnoreRange,
    /// 416, although the range is right. With a length and no body, as `docker-registry` does it.
    Unsatisfiable,
    /// A redirect.
    Redirect {
        /// Where to; `{self}` stands for the request's own URL.
        location: String,
    },
    /// 200 with this instead.
    Replace {
        /// `Content-Type`.
        content_type: String,
        /// The body.
        body: Bytes,
        /// Further headers.
        headers: Vec<(String, String)>,
    },
}

impl Fault {
    /// A status without `Retry-After`.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            retry_after: None,
        }
    }
}

/// Who may pull and push.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Everybody.
    #[default]
    Open,
    /// Name and password with each request.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// A token of the token service.
    Bearer {
        /// Who gets a token: name and password, or everybody.
        user: Option<(String, String)>,
        /// Also who shows this refresh token.
        refresh_token: Option<String>,
        /// How long a token lasts; it is told with `expires_in`.
        lifetime: Duration,
    },
}

/// The distance and width of the link: all connections of both listeners share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Added to each connection and to each request.
    pub round_trip: Duration,
    /// Of bodies; 0 is no limit.
    pub bytes_per_second: u64,
}

/// One request, as it came and as it was answered.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it is about.
    pub kind: Kind,
    /// The method.
    pub method: Method,
    /// The path, without its query.
    pub path: String,
    /// The query.
    pub query: String,
    /// The blob's or manifest's digest, where the path has one.
    pub digest: Option<Digest>,
    /// The range asked for; its end is exclusive, `u64::MAX` where it is open.
    pub range: Option<Range<u64>>,
    /// All headers of the request, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The status sent; 0 where none was.
    pub status: u16,
    /// Bytes of the body handed to the connection.
    pub bytes: u64,
}

/// Requests and bytes of one thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests.
    pub requests: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

/// What was asked and sent since the start, or since [`Registry::reset_counters`].
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Every request, in the order in which they came.
    pub log: Vec<Entry>,
}

impl Counters {
    /// Of all requests.
    pub fn total(&self) -> Count {
        self.of(|_| true)
    }

    /// Of one kind.
    pub fn kind(&self, kind: Kind) -> Count {
        self.of(|entry| entry.kind == kind)
    }

    /// Of one blob, at both listeners, without the redirects.
    pub fn blob(&self, digest: &Digest) -> Count {
        self.of(|entry| {
            entry.is_data() && entry.digest == Some(*digest) && entry.method == Method::GET
        })
    }

    /// Of all blobs, at both listeners, without the redirects.
    pub fn blobs(&self) -> Count {
        self.of(|entry| entry.is_data() && entry.method == Method::GET)
    }

    /// The ranges asked of one blob where its bytes were sent, in order; requests without a range are left out.
    pub fn ranges(&self, digest: &Digest) -> Vec<Range<u64>> {
        self.log
            .iter()
            .filter(|entry| entry.is_data() && entry.digest == Some(*digest))
            .filter_map(|entry| entry.range.clone())
            .collect()
    }

    fn of(&self, which: impl Fn(&Entry) -> bool) -> Count {
        let mut count = Count::default();
        for entry in self.log.iter().filter(|entry| which(entry)) {
            count.requests += 1;
            count.bytes += entry.bytes;
        }
        count
    }
}

impl Entry {
    fn is_data(&self) -> bool {
        self.kind == Kind::Cdn
            || self.kind == Kind::Blob && !(300..400).contains(&self.status) && self.status != 401
    }
}

/// A running registry. Stops when dropped.
pub struct Registry {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    address: SocketAddr,
    cdn: SocketAddr,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    uploads: HashMap<u64, Vec<u8>>,
    rules: Vec<Rule>,
    auth: Auth,
    tokens: HashMap<String, Instant>,
    referrers_api: Referrers,
    redirects: Option<Redirects>,
    signatures: HashMap<String, Instant>,
    link: Link,
    link_free_at: Option<Instant>,
    counters: Counters,
    next_number: u64,
}

/// How the referrers API behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Referrers {
    /// Not there: 404 as text, as `docker-registry` answers.
    Absent,
    /// There.
    Present {
        /// Entries an answer; the rest by `Link`. 0 is all.
        per_answer: usize,
        /// Whether `artifactType` is obeyed, and said so.
        filters: bool,
    },
}

impl Default for Referrers {
    fn default() -> Self {
        Self::Present {
            per_answer: 0,
            filters: true,
        }
    }
}

/// Redirects of blobs to the second listener.
#[derive(Clone, Copy, Debug)]
pub struct Redirects {
    /// How long a signed URL works.
    pub lifetime: Duration,
    /// What an expired one answers.
    pub expired_status: u16,
}

#[derive(Default)]
struct Repository {
    blobs: HashMap<Digest, Data>,
    manifests: HashMap<Digest, (String, Bytes)>,
    /// Manifests in the order in which they came, for the referrers' order.
    order: Vec<Digest>,
    tags: BTreeMap<String, Digest>,
}

#[derive(Clone)]
enum Data {
    Memory(Bytes),
    File(Arc<File>, u64),
}

struct Rule {
    on: On,
    fault: Fault,
    times: Times,
}

impl Registry {
    /// Starts a registry on a free port of 127.0.0.1.
    pub fn start() -> Self {
        Self::listen("127.0.0.1:0".parse().expect("an address"))
    }

    /// Starts a registry on this address; the second listener takes a free port of the same host.
    pub fn listen(address: SocketAddr) -> Self {
        let (started, start) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("registry".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a runtime for the registry");
                runtime.block_on(async move {
                    let main = TcpListener::bind(address)
                        .await
                        .expect("bind the registry's address");
                    let cdn = TcpListener::bind((address.ip(), 0))
                        .await
                        .expect("bind the second listener");
                    let shared = Arc::new(Shared {
                        address: main.local_addr().expect("own address"),
                        cdn: cdn.local_addr().expect("own address"),
                        state: Mutex::default(),
                    });
                    tokio::spawn(serve(main, Arc::clone(&shared), false));
                    tokio::spawn(serve(cdn, Arc::clone(&shared), true));
                    started.send(shared).expect("the starter waits");
                    let _ = stopped.await; // an error too: the Registry is gone
                });
            })
            .expect("a thread for the registry");
        Self {
            shared: start.recv().expect("the registry starts"),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.shared.address.to_string()
    }

    /// The second listener's `127.0.0.1:PORT`.
    pub fn cdn_host(&self) -> String {
        self.shared.cdn.to_string()
    }

    /// A reference to this registry: `reference("app:1")`, `reference("app@sha256:...")`.
    pub fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host())
    }

    /// Adds a blob.
    pub fn add_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.repository(repository, |repository| {
            repository.blobs.insert(digest, Data::Memory(bytes));
        });
        digest
    }

    /// Adds bytes under a digest that is not theirs, for hostile tests.
    pub fn add_blob_as(&self, repository: &str, digest: Digest, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.repository(repository, |repository| {
            repository.blobs.insert(digest, Data::Memory(bytes));
        });
    }

    /// Takes a blob or a manifest away.
    pub fn remove(&self, repository: &str, digest: &Digest) {
        self.repository(repository, |repository| {
            repository.blobs.remove(digest);
            repository.manifests.remove(digest);
            repository.order.retain(|other| other != digest);
        });
    }

    /// Adds a manifest or index, with a tag where one is given.
    pub fn add_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> Digest {
        let bytes = bytes.into();
        self.repository(repository, |repository| {
            repository.put_manifest(media_type, bytes, tag)
        })
    }

    /// Points a tag at a manifest.
    pub fn tag(&self, repository: &str, tag: &str, digest: Digest) {
        self.repository(repository, |repository| {
            repository.tags.insert(tag.to_owned(), digest);
        });
    }

    /// Serves all blobs and tags of an OCI image layout. Blobs stay in their files. Every blob is served as a blob; what `index.json`
    /// names, and what those indexes name, as manifests too.
    pub fn add_layout(&self, repository: &str, folder: &Path) -> std::io::Result<()> {
        let mut blobs = HashMap::new();
        for file in std::fs::read_dir(folder.join("blobs/sha256"))? {
            let file = file?;
            let name = format!("sha256:{}", file.file_name().to_string_lossy());
            if let Ok(digest) = name.parse::<Digest>() {
                let open = File::open(file.path())?;
                let size = open.metadata()?.len();
                blobs.insert(digest, Data::File(Arc::new(open), size));
            }
        }
        let index = std::fs::read(folder.join("index.json"))?;
        let index: Value = serde_json::from_slice(&index).map_err(std::io::Error::other)?;
        self.repository(repository, |repository| {
            repository.blobs.extend(blobs);
            let mut waiting = vec![(index, 0)];
            while let Some((index, depth)) = waiting.pop() {
                for descriptor in index["manifests"].as_array().into_iter().flatten() {
                    let Some(digest) = text(descriptor, "digest").parse::<Digest>().ok() else {
                        continue;
                    };
                    let Some(data) = repository.blobs.get(&digest) else {
                        continue; // a manifest of another platform, left out of the layout
                    };
                    let bytes = data.read(0..data.size()).map_err(std::io::Error::other)?;
                    if depth < 4
                        && let Ok(value) = serde_json::from_slice::<Value>(&bytes)
                    {
                        waiting.push((value, depth + 1));
                    }
                    let tag = &descriptor["annotations"]["org.opencontainers.image.ref.name"];
                    let tag = tag.as_str().filter(|_| depth == 0);
                    repository.put_manifest(&text(descriptor, "mediaType"), bytes, tag);
                }
            }
            Ok(())
        })
    }

    /// Names and tags that it has.
    pub fn tags(&self, repository: &str) -> BTreeMap<String, Digest> {
        self.repository(repository, |repository| repository.tags.clone())
    }

    /// Lets matching requests fail. Of several rules that match, the first that was given.
    pub fn fail(&self, on: On, fault: Fault, times: Times) {
        self.state().rules.push(Rule { on, fault, times });
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.state().rules.clear();
    }

    /// Sets who may pull and push; tokens given so far no longer count.
    pub fn set_auth(&self, auth: Auth) {
        let mut state = self.state();
        state.auth = auth;
        state.tokens.clear();
    }

    /// Tokens given so far no longer count.
    pub fn revoke_tokens(&self) {
        self.state().tokens.clear();
    }

    /// Sets how the referrers API behaves.
    pub fn set_referrers(&self, referrers: Referrers) {
        self.state().referrers_api = referrers;
    }

    /// Sends blobs from the second listener, or no longer.
    pub fn set_redirects(&self, redirects: Option<Redirects>) {
        self.state().redirects = redirects;
    }

    /// Signed URLs given so far no longer work.
    pub fn expire_signatures(&self) {
        let now = Instant::now();
        for expiry in self.state().signatures.values_mut() {
            *expiry = now;
        }
    }

    /// Shapes the link.
    pub fn set_link(&self, link: Link) {
        self.state().link = link;
    }

    /// What was asked and sent so far.
    pub fn counters(&self) -> Counters {
        self.state().counters.clone()
    }

    /// Forgets what was asked and sent so far.
    pub fn reset_counters(&self) {
        self.state().counters.log.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    fn repository<T>(&self, name: &str, with: impl FnOnce(&mut Repository) -> T) -> T {
        with(
            self.state()
                .repositories
                .entry(name.to_owned())
                .or_default(),
        )
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // its panic was printed
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // a test that panicked elsewhere must not hide behind this lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the link has carried so many bytes.
    async fn carry(&self, bytes: u64) {
        let until = {
            let mut state = self.state();
            let rate = state.link.bytes_per_second;
            if rate == 0 {
                return;
            }
            let now = Instant::now();
            let free_at = state.link_free_at.unwrap_or(now).max(now);
            let until = free_at + Duration::from_secs_f64(bytes as f64 / rate as f64);
            state.link_free_at = Some(until);
            until
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

impl Repository {
    fn put_manifest(&mut self, media_type: &str, bytes: Bytes, tag: Option<&str>) -> Digest {
        let digest = Digest::of(&bytes);
        if self
            .manifests
            .insert(digest, (media_type.to_owned(), bytes))
            .is_none()
        {
            self.order.push(digest);
        }
        if let Some(tag) = tag {
            self.tags.insert(tag.to_owned(), digest);
        }
        digest
    }

    /// Descriptors of the manifests whose subject this is.
    fn referrers(&self, subject: &Digest) -> Vec<Value> {
        let subject = subject.to_string();
        let mut found = Vec::new();
        for digest in &self.order {
            let (media_type, bytes) = &self.manifests[digest];
            let Ok(manifest) = serde_json::from_slice::<Value>(bytes) else {
                continue;
            };
            if manifest["subject"]["digest"] != subject.as_str() {
                continue;
            }
            let artifact_type = match manifest["artifactType"].as_str() {
                Some(artifact_type) if !artifact_type.is_empty() => artifact_type.to_owned(),
                _ => text(&manifest["config"], "mediaType"),
            };
            let mut descriptor = json!({
                "mediaType": media_type,
                "digest": digest.to_string(),
                "size": bytes.len(),
                "artifactType": artifact_type,
            });
            if manifest["annotations"].is_object() {
                descriptor["annotations"] = manifest["annotations"].clone();
            }
            found.push(descriptor);
        }
        found
    }
}

impl Data {
    fn size(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_, size) => *size,
        }
    }

    fn read(&self, range: Range<u64>) -> std::io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Self::File(file, _) => {
                let mut buffer = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut buffer, range.start)?;
                Ok(buffer.into())
            }
        }
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, cdn: bool) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue; // out of descriptors: the next accept says so too
        };
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let round_trip = shared.state().link.round_trip;
            tokio::time::sleep(round_trip).await;
            let service = service_fn(|request| answer(Arc::clone(&shared), request, cdn));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await; // clients that go away are no news here
        });
    }
}

/// A request as it was understood.
struct Asked {
    kind: Kind,
    method: Method,
    path: String,
    query: HashMap<String, String>,
    repository: String,
    /// The part of the path after `manifests/`, `blobs/`, ...
    rest: String,
    digest: Option<Digest>,
    range: Option<Range<u64>>,
    authorization: Option<String>,
    content_type: String,
    host: String,
    /// Its number in the log.
    number: usize,
}

impl Asked {
    fn new(request: &Request<Incoming>, cdn: bool) -> Self {
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

async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
    cdn: bool,
) -> Result<Response<Body>, Closed> {
    let mut asked = Asked::new(&request, cdn);
    let round_trip = {
        let mut state = shared.state();
        asked.number = state.counters.log.len();
        state.counters.log.push(Entry {
            kind: asked.kind,
            method: asked.method.clone(),
            path: asked.path.clone(),
            query: request.uri().query().unwrap_or("").to_owned(),
            digest: asked.digest,
            range: asked.range.clone(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| {
                    let value = String::from_utf8_lossy(value.as_bytes());
                    (name.as_str().to_owned(), value.into_owned())
                })
                .collect(),
            status: 0,
            bytes: 0,
        });
        state.link.round_trip
    };
    tokio::time::sleep(round_trip).await;
    let body = match request.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Err(Closed),
    };
    let reply = respond(&shared, &asked, body).await;
    if let (Ok(reply), Some(entry)) = (&reply, shared.state().counters.log.get_mut(asked.number)) {
        entry.status = reply.status().as_u16();
    }
    reply
}

/// The connection is to end without an answer.
#[derive(Debug)]
struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("closed by script")
    }
}

impl std::error::Error for Closed {}

async fn respond(
    shared: &Arc<Shared>,
    asked: &Asked,
    body: Bytes,
) -> Result<Response<Body>, Closed> {
    let fault = shared.state().fault(asked);
    match &fault {
        Some(Fault::Delay(by)) => tokio::time::sleep(*by).await,
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Close) => return Err(Closed),
        Some(Fault::Status { code, retry_after }) => {
            let mut reply = refusal(*code, "FAULT", "a fault of the script");
            if let Some(value) = retry_after
                && let Ok(value) = value.parse()
            {
                reply.headers_mut().insert(header::RETRY_AFTER, value);
            }
            return Ok(reply);
        }
        Some(Fault::Redirect { location }) => {
            let own = format!("http://{}{}", asked.host, asked.path);
            return Ok(redirect(&location.replace("{self}", &own)));
        }
        Some(Fault::Replace {
            content_type,
            body,
            headers,
        }) => {
            let mut reply = Response::builder().header(header::CONTENT_TYPE, content_type);
            for (name, value) in headers {
                reply = reply.header(name, value);
            }
            let body = shared.body(asked, Data::Memory(body.clone()), None, None);
            return Ok(reply.body(body).unwrap_or_else(|_| internal()));
        }
        _ => {}
    }
    if asked.kind == Kind::Cdn {
        return Ok(shared.cdn_blob(asked, fault));
    }
    if asked.kind == Kind::Token {
        return Ok(shared.state().token(asked, &body));
    }
    if let Some(refused) = shared.state().unauthorized(asked, shared.address) {
        return Ok(refused);
    }
    let reply = match (asked.kind, asked.method.as_str()) {
        (Kind::Ping, _) => whole(200, "application/json", "{}"),
        (Kind::Manifest, "GET" | "HEAD") => shared.manifest(asked, fault),
        (Kind::Manifest, "PUT") => shared.state().put_manifest(asked, body),
        (Kind::Manifest, "DELETE") => shared.state().delete_manifest(asked),
        (Kind::Blob, "GET" | "HEAD") => shared.blob(asked, fault),
        (Kind::Referrers, "GET") => shared.state().referrers(asked),
        (Kind::Tags, "GET") => shared.state().list_tags(asked),
        (Kind::Upload, _) => shared.state().upload(asked, &body),
        _ => refusal(404, "UNSUPPORTED", "nothing here"),
    };
    Ok(reply)
}

impl State {
    /// The fault that the script has for a request, if any.
    fn fault(&mut self, asked: &Asked) -> Option<Fault> {
        let redirected = self.redirects.is_some();
        let data = asked.kind == Kind::Cdn || asked.kind == Kind::Blob && !redirected;
        let allowed = asked.kind == Kind::Cdn || self.is_authorized(asked);
        let rule = self.rules.iter_mut().find(|rule| {
            rule.times != Times::Next(0)
                && match rule.on {
                    On::Any => true,
                    On::Kind(kind) => kind == asked.kind,
                    On::Data => data && allowed,
                    On::DataOf(digest) => data && allowed && asked.digest == Some(digest),
                }
        })?;
        if let Times::Next(left) = &mut rule.times {
            *left -= 1;
        }
        Some(rule.fault.clone())
    }

    fn is_authorized(&self, asked: &Asked) -> bool {
        let shown = asked.authorization.as_deref().unwrap_or("");
        match &self.auth {
            Auth::Open => true,
            Auth::Basic { user, password } => shown == basic(user, password),
            Auth::Bearer { .. } => shown
                .strip_prefix("Bearer ")
                .and_then(|token| self.tokens.get(token))
                .is_some_and(|expiry| *expiry > Instant::now()),
        }
    }

    fn unauthorized(&self, asked: &Asked, address: SocketAddr) -> Option<Response<Body>> {
        if self.is_authorized(asked) {
            return None;
        }
        let challenge = match &self.auth {
            Auth::Open | Auth::Basic { .. } => "Basic realm=\"tests\"".to_owned(),
            Auth::Bearer { .. } => format!(
                "Bearer realm=\"http://{address}/token\",service=\"tests\",scope=\"repository:{}:pull\"",
                asked.repository
            ),
        };
        let mut reply = refusal(401, "UNAUTHORIZED", "who are you?");
        if let Ok(value) = challenge.parse() {
            reply.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        Some(reply)
    }

    fn token(&mut self, asked: &Asked, body: &[u8]) -> Response<Body> {
        let Auth::Bearer {
            user,
            refresh_token,
            lifetime,
        } = self.auth.clone()
        else {
            return refusal(404, "UNSUPPORTED", "no tokens here");
        };
        let form: HashMap<String, String> =
            url::form_urlencoded::parse(body).into_owned().collect();
        let refreshed = form.get("grant_type").map(String::as_str) == Some("refresh_token")
            && refresh_token.is_some()
            && form.get("refresh_token") == refresh_token.as_ref();
        let named = match &user {
            None => asked.method == Method::GET,
            Some((user, password)) => {
                asked.authorization.as_deref() == Some(basic(user, password).as_str())
            }
        };
        if !refreshed && !named {
            return refusal(401, "UNAUTHORIZED", "wrong name or password");
        }
        let scope = asked.query.get("scope").or_else(|| form.get("scope"));
        if !scope.is_some_and(|scope| scope.starts_with("repository:")) {
            return refusal(400, "DENIED", "a token for what?");
        }
        self.next_number += 1;
        let token = format!("token-{}", self.next_number);
        self.tokens.insert(token.clone(), Instant::now() + lifetime);
        let answer = json!({ "token": token, "expires_in": lifetime.as_secs().max(1) });
        whole(200, "application/json", &answer.to_string())
    }

    fn put_manifest(&mut self, asked: &Asked, body: Bytes) -> Response<Body> {
        let digest = Digest::of(&body);
        if asked.digest.is_some_and(|named| named != digest) {
            return refusal(400, "DIGEST_INVALID", "other bytes than the digest's");
        }
        let tag = asked.digest.is_none().then_some(asked.rest.as_str());
        let subject = serde_json::from_slice::<Value>(&body)
            .ok()
            .and_then(|manifest| manifest["subject"]["digest"].as_str().map(str::to_owned));
        self.repositories
            .entry(asked.repository.clone())
            .or_default()
            .put_manifest(&asked.content_type, body, tag);
        let mut reply = Response::builder()
            .status(201)
            .header("docker-content-digest", digest.to_string())
            .header(
                header::LOCATION,
                format!("/v2/{}/manifests/{digest}", asked.repository),
            );
        if let Some(subject) = subject
            && self.referrers_api != Referrers::Absent
        {
            reply = reply.header("oci-subject", subject);
        }
        reply.body(empty()).unwrap_or_else(|_| internal())
    }

    fn delete_manifest(&mut self, asked: &Asked) -> Response<Body> {
        if let (Some(digest), Some(repository)) =
            (asked.digest, self.repositories.get_mut(&asked.repository))
        {
            repository.manifests.remove(&digest);
            repository.order.retain(|other| *other != digest);
            repository.tags.retain(|_, other| *other != digest);
        }
        whole(202, "text/plain", "")
    }

    fn list_tags(&mut self, asked: &Asked) -> Response<Body> {
        match self.repositories.get(&asked.repository) {
            Some(repository) => whole(
                200,
                "application/json",
                &json!({ "name": asked.repository, "tags": repository.tags.keys().collect::<Vec<_>>() })
                    .to_string(),
            ),
            None => refusal(404, "NAME_UNKNOWN", "no such repository"),
        }
    }

    fn referrers(&mut self, asked: &Asked) -> Response<Body> {
        let Referrers::Present {
            per_answer,
            filters,
        } = self.referrers_api
        else {
            return whole(404, "text/plain", "404 page not found\n");
        };
        let Some(repository) = self.repositories.get(&asked.repository) else {
            return refusal(404, "NAME_UNKNOWN", "no such repository");
        };
        let Some(subject) = asked.digest else {
            return refusal(400, "DIGEST_INVALID", "a subject's digest is needed");
        };
        let mut found = repository.referrers(&subject);
        let wanted = asked.query.get("artifactType");
        if let (true, Some(wanted)) = (filters, wanted) {
            found.retain(|descriptor| descriptor["artifactType"] == wanted.as_str());
        }
        let from: usize = asked
            .query
            .get("from")
            .and_then(|from| from.parse().ok())
            .unwrap_or(0);
        let total = found.len();
        let mut answer: Vec<Value> = found.drain(from.min(total)..).collect();
        let mut reply = Response::builder().header(header::CONTENT_TYPE, INDEX);
        if filters && wanted.is_some() {
            reply = reply.header("oci-filters-applied", "artifactType");
        }
        if per_answer > 0 && answer.len() > per_answer {
            answer.truncate(per_answer);
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            if let Some(wanted) = wanted {
                query.append_pair("artifactType", wanted);
            }
            query.append_pair("from", &(from + per_answer).to_string());
            let next = format!(
                "</v2/{}/referrers/{subject}?{}>; rel=\"next\"",
                asked.repository,
                query.finish()
            );
            reply = reply.header(header::LINK, next);
        }
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": answer });
        let body = full(index.to_string().into());
        reply.body(body).unwrap_or_else(|_| internal())
    }

    fn upload(&mut self, asked: &Asked, body: &[u8]) -> Response<Body> {
        let repository = asked.repository.clone();
        let id: Option<u64> = asked.rest.parse().ok();
        let id = match (asked.method.as_str(), id) {
            ("POST", None) => {
                if let Some(digest) = asked.query.get("mount").and_then(|text| text.parse().ok()) {
                    let from = asked
                        .query
                        .get("from")
                        .and_then(|from| self.repositories.get(from));
                    if let Some(data) = from.and_then(|from| from.blobs.get(&digest)).cloned() {
                        let into = self.repositories.entry(repository.clone()).or_default();
                        into.blobs.insert(digest, data);
                        return created(&repository, &digest);
                    }
                }
                self.next_number += 1;
                self.uploads.insert(self.next_number, Vec::new());
                self.next_number
            }
            (_, Some(id)) if self.uploads.contains_key(&id) => id,
            _ => return refusal(404, "BLOB_UPLOAD_UNKNOWN", "no such upload"),
        };
        let Some(so_far) = self.uploads.get_mut(&id) else {
            return internal();
        };
        so_far.extend_from_slice(body);
        let length = so_far.len();
        if let Some(expected) = asked.query.get("digest") {
            let bytes = self.uploads.remove(&id).unwrap_or_default();
            let digest = Digest::of(&bytes);
            if digest.to_string() != *expected {
                return refusal(400, "DIGEST_INVALID", "other bytes than the digest's");
            }
            let into = self.repositories.entry(repository.clone()).or_default();
            into.blobs.insert(digest, Data::Memory(bytes.into()));
            return created(&repository, &digest);
        }
        let status = if asked.method == Method::GET {
            204
        } else {
            202
        };
        Response::builder()
            .status(status)
            .header(
                header::LOCATION,
                format!("/v2/{repository}/blobs/uploads/{id}"),
            )
            .header("docker-upload-uuid", id.to_string())
            .header(header::RANGE, format!("0-{}", length.saturating_sub(1)))
            .body(empty())
            .unwrap_or_else(|_| internal())
    }
}

impl Shared {
    fn manifest(self: &Arc<Self>, asked: &Asked, fault: Option<Fault>) -> Response<Body> {
        let found = {
            let state = self.state();
            let Some(repository) = state.repositories.get(&asked.repository) else {
                return refusal(404, "NAME_UNKNOWN", "no such repository");
            };
            let digest = asked
                .digest
                .or_else(|| repository.tags.get(&asked.rest).copied());
            digest.and_then(|digest| Some((digest, repository.manifests.get(&digest)?.clone())))
        };
        let Some((digest, (media_type, bytes))) = found else {
            return refusal(404, "MANIFEST_UNKNOWN", "no such manifest");
        };
        let reply = Response::builder()
            .header(header::CONTENT_TYPE, media_type)
            .header(header::CONTENT_LENGTH, bytes.len())
            .header("docker-content-digest", digest.to_string());
        let body = match asked.method {
            Method::HEAD => empty(),
            _ => self.body(asked, Data::Memory(bytes), None, fault),
        };
        reply.body(body).unwrap_or_else(|_| internal())
    }

    fn find_blob(&self, asked: &Asked) -> Option<Data> {
        let state = self.state();
        let repository = state.repositories.get(&asked.repository)?;
        repository.blobs.get(&asked.digest?).cloned()
    }

    fn blob(self: &Arc<Self>, asked: &Asked, fault: Option<Fault>) -> Response<Body> {
        let Some(data) = self.find_blob(asked) else {
            return refusal(404, "BLOB_UNKNOWN", "no such blob");
        };
        if asked.method == Method::GET {
            let mut state = self.state();
            if let Some(redirects) = state.redirects {
                state.next_number += 1;
                let signature = format!("signature-{}", state.next_number);
                let expiry = Instant::now() + redirects.lifetime;
                state.signatures.insert(signature.clone(), expiry);
                return redirect(&format!(
                    "http://{}/{}/{}?signature={signature}",
                    self.cdn, asked.repository, asked.rest
                ));
            }
        }
        self.bytes_of(asked, data, fault)
    }

    fn cdn_blob(self: &Arc<Self>, asked: &Asked, fault: Option<Fault>) -> Response<Body> {
        {
            let state = self.state();
            let signature = asked.query.get("signature");
            let expiry = signature.and_then(|signature| state.signatures.get(signature));
            if !expiry.is_some_and(|expiry| *expiry > Instant::now()) {
                let status = state
                    .redirects
                    .map_or(403, |redirects| redirects.expired_status);
                return refusal(status, "EXPIRED", "the signature has expired");
            }
        }
        match self.find_blob(asked) {
            Some(data) => self.bytes_of(asked, data, fault),
            None => refusal(404, "BLOB_UNKNOWN", "no such blob"),
        }
    }

    /// A blob or a range of it.
    fn bytes_of(
        self: &Arc<Self>,
        asked: &Asked,
        data: Data,
        fault: Option<Fault>,
    ) -> Response<Body> {
        let size = data.size();
        let mut range = asked.range.clone();
        match &fault {
            Some(Fault::IgnoreRange) => range = None,
            Some(Fault::Unsatisfiable) => return unsatisfiable(size, None),
            _ => {}
        }
        let mut reply = Response::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::ACCEPT_RANGES, "bytes");
        let mut sent = 0..size;
        if let Some(asked_range) = range {
            if asked_range.start >= size {
                return unsatisfiable(size, Some(size));
            }
            sent = asked_range.start..asked_range.end.min(size);
            if let Some(Fault::WrongRange { shift }) = fault {
                sent = (sent.start + shift).min(size - 1)..(sent.end + shift).min(size);
            }
            let said = match &fault {
                Some(Fault::ContentRange(said)) => said.clone(),
                _ => format!("bytes {}-{}/{size}", sent.start, sent.end - 1),
            };
            reply = reply.status(206);
            if !said.is_empty() {
                reply = reply.header(header::CONTENT_RANGE, said);
            }
            if matches!(fault, Some(Fault::Multipart)) {
                reply = Response::builder()
                    .status(206)
                    .header(header::CONTENT_TYPE, "multipart/byteranges; boundary=b");
            }
        }
        let length = match &fault {
            Some(Fault::Truncate { to }) => Some((sent.end - sent.start).min(*to)),
            Some(Fault::TooLong { .. }) => None,
            _ => Some(sent.end - sent.start),
        };
        if let Some(length) = length {
            reply = reply.header(header::CONTENT_LENGTH, length);
        }
        let body = match asked.method {
            Method::HEAD => empty(),
            _ => self.body(asked, data, Some(sent), fault),
        };
        reply.body(body).unwrap_or_else(|_| internal())
    }

    /// A body piece by piece through the link, with the script's fault.
    fn body(
        self: &Arc<Self>,
        asked: &Asked,
        data: Data,
        range: Option<Range<u64>>,
        fault: Option<Fault>,
    ) -> Body {
        let range = range.unwrap_or(0..data.size());
        let start = range.start;
        let mut end = range.end;
        match &fault {
            Some(Fault::Truncate { to }) => end = end.min(start.saturating_add(*to)),
            Some(Fault::TooLong { by }) => end = end.saturating_add(*by),
            _ => {}
        }
        let shared = Arc::clone(self);
        let number = asked.number;
        let pieces = stream::try_unfold(start, move |at| {
            let (shared, data, fault) = (Arc::clone(&shared), data.clone(), fault.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let mut until = end.min(at + PIECE);
                match fault {
                    Some(Fault::Cut { after }) => {
                        if at - start >= after {
                            return Err(std::io::Error::other("cut by script"));
                        }
                        until = until.min(start + after);
                    }
                    Some(Fault::Stall { after }) => {
                        if at - start >= after {
                            std::future::pending::<()>().await;
                        }
                        until = until.min(start + after);
                    }
                    Some(Fault::Drip { bytes, pause }) => {
                        if at > start {
                            tokio::time::sleep(pause).await;
                        }
                        until = until.min(at + bytes.max(1));
                    }
                    _ => {}
                }
                // past the blob's end (a body that is too long): zeros
                let known = until.min(data.size());
                let mut piece = match known > at {
                    true => data.read(at..known)?.to_vec(),
                    false => Vec::new(),
                };
                piece.resize((until - at) as usize, 0);
                if let Some(Fault::WrongByte { at: wrong }) = fault
                    && (at..until).contains(&(start + wrong))
                {
                    piece[(start + wrong - at) as usize] ^= 0x40;
                }
                shared.carry(until - at).await;
                if let Some(entry) = shared.state().counters.log.get_mut(number) {
                    entry.bytes += until - at;
                }
                Ok(Some((Frame::data(Bytes::from(piece)), until)))
            }
        });
        BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(pieces)))))
    }
}

/// `BoxBody` wants `Sync`; the lock is never contended, since a body has one reader.
struct SyncStream<S>(Mutex<std::pin::Pin<Box<S>>>);

impl<S: stream::Stream> stream::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.as_mut().poll_next(context)
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}

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

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or("").to_owned()
}

fn full(bytes: Bytes) -> Body {
    http_body_util::Full::new(bytes)
        .map_err(|never: Infallible| match never {})
        .boxed()
}

fn empty() -> Body {
    full(Bytes::new())
}

fn whole(status: u16, content_type: &str, body: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, content_type)
        .body(full(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap_or_else(|_| internal())
}

fn refusal(status: u16, code: &str, message: &str) -> Response<Body> {
    let errors = json!({ "errors": [{ "code": code, "message": message }] });
    whole(status, "application/json", &errors.to_string())
}

fn redirect(location: &str) -> Response<Body> {
    Response::builder()
        .status(307)
        .header(header::LOCATION, location)
        .body(empty())
        .unwrap_or_else(|_| internal())
}

fn created(repository: &str, digest: &Digest) -> Response<Body> {
    Response::builder()
        .status(201)
        .header(header::LOCATION, format!("/v2/{repository}/blobs/{digest}"))
        .header("docker-content-digest", digest.to_string())
        .body(empty())
        .unwrap_or_else(|_| internal())
}

fn unsatisfiable(size: u64, said: Option<u64>) -> Response<Body> {
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

fn internal() -> Response<Body> {
    let mut reply = Response::new(empty());
    *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    reply
}
