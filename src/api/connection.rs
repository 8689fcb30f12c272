//! The connection of a client to the daemon: sends requests, reads answers, and says why there is none.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use super::{DaemonInfo, Failure, control_socket};
use crate::error::{Error, Kind, Result, ResultExt};

/// Bytes of an answer, or of a line of one, at most.
const ANSWER_LIMIT: usize = 64 << 20;

/// How many times a daemon that closes its connections is asked for its identity, and the pause in between.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Maximum time for an answer that takes the daemon no work. A daemon that takes longer does not run: it is stopped, frozen, or out of
/// some resource.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(7);
/// How often a daemon that works for an answer is asked whether it runs.
const PULSE: Duration = Duration::from_secs(2);

/// The daemon of a runtime directory.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) run_dir: PathBuf,
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

    /// As [`Self::daemon`]; `NotFound` if none answers.
    pub async fn running_daemon(&self) -> Result<DaemonInfo> {
        self.daemon().await?.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("no daemon is running at {}", self.run_dir.display()),
            )
        })
    }

    pub(super) async fn find_daemon(&self) -> Result<Option<DaemonInfo>> {
        let mut tries = TRIES;
        loop {
            if !self.is_listening().await? {
                return Ok(None);
            }
            tries -= 1;
            match self.ask_once(Method::GET, "/v1/daemon").await {
                Err(RequestError::Lost(_)) if tries > 0 => tokio::time::sleep(PAUSE).await,
                answer => return answer.map(Some).map_err(RequestError::into_error),
            }
        }
    }

    pub(super) async fn is_listening(&self) -> Result<bool> {
        let socket = control_socket(&self.run_dir);
        match connect(&socket).await {
            Ok(_) => Ok(true),
            Err(error) if is_absence(error.kind()) => Ok(false),
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
    pub(super) async fn soon<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        match timeout(ANSWER_TIME, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(self.does_not_answer().await),
        }
    }

    /// Waits for an answer that takes work, without a limit, as long as the daemon reports that it runs.
    pub(super) async fn patiently<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
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
    pub(super) async fn does_not_answer(&self) -> Error {
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

    pub(super) async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.soon(self.ask(Method::GET, path)).await
    }

    pub(super) async fn post<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        request: &impl serde::Serialize,
    ) -> Result<T> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let asked = async { self.read(self.send(Method::POST, path, body).await?).await };
        self.patiently(async { asked.await.map_err(RequestError::into_error) })
            .await
    }

    /// Sends a request that may be sent twice, and once more if the daemon ends meanwhile and another one follows it.
    pub(super) async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
    ) -> Result<T> {
        let mut tries = TRIES;
        loop {
            tries -= 1;
            match self.ask_once(method.clone(), path).await {
                Err(RequestError::Lost(_)) if tries > 0 && self.is_listening().await? => {
                    tokio::time::sleep(PAUSE).await;
                }
                answer => return answer.map_err(RequestError::into_error),
            }
        }
    }

    pub(super) async fn ask_once<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
    ) -> Result<T, RequestError> {
        self.read(self.send(method, path, Vec::new()).await?).await
    }

    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, RequestError> {
        let socket = control_socket(&self.run_dir);
        let context = || format!("sending a request to the daemon at {}", socket.display());
        let stream = match connect(&socket).await {
            Ok(stream) => stream,
            Err(error) => {
                let of_kind = match is_absence(error.kind()) {
                    true => RequestError::Lost,
                    false => RequestError::Other,
                };
                return Err(of_kind(Error::with_source(
                    Kind::Unavailable,
                    context(),
                    error,
                )));
            }
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .or_kind(Kind::Unavailable, context)
            .map_err(RequestError::Lost)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "socinbd")
            .body(Full::new(Bytes::from(body)))
            .or_kind(Kind::InvalidArgument, context)
            .map_err(RequestError::Other)?;
        let response = sender
            .send_request(request)
            .await
            .or_kind(Kind::Unavailable, context)
            .map_err(RequestError::Lost)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.body(response).await?;
        Err(RequestError::Other(
            match serde_json::from_slice::<Failure>(&body) {
                Ok(failure) => failure.into_error(),
                Err(_) => Error::new(Kind::Unavailable, format!("the daemon answered {status}")),
            },
        ))
    }

    /// The next line of an answer; `None` at its end. `pending` has the bytes after the last line.
    pub(super) async fn next_line<T: serde::de::DeserializeOwned>(
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
            // an error: the connection is lost
            let Some(Ok(frame)) = frame.await? else {
                return Ok(None);
            };
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        }
    }

    pub(super) async fn read<T: serde::de::DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<T, RequestError> {
        let body = self.body(response).await?;
        serde_json::from_slice(&body)
            .or_kind(Kind::Corrupt, || "reading the daemon's answer".into())
            .map_err(RequestError::Other)
    }

    pub(super) async fn body(&self, response: Response<Incoming>) -> Result<Bytes, RequestError> {
        let body = Limited::new(response.into_body(), ANSWER_LIMIT)
            .collect()
            .await;
        Ok(body
            .or_kind(Kind::Unavailable, || "reading the daemon's answer".into())
            .map_err(RequestError::Lost)?
            .to_bytes())
    }
}

/// Why a request has failed.
pub(super) enum RequestError {
    /// The connection ended before the answer: the daemon has ended.
    Lost(Error),
    Other(Error),
}

impl RequestError {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Lost(error) | Self::Other(error) => error,
        }
    }
}

/// Whether an error of [`connect`] says that no daemon listens.
fn is_absence(error: ErrorKind) -> bool {
    matches!(error, ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}

/// Connects. If the backlog of the socket is full, this waits; the caller has a time limit.
pub(super) async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            // the queue of connections is full, or was closed with this one in it: another daemon may listen by now
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionReset
                ) =>
            {
                tokio::time::sleep(PAUSE).await;
            }
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

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixListener,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;

    #[tokio::test]
    async fn a_daemon_that_ends_between_two_connections_is_not_found() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let socket = control_socket(folder.path());
            let listener = UnixListener::bind(&socket).unwrap();
            let daemon = std::thread::spawn(move || {
                drop(listener.accept().unwrap());
                std::fs::remove_file(&socket).unwrap();
            });
            let found = Client::new(folder.path()).find_daemon().await;
            assert!(found.unwrap().is_none());
            daemon.join().unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_daemon_that_ends_before_it_accepts_is_none_that_listens() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let ended = std::sync::Arc::new(AtomicBool::new(false));
        let daemons = {
            let (socket, ended) = (socket.clone(), std::sync::Arc::clone(&ended));
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    drop(UnixListener::bind(&socket).unwrap());
                    std::fs::remove_file(&socket).unwrap();
                }
            })
        };
        for _ in 0..200 {
            if let Err(error) = connect(&socket).await {
                assert!(is_absence(error.kind()), "{error}");
            }
        }
        ended.store(true, Ordering::Relaxed);
        daemons.join().unwrap();
    }
}
