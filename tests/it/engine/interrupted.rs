//! Clients that are killed at every await: what they have begun is done, what nobody takes is given back, and what is in use stays.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    pin::Pin,
    process::Command,
    sync::{Arc, mpsc},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use serde_json::{Value, json};
use socinbd::{
    api::{
        client::{AttachAnswer, Client},
        server::Server,
    },
    engine::{AttachRequest, DeviceChoice, Engine, open::policy::IndexChoice},
    error::Kind,
    kernel::mount,
    layer::FillPolicy,
    source::Access,
};

use super::{Host, lifecycle::indexed};
use crate::{
    soci::make::MadeLayout,
    support::{
        noise,
        registry::{Fault, On, Registry, Times},
        succeeds,
        tars::Layer,
        wait,
    },
};

/// Bytes of the file; its layer has a span for each 64 KiB of them.
const SIZE: usize = 4 << 20;

/// A client that is killed after so many polls: `None` if it was not done by then.
struct Killed<F> {
    client: Pin<Box<F>>,
    polls: usize,
}

impl<F: Future> Killed<F> {
    fn after(polls: usize, client: F) -> Self {
        Self {
            client: Box::pin(client),
            polls,
        }
    }
}

impl<F: Future> Future for Killed<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            return Poll::Ready(None);
        }
        self.polls -= 1;
        match self.client.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if self.polls == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// A writable attachment of an image.
pub fn request(image: &str, mountpoint: Option<&Path>) -> AttachRequest {
    AttachRequest {
        reference: image.parse().unwrap(),
        access: Access::default(),
        platform: None,
        index: IndexChoice::default(),
        device: DeviceChoice::Auto,
        writable: true,
        allow_devices: false,
        mountpoint: mountpoint.map(Path::to_owned),
        keep: false,
        fill: FillPolicy::Auto,
    }
}

/// Asks a daemon; the status and the lines of its answer.
async fn ask(
    server: Arc<Server>,
    method: Method,
    path: String,
    body: Vec<u8>,
) -> (u16, Vec<Value>) {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Full::new(Bytes::from(body))).unwrap();
    let Ok(answer) = server.answer(request).await;
    let status = answer.status().as_u16();
    let mut body = answer.into_body();
    let mut lines = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.unwrap();
        lines.push(serde_json::from_slice(frame.data_ref().unwrap()).unwrap());
        tokio::task::yield_now().await; // each line is a poll of its own
        // the rest of the answer to an attach comes when the mount has been taken
        if lines
            .last()
            .is_some_and(|line: &Value| line["attached"].is_object())
        {
            break;
        }
    }
    (status, lines)
}

/// A runtime, and a daemon of this host in this process.
fn daemon(host: &Host) -> (tokio::runtime::Runtime, Arc<Engine>, Arc<Server>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (root, run_dir) = (host.root(), host.run_dir());
    let engine = runtime.block_on(Engine::open(&root, &run_dir)).unwrap();
    let server = {
        let _runtime = runtime.enter();
        Server::bind(Arc::clone(&engine), None, None).unwrap()
    };
    (runtime, engine, server)
}

#[test]
fn an_attach_whose_client_is_killed_at_any_await_leaves_nothing() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", &noise(SIZE))]);
    let (runtime, engine, server) = daemon(&host);
    let request = request(&layout.reference(""), None);
    let body = serde_json::to_vec(&request).unwrap();
    let path = "/v1/attachments".to_owned();
    // what had begun may not have come to the table yet
    let is_empty = || runtime.block_on(engine.list()).unwrap().is_empty();
    let wait_given_back = || {
        wait("all is given back", || {
            is_empty() && host.left_over().is_empty()
        });
    };
    // by the request's future, and by the engine's own, which `attach --foreground` and `record` drop
    let mut kills = 0;
    for polls in 0.. {
        let client = ask(
            Arc::clone(&server),
            Method::POST,
            path.clone(),
            body.clone(),
        );
        let answer = runtime.block_on(Killed::after(polls, client));
        wait_given_back();
        if let Some((status, lines)) = answer {
            assert_eq!(status, 200);
            assert!(lines.last().unwrap()["attached"].is_object(), "{lines:?}");
            break;
        }
        kills += 1;
    }
    for polls in 0.. {
        let attach = engine.attach(request.clone(), &|_| {});
        let attached = runtime.block_on(Killed::after(polls, attach));
        let is_done = attached.is_some();
        drop(attached.transpose().unwrap());
        wait_given_back();
        if is_done {
            break;
        }
        kills += 1;
    }
    assert!(kills > 4, "they have been killed half way");
    runtime.block_on(engine.end());
    assert_eq!(host.left_over(), [""; 0]);
}

/// The one thread that a runtime has for what blocks, held until this is dropped: nothing is begun then that blocks.
struct Held {
    _let_go: mpsc::Sender<()>,
}

