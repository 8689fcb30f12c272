//! The CRI image service in front of another one, which a test answers.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response, body::Incoming, client::conn::http2, header::HeaderValue,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tempfile::TempDir;
use tokio::{net::UnixListener, net::UnixStream, runtime::Runtime, task::JoinHandle};

use super::{Snapshotter, client::Client};
use crate::support::wait;

const SERVICE: &str = "/runtime.v1.ImageService";

/// A request as it came.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

/// The image service of a containerd, which records what it is asked. It answers with what it got, and then with the status of the method
/// `Status<NUMBER>`; `Hang` is not answered.
struct Containerd {
    asked: Arc<Mutex<Vec<Asked>>>,
    /// Requests that were given up by the client.
    left: Arc<Mutex<usize>>,
    task: JoinHandle<()>,
}

/// Counts itself when it is dropped before its end.
struct Hanging(Arc<Mutex<usize>>);

impl Drop for Hanging {
    fn drop(&mut self) {
        *self.0.lock().unwrap() += 1;
    }
}

impl Containerd {
    fn start(runtime: &Runtime, socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let (asked, left) = (Arc::default(), Arc::default());
        let _in_runtime = runtime.enter();
        let listener = UnixListener::bind(socket).unwrap();
        let (all, gone) = (Arc::clone(&asked), Arc::clone(&left));
        let task = runtime.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (all, gone) = (Arc::clone(&all), Arc::clone(&gone));
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        answer(Arc::clone(&all), Arc::clone(&gone), request)
                    });
                    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { asked, left, task }
    }

    fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

async fn answer(
    all: Arc<Mutex<Vec<Asked>>>,
    left: Arc<Mutex<usize>>,
    request: Request<Incoming>,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    if path.ends_with("/Hang") {
        let _hanging = Hanging(left);
        std::future::pending::<()>().await;
    }
    let body = body.collect().await.unwrap().to_bytes();
    if parts.headers.contains_key("x-refuse") {
        // a status without a message is in the headers, and ends the answer
        let answer = Response::builder().header("grpc-status", "7");
        return Ok(answer.body(BoxBody::default()).unwrap());
    }
    all.lock().unwrap().push(Asked {
        path: path.clone(),
        headers: parts.headers,
        body: body.clone(),
    });
    let status = path.rsplit_once("Status").map_or("0", |(_, status)| status);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_str(status).unwrap());
    trailers.insert("grpc-message", HeaderValue::from_static("told"));
    let answer = Response::builder()
        .header("content-type", "application/grpc")
        .header("x-own", "kept");
    let body = Full::new(body).with_trailers(async move { Some(Ok(trailers)) });
    Ok(answer.body(body.boxed()).unwrap())
}

/// A snapshotter with an image service.
struct Served {
    folder: TempDir,
    runtime: Runtime,
    snapshotter: Snapshotter,
}

/// What was answered: the headers, the body and the trailers.
type Answered = (HeaderMap, Bytes, HeaderMap);

impl Served {
    fn start() -> Self {
        Self::start_with(&[])
    }

    /// With the snapshots at the same socket.
    fn start_shared() -> Self {
        Self::start_with(&["--address"])
    }

    /// `others`: options that have the same socket.
    fn start_with(others: &[&str]) -> Self {
        let folder = TempDir::with_prefix("socinbd-image-service-").unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let socket = at("proxy.sock");
        let containerd = at("containerd.sock");
        let mut options = vec!["--image-service", &socket, "--containerd", &containerd];
        for option in others {
            options.extend([option, socket.as_str()]);
        }
        let snapshotter = Snapshotter::start(&options);
        // its socket is bound after those of the snapshotter
        wait("the image service listens", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        Self {
            snapshotter,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            folder,
        }
    }

    fn containerd(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// Kills the daemon, which another one follows: not before it serves, for then it would be the last.
    fn kill_daemon(&self) {
        self.snapshotter.host.run(&["list"]);
        self.snapshotter.host.kill_served_by_keeper();
    }

    async fn connect(&self) -> http2::SendRequest<Full<Bytes>> {
        let stream = UnixStream::connect(self.folder.path().join("proxy.sock"));
        let stream = TokioIo::new(stream.await.unwrap());
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
        tokio::spawn(connection);
        sender
    }

    /// Asks a method with a message.
    fn ask(&self, path: &str, body: &[u8]) -> Answered {
        let request = Request::post(format!("http://any{path}"))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "50S")
            .header("x-custom", "passed")
            .body(Full::new(Bytes::copy_from_slice(body)))
            .unwrap();
        self.runtime.block_on(async {
            let answer = self.connect().await.send_request(request).await.unwrap();
            assert_eq!(answer.status(), 200);
            let (parts, body) = answer.into_parts();
            let body = body.collect().await.unwrap();
            let trailers = body.trailers().cloned().unwrap_or_default();
            (parts.headers, body.to_bytes(), trailers)
        })
    }
}

/// A message of gRPC.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[0], &length.to_be_bytes()[..], message].concat()
}

