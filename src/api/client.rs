//! The client side of the daemon's API, for the command line.

use std::{
    io::ErrorKind,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, net::UnixStream, time::timeout};

use super::{AttachLine, CheckLine, DaemonInfo, Failure, control_socket, mounts_socket};
use crate::{
    engine::{
        AttachRequest, Attachment, AttachmentStatus, Explanation, OpenEvent,
        examine::check::{CheckEvent, CheckRequest},
    },
    error::{Error, Kind, Result, ResultExt},
};

/// Bytes of an answer, or of a line of one, at most.
const ANSWER_LIMIT: usize = 64 << 20;

/// How many times a daemon that closes its connections is asked for its identity, and the pause in between.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Maximum time for an answer that takes the daemon no work. A daemon that takes longer does not run: it is stopped, frozen, or out of
/// some resource.
const ANSWER_TIME: Duration = Duration::from_secs(7);
/// How often a daemon that works for an answer is asked whether it runs.
const PULSE: Duration = Duration::from_secs(2);

/// The daemon of a runtime directory.
#[derive(Clone, Debug)]
pub struct Client {
    run_dir: PathBuf,
}

/// An attachment that waits to be mounted. The daemon takes it back when this is dropped, or its process dies, before
/// [`Client::mounted`].
pub struct Offer {
    /// The attachment.
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

    /// The daemon that answers, or `None`. A daemon that is exiting may accept connections until its last socket is closed, and close
    /// them: it is asked again until it is gone or answers.
    pub async fn daemon(&self) -> Result<Option<DaemonInfo>> {
        self.soon(self.find_daemon()).await
    }

    async fn find_daemon(&self) -> Result<Option<DaemonInfo>> {
        let mut tries = TRIES;
        loop {
            if !self.is_listening().await? {
                return Ok(None);
            }
            tries -= 1;
            match self.ask(Method::GET, "/v1/daemon").await {
                Err(error) if error.kind() == Kind::Unavailable && tries > 0 => {
                    tokio::time::sleep(PAUSE).await;
                }
                answer => return answer.map(Some),
            }
        }
    }

    async fn is_listening(&self) -> Result<bool> {
        let socket = control_socket(&self.run_dir);
        match connect(&socket).await {
            Ok(_) => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(false)
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => Err(Error::with_source(
                Kind::InvalidArgument,
                format!(
                    "--run-dir {} is too long: a socket's path has at most 107 bytes",
                    self.run_dir.display()
                ),
                error,
            )),
            Err(error) => Err(error).or_kind(Kind::Unavailable, || {
                format!("connecting to the daemon at {}", socket.display())
            }),
        }
    }

