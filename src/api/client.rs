//! The command line's side.

use std::{
    io::{ErrorKind, Write},
    os::fd::OwnedFd,
    os::unix::net::UnixStream as StdUnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{AttachLine, DaemonInfo, Failure, control_socket, mounts_socket};
use crate::{
    engine::{AttachRequest, Attachment, AttachmentStatus, Event, Explanation},
    error::{Error, Kind, Result, ResultExt},
};

/// Bytes of an answer, or of a line of one, at most.
const ANSWER_LIMIT: usize = 64 << 20;

/// How often a daemon that ends its connections is asked who it is, and the pause in between.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// The daemon of a run directory.
#[derive(Clone, Debug)]
pub struct Client {
    run_dir: PathBuf,
}

/// An attachment that waits to be mounted. The daemon takes it back when this is dropped, or its process dies, before
/// [`Client::mounted`].
pub struct Offer {
    /// What is attached.
    pub attachment: Attachment,
    /// The daemon sees its end.
    _answer: Incoming,
}

impl Client {
    /// A client; connects at each request.
    pub fn new(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
        }
    }

    /// Who answers; `None` when no daemon does. One that is dying may take connections until its last socket is closed, and end them:
    /// it is asked again, until it is gone or answers.
    pub async fn daemon(&self) -> Result<Option<DaemonInfo>> {
        let mut tries = TRIES;
        loop {
            if !self.is_listening().await? {
                return Ok(None);
            }
            tries -= 1;
            match self.get("/v1/daemon").await {
                Err(error) if error.kind() == Kind::Unavailable && tries > 0 => {
                    tokio::time::sleep(PAUSE).await;
                }
                answer => return answer.map(Some),
            }
        }
    }

    async fn is_listening(&self) -> Result<bool> {
        let socket = control_socket(&self.run_dir);
        match UnixStream::connect(&socket).await {
            Ok(_) => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error).or_kind(Kind::Unavailable, || {
                format!("connecting to the daemon at {}", socket.display())
            }),
        }
    }

    /// All attachments.
    pub async fn attachments(&self) -> Result<Vec<AttachmentStatus>> {
        self.get("/v1/attachments").await
    }

    /// Why an attachment is as it is.
    pub async fn why(&self, id: &str) -> Result<Explanation> {
        self.get(&format!("/v1/attachments/{id}/why")).await
    }

    /// Attaches; `event` is told what happens. The mount waits to be fetched by [`Client::mount`], as long as the offer is kept.
    pub async fn attach(
        &self,
        request: &AttachRequest,
        event: &(dyn Fn(Event) + Sync),
    ) -> Result<Offer> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let mut response = self
            .send(Method::POST, "/v1/attachments", body)
            .await?
            .into_body();
        let mut pending = Vec::new();
        while let Some(frame) = response.frame().await {
            let frame = frame.or_kind(Kind::Unavailable, || {
                "the daemon went away while it attached".into()
            })?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                match serde_json::from_slice(&line)
                    .or_kind(Kind::Corrupt, || "reading the daemon's answer".into())?
                {
                    AttachLine::Progress(progress) => event(progress),
                    AttachLine::Attached(attachment) => {
                        return Ok(Offer {
                            attachment: *attachment,
                            _answer: response,
                        });
                    }
                    AttachLine::Failed(failure) => return Err(failure.into_error()),
                }
            }
            if pending.len() > ANSWER_LIMIT {
                break;
            }
        }
        Err(Error::new(
            Kind::Unavailable,
            "the daemon ended its answer before the image was attached; its log says why",
        ))
    }

    /// The descriptor of an attachment's mount. Only once.
    pub fn mount(&self, id: &str) -> Result<OwnedFd> {
        let path = mounts_socket(&self.run_dir);
        let mut socket = StdUnixStream::connect(&path).or_kind(Kind::Unavailable, || {
            format!("connecting to {}", path.display())
        })?;
        socket
            .write_all(format!("{id}\n").as_bytes())
            .or_kind(Kind::Unavailable, || "asking for a mount".into())?;
        crate::kernel::fdpass::receive(&socket)
    }

    /// Tells the daemon that the caller has mounted.
    pub async fn mounted(&self, id: &str) -> Result<()> {
        self.read(
            self.send(
                Method::POST,
                &format!("/v1/attachments/{id}/mounted"),
                Vec::new(),
            )
            .await?,
        )
        .await
    }

    /// Gives an attachment's devices back.
    pub async fn release(&self, id: &str) -> Result<()> {
        self.read(
            self.send(Method::DELETE, &format!("/v1/attachments/{id}"), Vec::new())
                .await?,
        )
        .await
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.read(self.send(Method::GET, path, Vec::new()).await?)
            .await
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Response<Incoming>> {
        let socket = control_socket(&self.run_dir);
        let context = || format!("asking the daemon at {}", socket.display());
        let stream = UnixStream::connect(&socket)
            .await
            .or_kind(Kind::Unavailable, context)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .or_kind(Kind::Unavailable, context)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "socinbd")
            .body(Full::new(Bytes::from(body)))
            .or_kind(Kind::InvalidArgument, context)?;
        let response = sender
            .send_request(request)
            .await
            .or_kind(Kind::Unavailable, context)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.body(response).await?;
        Err(match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => failure.into_error(),
            Err(_) => Error::new(Kind::Unavailable, format!("the daemon answered {status}")),
        })
    }

    async fn read<T: serde::de::DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<T> {
        let body = self.body(response).await?;
        serde_json::from_slice(&body)
            .or_kind(Kind::Corrupt, || "reading the daemon's answer".into())
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes> {
        let body = Limited::new(response.into_body(), ANSWER_LIMIT)
            .collect()
            .await;
        Ok(body
            .or_kind(Kind::Unavailable, || "reading the daemon's answer".into())?
            .to_bytes())
    }
}
