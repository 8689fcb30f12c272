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
    fs::File,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::Value;
use socinbd::oci::Digest;
use tokio::{net::TcpListener, sync::oneshot};

mod api;
mod auth;
mod body;
mod counters;
mod fault;
mod reply;
mod request;
mod serve;
mod store;

pub use auth::Auth;
#[allow(unused_imports, reason = "each user of this file uses a part of it")]
pub use auth::DATED_PASSWORD;
pub use counters::{Counters, Entry, Kind};
pub use fault::{Fault, On, Times};
#[allow(unused_imports, reason = "each user of this file uses a part of it")]
pub use reply::base64;

use fault::Rule;
use reply::text;
use serve::serve;
use store::{Data, Repository};

/// Media type of an OCI image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What a body may catch up with when it was woken late: a link does not stand idle because a timer is coarse or the machine busy.
const CATCH_UP: Duration = Duration::from_millis(20);

/// The distance and width of the link: all connections of both listeners share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Added to each connection and to each request.
    pub round_trip: Duration,
    /// Of bodies; 0 is no limit.
    pub bytes_per_second: u64,
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
    keeps_tags: bool,
    redirects: Option<Redirects>,
    signatures: HashMap<String, Instant>,
    link: Link,
    link_free_at: Option<Instant>,
    counters: Counters,
    connections: u64,
    most_connections: u64,
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

    /// From now on a tag that is there is not replaced, as Amazon's registry has it.
    pub fn keep_tags(&self) {
        self.state().keeps_tags = true;
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

    /// The largest number of connections at one time so far.
    pub fn most_connections(&self) -> u64 {
        self.state().most_connections
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

    /// Waits until the link has carried so many bytes, which are there since `ready_at`; gives the time at which it had.
    async fn carry(&self, bytes: u64, ready_at: Instant) -> Instant {
        let until = {
            let mut state = self.state();
            let rate = state.link.bytes_per_second;
            let now = Instant::now();
            if rate == 0 {
                return now;
            }
            let ready_at = now
                .checked_sub(CATCH_UP)
                .map_or(ready_at, |least| ready_at.max(least));
            let free_at = state.link_free_at.unwrap_or(ready_at).max(ready_at);
            let until = free_at + Duration::from_secs_f64(bytes as f64 / rate as f64);
            state.link_free_at = Some(until);
            until
        };
        wait_until(until).await;
        until
    }
}

/// Waits to a tenth of a millisecond: tokio's timer counts whole ones, and a link of 2 ms would have 3.
async fn wait_until(until: Instant) {
    if until <= Instant::now() {
        return;
    }
    let wait = move || std::thread::sleep(until.saturating_duration_since(Instant::now()));
    // it does not panic
    let _ = tokio::task::spawn_blocking(wait).await;
}