    /// Waits for an answer that the daemon need not work for.
    async fn soon<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        match timeout(ANSWER_TIME, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(self.does_not_answer().await),
        }
    }

    /// Waits for an answer that takes work, without a limit, as long as the daemon reports that it runs.
    async fn patiently<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let pulse = async {
            loop {
                tokio::time::sleep(PULSE).await;
                let asked = timeout(
                    ANSWER_TIME,
                    self.send(Method::GET, "/v1/daemon", Vec::new()),
                );
                if asked.await.is_err() {
                    return self.does_not_answer().await;
                }
            }
        };
        tokio::select! {
            biased;
            answer = answer => answer,
            error = pulse => Err(error),
        }
    }

    /// The error for a daemon that accepts connections and does not answer, with the cause as far as this process can see it.
    async fn does_not_answer(&self) -> Error {
        let socket = control_socket(&self.run_dir);
        let peer = match timeout(PULSE, connect(&socket)).await {
            Ok(Ok(stream)) => rustix::net::sockopt::socket_peercred(&stream).ok(),
            _ => None,
        };
        let pid = peer.map(|peer| peer.pid.as_raw_nonzero());
        let stat = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let is_stopped = stat.is_some_and(|stat| {
            let state = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.chars().next());
            matches!(state, Some('T' | 't'))
        });
        let process = pid.map_or(String::new(), |pid| format!(", process {pid},"));
        let why = match (pid, is_stopped) {
            (Some(pid), true) => format!("it is stopped; continue it with `kill -CONT {pid}`"),
            _ => "it is frozen, out of open files, or the machine is overloaded; its log may say more"
                .to_owned(),
        };
        Error::new(
            Kind::Unavailable,
            format!(
                "the daemon at {}{process} does not answer: {why}",
                socket.display()
            ),
        )
    }

    /// All attachments.
    pub async fn attachments(&self) -> Result<Vec<AttachmentStatus>> {
        self.get("/v1/attachments").await
    }

    /// Why an attachment is as it is.
    pub async fn why(&self, id: &str) -> Result<Explanation> {
        self.get(&format!("/v1/attachments/{id}/why")).await
    }

    /// Attaches an image; `event` receives the progress. The mount can be fetched with [`Client::mount`] as long as the offer is kept.
    /// `None`: the daemon is shutting down, and a new one has to be asked.
    pub async fn attach(
        &self,
        request: &AttachRequest,
        event: &(dyn Fn(OpenEvent) + Sync),
    ) -> Result<Option<Offer>> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let asked = self.send(Method::POST, "/v1/attachments", body);
        let mut response = self.soon(asked).await?.into_body();
        let mut pending = Vec::new();
        while let Some(line) = self.next_line(&mut response, &mut pending).await? {
            match line {
                AttachLine::Progress(progress) => event(progress),
                AttachLine::Attached(attachment) => {
                    return Ok(Some(Offer {
                        attachment: *attachment,
                        _answer: response,
                    }));
                }
                AttachLine::Failed(failure) => return Err(failure.into_error()),
                AttachLine::Ending => return Ok(None),
            }
        }
        Err(Error::new(
            Kind::Unavailable,
            "the daemon closed the connection before the image was attached; see its log",
        ))
    }

    /// Checks disks; `event` receives the progress.
    pub async fn check(
        &self,
        request: &CheckRequest,
        event: &(dyn Fn(CheckEvent) + Sync),
    ) -> Result<()> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let asked = self.send(Method::POST, "/v1/disks/check", body);
        let mut response = self.soon(asked).await?.into_body();
        let mut pending = Vec::new();
        while let Some(line) = self.next_line(&mut response, &mut pending).await? {
            match line {
                CheckLine::Event(happened) => event(happened),
                CheckLine::Done => return Ok(()),
                CheckLine::Failed(failure) => return Err(failure.into_error()),
            }
        }
        Err(Error::new(
            Kind::Unavailable,
            "the daemon closed the connection before the check was complete; see its log",
        ))
    }

    /// The next line of an answer; `None` at its end. `pending` has the bytes after the last line.
    async fn next_line<T: serde::de::DeserializeOwned>(
        &self,
        response: &mut Incoming,
        pending: &mut Vec<u8>,
    ) -> Result<Option<T>> {
        loop {
            if let Some(line) = take_line(pending)? {
                return Ok(Some(line));
            }
            if pending.len() > ANSWER_LIMIT {
                return Ok(None);
            }
            let frame = self.patiently(async { Ok(response.frame().await) });
            let Some(frame) = frame.await? else {
                return Ok(None);
            };
            let frame = frame.or_kind(Kind::Unavailable, || {
                "the daemon closed the connection within its answer".into()
            })?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        }
    }

    /// The descriptor of an attachment's mount. Only once.
    pub async fn mount(&self, id: &str) -> Result<OwnedFd> {
        let path = mounts_socket(&self.run_dir);
        let asking = || format!("requesting a mount at {}", path.display());
        let asked = async {
            let mut socket = connect(&path).await?;
            socket.write_all(format!("{id}\n").as_bytes()).await?;
            socket.readable().await?;
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(ANSWER_TIME))?;
            Ok::<_, std::io::Error>(socket)
        };
        let asked = async { asked.await.or_kind(Kind::Unavailable, asking) };
        crate::kernel::fdpass::receive(&self.soon(asked).await?)
    }

    /// Tells the daemon that the caller has mounted.
    pub async fn mounted(&self, id: &str) -> Result<()> {
        let path = format!("/v1/attachments/{id}/mounted");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Gives an attachment's devices back.
    pub async fn release(&self, id: &str) -> Result<()> {
        let path = format!("/v1/attachments/{id}");
        self.patiently(self.ask(Method::DELETE, &path)).await
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.soon(self.ask(Method::GET, path)).await
    }

    async fn ask<T: serde::de::DeserializeOwned>(&self, method: Method, path: &str) -> Result<T> {
        self.read(self.send(method, path, Vec::new()).await?).await
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Response<Incoming>> {
        let socket = control_socket(&self.run_dir);
        let context = || format!("sending a request to the daemon at {}", socket.display());
        let stream = connect(&socket).await.or_kind(Kind::Unavailable, context)?;
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

/// Connects. If the backlog of the socket is full, this waits; the caller has a time limit.
async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::time::sleep(PAUSE).await,
            connected => return connected,
        }
    }
}

/// Takes a complete line from the received bytes.
fn take_line<T: serde::de::DeserializeOwned>(pending: &mut Vec<u8>) -> Result<Option<T>> {
    let Some(end) = pending.iter().position(|&byte| byte == b'\n') else {
        return Ok(None);
    };
    let line: Vec<u8> = pending.drain(..=end).collect();
    serde_json::from_slice(&line)
        .map(Some)
        .or_kind(Kind::Corrupt, || "reading the daemon's answer".into())
}