#[test]
fn requests_and_answers_are_passed_on_as_they_are() {
    let served = Served::start();
    let containerd = Containerd::start(&served.runtime, &served.containerd());
    // a field that nobody knows, two messages, a megabyte
    let unknown = framed(&[0xfa, 0x3f, 1, b'x']);
    let bodies = [
        Vec::new(),
        unknown.clone(),
        [unknown.clone(), unknown.clone()].concat(),
        framed(&vec![7; 1 << 20]),
    ];
    for body in &bodies {
        for method in ["ListImages", "PullImage", "OfLater", "Status5"] {
            let path = format!("{SERVICE}/{method}");
            let (headers, answered, trailers) = served.ask(&path, body);
            assert_eq!(headers["x-own"], "kept");
            assert!(answered == *body, "{method}");
            let status = if method == "Status5" { "5" } else { "0" };
            assert_eq!(trailers["grpc-status"], status);
            assert_eq!(trailers["grpc-message"], "told");
            let asked = containerd.take().remove(0);
            assert_eq!(asked.path, path);
            assert!(asked.body == *body, "{method}");
            for (name, value) in [
                ("te", "trailers"),
                ("grpc-timeout", "50S"),
                ("x-custom", "passed"),
                ("content-type", "application/grpc"),
            ] {
                assert_eq!(asked.headers[name], value);
            }
        }
    }
    served.snapshotter.end();
}

#[test]
fn a_pull_that_is_refused_ends_with_the_headers() {
    let served = Served::start();
    let _containerd = Containerd::start(&served.runtime, &served.containerd());
    let text = |tag: u8, text: &[u8]| [&[tag << 3 | 2, text.len() as u8], text].concat();
    let image = text(1, &text(1, b"registry.example/app"));
    let auth = text(2, &text(1, b"user"));
    for message in [image.clone(), [image, auth].concat()] {
        let request = Request::post(format!("http://any{SERVICE}/PullImage"))
            .header("x-refuse", "yes")
            .body(Full::new(Bytes::from(framed(&message))))
            .unwrap();
        served.runtime.block_on(async {
            let mut sender = served.connect().await;
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(answer.headers()["grpc-status"], "7");
            assert!(hyper::body::Body::is_end_stream(answer.body()));
        });
    }
    served.snapshotter.end();
}

#[test]
fn other_services_and_a_containerd_that_is_away_are_told() {
    let served = Served::start();
    let list = format!("{SERVICE}/ListImages");
    let (headers, ..) = served.ask(&list, b"");
    assert_eq!(headers["grpc-status"], "14");
    let message = headers["grpc-message"].to_str().unwrap();
    assert!(message.contains("containerd.sock"), "{message}");
    let containerd = Containerd::start(&served.runtime, &served.containerd());
    assert_eq!(served.ask(&list, b"").2["grpc-status"], "0");
    for path in [
        "/runtime.v1.RuntimeService/Version",
        "/runtime.v1.ImageServiceX/ListImages",
        "/",
    ] {
        assert_eq!(served.ask(path, b"").0["grpc-status"], "12", "{path}");
    }
    assert_eq!(containerd.take().len(), 1);
    // it is started again
    containerd.task.abort();
    wait("the connection is gone", || {
        served.ask(&list, b"").0.contains_key("grpc-status")
    });
    let containerd = Containerd::start(&served.runtime, &served.containerd());
    assert_eq!(served.ask(&list, b"").2["grpc-status"], "0");
    assert_eq!(containerd.take().len(), 1);
    // the daemon dies: its socket is that of the next one
    served.kill_daemon();
    assert_eq!(served.ask(&list, b"").2["grpc-status"], "0");
    served.snapshotter.end();
}

#[test]
fn the_image_service_may_have_the_socket_of_the_snapshots() {
    let served = Served::start_shared();
    let socket = served.folder.path().join("proxy.sock");
    let containerd = Containerd::start(&served.runtime, &served.containerd());
    let list = format!("{SERVICE}/ListImages");
    for round in 0..2 {
        let (headers, answered, trailers) = served.ask(&list, b"frames");
        assert_eq!(
            (&headers["x-own"], &answered[..]),
            (&HeaderValue::from_static("kept"), &b"frames"[..])
        );
        assert_eq!(trailers["grpc-status"], "0");
        assert_eq!(containerd.take().len(), 1);
        let client = Client::connect(&socket).unwrap();
        client.prepare(&format!("key-{round}"), "", &[]).unwrap();
        // no other service of containerd
        let (headers, ..) = served.ask("/runtime.v1.RuntimeService/Version", b"");
        assert_eq!(headers["grpc-status"], "12");
        assert_eq!(containerd.take().len(), 0);
        // the socket is that of the next daemon
        served.kill_daemon();
    }
    let client = Client::connect(&socket).unwrap();
    assert_eq!(client.names(&[]).len(), 2);
    client.remove_all();
    served.snapshotter.end();
}

#[test]
fn a_pull_that_is_too_long_is_refused_and_one_that_is_given_up_ends() {
    let served = Served::start();
    let containerd = Containerd::start(&served.runtime, &served.containerd());
    let long = vec![0; (16 << 20) + 1];
    let (headers, ..) = served.ask(&format!("{SERVICE}/PullImage"), &long);
    assert_eq!(headers["grpc-status"], "8");
    assert_eq!(containerd.take().len(), 0);
    served.runtime.block_on(async {
        let mut sender = served.connect().await;
        let request = Request::post(format!("http://any{SERVICE}/Hang"));
        let request = request.body(Full::new(Bytes::new())).unwrap();
        let asking = sender.send_request(request);
        let given_up = tokio::time::timeout(Duration::from_secs(2), asking).await;
        assert!(given_up.is_err());
    });
    wait("containerd is told", || {
        *containerd.left.lock().unwrap() == 1
    });
    served.snapshotter.end();
}