impl Held {
    fn new(runtime: &tokio::runtime::Runtime) -> Self {
        let (let_go, is_held) = Self::ask(runtime);
        is_held.recv().unwrap();
        Self { _let_go: let_go }
    }

    /// Lets what waits for the thread by now have it, and nothing that is begun by that.
    fn step(&mut self, runtime: &tokio::runtime::Runtime) {
        let (let_go, is_held) = Self::ask(runtime);
        self._let_go = let_go;
        is_held.recv().unwrap();
    }

    fn ask(runtime: &tokio::runtime::Runtime) -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
        let (started, is_held) = mpsc::channel();
        let (let_go, held) = mpsc::channel();
        runtime.spawn_blocking(move || {
            started.send(()).unwrap();
            held.recv().unwrap_err();
        });
        (let_go, is_held)
    }
}

/// Polls a client so often. From before the last poll until what is given is dropped nothing is begun that blocks. What the client has come
/// to, if to anything.
fn polled_while_work_waits<F: Future>(
    runtime: &tokio::runtime::Runtime,
    polls: usize,
    client: &mut Pin<Box<F>>,
) -> (Option<F::Output>, Option<Held>) {
    let (mut left, mut held) = (polls, None);
    let output = runtime.block_on(std::future::poll_fn(|context| {
        left -= 1;
        if left == 0 {
            held = Some(Held::new(runtime));
        }
        match client.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }));
    (output, held)
}

/// A host with a complete disk: what blocks in an attach of its image needs no other work that blocks. And a runtime with one thread for
/// that.
fn host_of_a_complete_disk() -> (Host, MadeLayout, tokio::runtime::Runtime) {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", &noise(100_000))]);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    fs::read(mountpoint.join("f")).unwrap();
    host.wait_complete(&mountpoint);
    host.detach(&mountpoint);
    host.end_daemon();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    (host, layout, runtime)
}

#[test]
fn an_attach_that_is_dropped_before_its_work_begins_leaves_nothing() {
    let (host, layout, runtime) = host_of_a_complete_disk();
    let (root, run_dir) = (host.root(), host.run_dir());
    let engine = runtime.block_on(Engine::open(&root, &run_dir)).unwrap();
    let request = request(&layout.reference(""), None);
    for polls in 1.. {
        let mut attach = Box::pin(engine.attach(request.clone(), &|_| {}));
        let (attached, let_go) = polled_while_work_waits(&runtime, polls, &mut attach);
        drop(attach);
        drop(let_go);
        let is_done = attached.is_some();
        drop(attached.transpose().unwrap());
        wait("all is given back", || {
            runtime.block_on(engine.list()).unwrap().is_empty() && host.left_over().is_empty()
        });
        if is_done {
            assert!(polls > 1, "it has been dropped half way");
            break;
        }
    }
    runtime.block_on(engine.end());
}

