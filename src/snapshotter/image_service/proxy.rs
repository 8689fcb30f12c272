//! Passes requests of the CRI image service on to containerd, and its answers back, frame by frame.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::http2::{self, SendRequest},
    header::{self, HeaderMap},
    http::request,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::UnixStream, sync::Mutex};
use tonic::{Code, Status};

use super::pull;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    keeper::{self, FdStore},
    source::pull_credentials::{self, MAX_KEPT_BYTES, Pull},
};

/// The name of the credentials in the descriptor store.
const KEPT: &str = "pull-credentials";
/// The service that is passed on.
const SERVICE: &str = "/runtime.v1.ImageService/";
/// The method with credentials.
const PULL: &str = "/runtime.v1.ImageService/PullImage";
/// Maximum size of the messages of a pull, in bytes: that of the kubelet and of containerd.
const MAX_PULL_BYTES: usize = 16 << 20;

/// The body of a request or an answer.
type ProxyBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// Takes over the credentials of pulls that the daemon before has kept: before its layers are served, which may need them.
pub(crate) fn take_over_credentials(service: &mut keeper::Service) {
    if let Some(kept) = service.take_inherited_bytes(KEPT, MAX_KEPT_BYTES) {
        pull_credentials::take_over(&kept);
    }
}

/// The image service of a containerd.
pub(in crate::snapshotter) struct ImageServiceProxy {
    containerd: PathBuf,
    /// Keeps the credentials for the next daemon.
    store: FdStore,
    /// The connection that all requests share.
    connection: Mutex<Option<SendRequest<ProxyBody>>>,
}

impl ImageServiceProxy {
    /// `containerd`: its socket.
    pub(in crate::snapshotter) fn new(containerd: &Path, store: FdStore) -> Arc<Self> {
        Arc::new(Self {
            containerd: containerd.to_owned(),
            store,
            connection: Mutex::default(),
        })
    }

    /// Whether a request is one for the image service.
    pub(in crate::snapshotter) fn is_asked<B>(request: &Request<B>) -> bool {
        request.uri().path().starts_with(SERVICE)
    }

    /// Answers a request.
    pub(in crate::snapshotter) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ProxyBody>, Infallible> {
        let is_asked = Self::is_asked(&request);
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        let answered = if !is_asked {
            Err(Status::unimplemented(format!(
                "{path:?}: this socket has the image service runtime.v1 only; use the socket of containerd for others"
            )))
        } else if path == PULL {
            self.pull(parts, body).await
        } else {
            self.pass(parts, boxed(body)).await.map_err(status)
        };
        Ok(answered.unwrap_or_else(|status| refusal(&status)))
    }

    async fn pull(
        &self,
        parts: request::Parts,
        body: Incoming,
    ) -> Result<Response<ProxyBody>, Status> {
        let body = Limited::new(body, MAX_PULL_BYTES).collect().await;
        let body = body.map_err(|error| Status::resource_exhausted(format!("a pull: {error}")))?;
        let body = body.to_bytes();
        let pull = pull::begin(&body).unwrap_or_else(|error| {
            tracing::warn!(
                "the credentials of a pull are not noted: {}",
                error.report()
            );
            None
        });
        let body = Full::new(body).map_err(|never| match never {});
        let answer = self
            .pass(parts, body.boxed_unsync())
            .await
            .map_err(status)?;
        match pull {
            Some(pull) => self.end(answer, pull).await,
            None => Ok(answer),
        }
    }

    /// Sends a request to containerd.
    async fn pass(&self, parts: request::Parts, body: ProxyBody) -> Result<Response<ProxyBody>> {
        let mut request = Request::new(body);
        let path = parts.uri.path_and_query().map_or("/", |it| it.as_str());
        let uri = format!("http://localhost{path}").parse();
        *request.uri_mut() = uri.or_kind(Kind::InvalidArgument, || "the path".to_owned())?;
        *request.method_mut() = parts.method;
        *request.headers_mut() = parts.headers;
        request.headers_mut().remove(header::HOST);
        let answer = self.connection().await?.send_request(request).await;
        let answer = answer.or_kind(Kind::Unavailable, || self.context())?;
        Ok(answer.map(boxed))
    }

    /// The connection to containerd, which may have been started again.
    async fn connection(&self) -> Result<SendRequest<ProxyBody>> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = &mut *current
            && connection.ready().await.is_ok()
        {
            return Ok(connection.clone());
        }
        let unreachable = || self.context();
        let stream = UnixStream::connect(&self.containerd).await;
        let stream = stream.or_kind(Kind::Unavailable, unreachable)?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .or_kind(Kind::Unavailable, unreachable)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "containerd's image service disconnected");
            }
        });
        *current = Some(sender.clone());
        Ok(sender)
    }

    /// Waits for the end of a pull: its credentials are kept if it has succeeded.
    async fn end(
        &self,
        answer: Response<ProxyBody>,
        pull: Pull,
    ) -> Result<Response<ProxyBody>, Status> {
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, MAX_PULL_BYTES).collect().await;
        let body = body.map_err(|error| {
            Status::unavailable(format!("containerd's answer to a pull: {error}"))
        })?;
        let trailers = body.trailers().cloned();
        let is_done =
            |headers: &HeaderMap| headers.get(Status::GRPC_STATUS).map(|code| code == "0");
        let told = trailers.as_ref().and_then(is_done);
        if told.or_else(|| is_done(&parts.headers)) == Some(true) {
            pull.succeeded();
            let kept = self.store.put_bytes(KEPT, &pull_credentials::kept_bytes());
            if let Err(error) = kept {
                tracing::warn!("{}", error.report());
            }
        }
        let body = body.to_bytes();
        // a status without a message is in the headers, with which the answer must end
        let body = match trailers {
            None if body.is_empty() => ProxyBody::default(),
            trailers => Full::new(body)
                .map_err(|never| match never {})
                .with_trailers(async move { trailers.map(Ok) })
                .boxed_unsync(),
        };
        Ok(Response::from_parts(parts, body))
    }

    fn context(&self) -> String {
        format!(
            "containerd's image service at {}",
            self.containerd.display()
        )
    }
}

fn boxed(body: Incoming) -> ProxyBody {
    body.boxed_unsync()
}

fn status(error: Error) -> Status {
    let code = match error.kind() {
        Kind::Unavailable => Code::Unavailable,
        _ => Code::InvalidArgument,
    };
    Status::new(code, error.report())
}

/// An answer without a message.
fn refusal(status: &Status) -> Response<ProxyBody> {
    status.clone().into_http()
}