/// The mount is being made when the engine begins to end.
#[test]
fn what_is_made_while_its_engine_ends_is_refused_and_leaves_nothing() {
    let (host, layout, runtime) = host_of_a_complete_disk();
    let (root, run_dir) = (host.root(), host.run_dir());
    let engine = runtime.block_on(Engine::open(&root, &run_dir)).unwrap();
    let request = request(&layout.reference(""), None);
    let mut held = Held::new(&runtime);
    let attaching = Arc::clone(&engine);
    let attach = runtime.spawn(async move { attaching.attach(request, &|_| {}).await });
    // one piece of work after another, until the mount is begun; its first piece waits then
    while engine.is_idle() {
        held.step(&runtime);
    }
    let ended = Arc::clone(&engine);
    let ended = runtime.spawn(async move { ended.end().await });
    wait("it is ending", || engine.is_ending());
    drop(held);
    let attached = runtime.block_on(attach).unwrap();
    let error = attached.map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
    assert!(
        error.report().contains("is shutting down"),
        "{}",
        error.report()
    );
    runtime.block_on(ended).unwrap();
    assert!(engine.is_idle());
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn an_attach_that_waits_for_a_registry_is_refused_when_its_engine_ends() {
    let host = Host::new();
    let registry = Registry::start();
    registry.fail(On::Any, Fault::Hang, Times::UntilHealed);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (root, run_dir) = (host.root(), host.run_dir());
    let engine = runtime.block_on(Engine::open(&root, &run_dir)).unwrap();
    let request = request(&registry.reference("app:1"), None);
    let attaching = Arc::clone(&engine);
    let attach = runtime.spawn(async move { attaching.attach(request, &|_| {}).await });
    wait("the registry is asked", || {
        registry.counters().total().requests > 0
    });
    runtime.block_on(engine.end());
    let attached = runtime.block_on(attach).unwrap();
    let error = attached.map(drop).unwrap_err();
    assert!(
        error.report().contains("is shutting down"),
        "{}",
        error.report()
    );
}

#[test]
fn a_request_whose_client_is_killed_at_any_await_leaves_an_image_in_use_as_it_is() {
    let host = Host::new();
    let content = noise(SIZE);
    let layout = indexed(&host, vec![Layer::new().file("f", &content)]);
    let (runtime, engine, server) = daemon(&host);
    let mountpoint = host.mountpoint("mnt");
    let request = request(&layout.reference(""), Some(&mountpoint));
    let attached = runtime.block_on(engine.attach(request, &|_| {})).unwrap();
    let id = attached.attachment.id.clone();
    mount::attach(attached.mount.as_fd(), &mountpoint).unwrap();
    drop(attached);
    engine.mounted(&id).unwrap();
    // in use, and mounted nowhere
    let file = File::open(mountpoint.join("f")).unwrap();
    succeeds(Command::new("umount").arg("-l").arg(&mountpoint));
    let listed = || runtime.block_on(engine.list()).unwrap();
    let states = || -> Vec<_> { listed().iter().map(|it| it.state.to_string()).collect() };
    // another test's mount namespace may have a copy of it for a moment
    wait("it is unmounted", || states() == ["unmounted"]);
    let mut asked = 0;
    for (method, path, status) in [
        (Method::GET, "/v1/daemon".to_owned(), 200),
        (Method::GET, "/v1/attachments".to_owned(), 200),
        (Method::GET, format!("/v1/attachments/{id}/why"), 200),
        (Method::POST, format!("/v1/attachments/{id}/mounted"), 200),
        (Method::DELETE, format!("/v1/attachments/{id}"), 409),
    ] {
        for polls in 0.. {
            let client = ask(
                Arc::clone(&server),
                method.clone(),
                path.clone(),
                Vec::new(),
            );
            let answer = runtime.block_on(Killed::after(polls, client));
            // what is absent comes
            asked += 1;
            let (offset, mut piece) = (asked * 100_000, [0; 5000]);
            file.read_exact_at(&mut piece, offset as u64).unwrap();
            assert!(
                piece == content[offset..offset + piece.len()],
                "{method} {path} {polls}"
            );
            assert_eq!(states(), ["unmounted"], "{method} {path} {polls}");
            if let Some((answered, lines)) = answer {
                assert_eq!(answered, status, "{lines:?}");
                break;
            }
        }
    }
    drop(file);
    // a client that is killed at once is enough
    let client = ask(
        server,
        Method::DELETE,
        format!("/v1/attachments/{id}"),
        Vec::new(),
    );
    runtime.block_on(Killed::after(1, client));
    wait("it is given back", || host.left_over().is_empty());
    runtime.block_on(engine.end());
}

#[test]
fn a_detach_whose_client_is_killed_leaves_an_image_in_use_as_it_is() {
    let host = Host::new();
    let content = noise(SIZE);
    let layout = indexed(&host, vec![Layer::new().file("f", &content)]);
    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(&layout.reference(""), &mountpoint, &[]);
    let id = attachment["id"].as_str().unwrap();
    let file = File::open(mountpoint.join("f")).unwrap();
    succeeds(Command::new("umount").arg("-l").arg(&mountpoint));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(&host.run_dir());
    for polls in [2, 3] {
        runtime.block_on(Killed::after(polls, client.release(id)));
    }
    // by its turn the others have come to their ends
    let error = runtime.block_on(client.release(id)).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{}", error.report());
    let own = format!("{} (", std::process::id());
    assert!(error.report().contains(&own), "{}", error.report());
    assert_eq!(host.list()[0]["state"], "unmounted");
    let mut read = vec![0; SIZE];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == content);
    drop(file);
    // one of the others may have had its turn now; what is gone is fine
    runtime.block_on(client.release(id)).unwrap();
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_its_owner_lets_go_of_is_given_back() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", b"f")]);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(&host.run_dir());
    // as `run` does, and as the kernel does for one that is killed
    let request = request(&layout.reference(""), None);
    let offer = runtime.block_on(client.attach(&request, &|_| {}));
    let AttachAnswer::Offer(offer) = offer.unwrap() else {
        panic!("the daemon ends");
    };
    let id = &offer.attachment.id;
    let root = runtime.block_on(client.mount(id)).unwrap();
    runtime.block_on(client.mounted(id)).unwrap();
    assert_eq!(host.list().len(), 2);
    assert!(fs::exists(host.root().join("attachments").join(id).join("upper")).unwrap());
    drop(root);
    wait("the daemon takes it back", || host.list().len() == 1);
    let record = host.root().join("attachments").join(id);
    wait("its files are removed", || !fs::exists(&record).unwrap());
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}
