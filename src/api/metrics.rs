//! `GET /metrics`, on the control socket and on an address of its own.

use std::{
    convert::Infallible, fs, net::SocketAddr, os::unix::fs::FileTypeExt as _, path::PathBuf,
    str::FromStr, sync::Arc, time::Duration,
};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, body::Incoming, header::ACCEPT,
    server::conn::http1, service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use super::{
    Failure,
    body::{self, Body, json},
    status_of,
};
use crate::{
    engine::{Engine, MetricsFormat},
    error::{Error, Kind, Result, ResultExt as _, report},
};

/// Maximum number of connections of scrapers. More wait until they are accepted.
const CONNECTIONS: usize = 8;
/// Maximum time between two requests of a connection, and for receiving one.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// Maximum duration of a connection: a scraper that does not read the answer must not take its place for ever.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// How long it is waited when an address cannot be used yet, or no connection can be accepted.
const PAUSE: Duration = Duration::from_secs(1);

/// The metrics in the form that the client accepts.
pub(super) async fn answer(engine: &Engine, headers: &HeaderMap) -> Result<Response<Body>> {
    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = MetricsFormat::of_accept(accept);
    let metrics = engine.metrics(format).await?;
    Ok(body::text(format.content_type(), metrics))
}

/// An address for scrapers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.starts_with('/') {
                true => Ok(Self::Unix(path.into())),
                false => Err("the path after `unix:` must be absolute".to_owned()),
            };
        }
        let address = text.parse().map(Self::Tcp);
        address.map_err(|_| {
            "expected an IP address with a port, e.g. 127.0.0.1:9101 or [::]:9101, or unix:/path"
                .to_owned()
        })
    }
}

impl std::fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Answers scrapers at an address, until it is dropped.
pub struct MetricsServer {
    engine: Arc<Engine>,
    address: MetricsAddress,
    /// `None` if the address could not be used.
    listener: Option<Listener>,
}

impl MetricsServer {
    /// Uses the address.
    pub async fn bind(engine: Arc<Engine>, address: MetricsAddress) -> Result<Self> {
        Ok(Self {
            listener: Some(listen(&address).await?),
            engine,
            address,
        })
    }

    /// As [`Self::bind`], for a daemon that must run in any case: if the address cannot be used, it is tried again.
    pub async fn bind_later(engine: Arc<Engine>, address: MetricsAddress) -> Self {
        let listener = listen(&address).await.inspect_err(|error| {
            tracing::warn!("{}; this is tried again", error.report());
        });
        Self {
            listener: listener.ok(),
            engine,
            address,
        }
    }

    /// Answers until it is dropped.
    pub async fn run(self) -> Infallible {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let mut listener = self.listener;
        loop {
            let Some(open) = &listener else {
                tokio::time::sleep(PAUSE).await;
                listener = listen(&self.address).await.ok();
                continue;
            };
            // never closed
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
                std::future::pending().await
            };
            let engine = Arc::clone(&self.engine);
            let accepted = match open {
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move {
                        serve(engine, stream).await;
                        drop(permit);
                    });
                }),
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move {
                        serve(engine, stream).await;
                        drop(permit);
                    });
                }),
            };
            if let Err(error) = accepted {
                tracing::warn!("accepting a scraper: {}", report(&error));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn listen(address: &MetricsAddress) -> Result<Listener> {
    let bound = match address {
        MetricsAddress::Tcp(address) => TcpListener::bind(address).await.map(Listener::Tcp),
        MetricsAddress::Unix(path) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Err(std::io::ErrorKind::AddrInUse.into()),
            Err(_) => {
                // of a process that has ended; another kind of file is that of a person
                if fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) {
                    drop(fs::remove_file(path)); // else the next call fails
                }
                UnixListener::bind(path).map(Listener::Unix)
            }
        },
    };
    bound.or_kind(Kind::Unavailable, || {
        format!("metrics cannot be served at {address} (--metrics-address)")
    })
}

async fn serve(engine: Arc<Engine>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request: Request<Incoming>| {
        let engine = Arc::clone(&engine);
        async move {
            let answered = match (request.method(), request.uri().path()) {
                (&Method::GET, "/metrics") => answer(&engine, request.headers()).await,
                _ => Err(Error::new(
                    Kind::NotFound,
                    "GET /metrics is all that is here",
                )),
            };
            Ok::<_, Infallible>(answered.unwrap_or_else(|error| {
                let status = StatusCode::from_u16(status_of(error.kind()));
                json(
                    status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                    &Failure::from(&error),
                )
            }))
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIME, connection).await {
        tracing::debug!(%error, "a scraper disconnected");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ip_addresses_with_a_port_or_paths() {
        for text in ["127.0.0.1:9101", "[::1]:0", "unix:/run/a.sock"] {
            let address: MetricsAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        for text in ["", "9101", ":9101", "localhost:9101", "127.0.0.1", "unix:a"] {
            assert!(text.parse::<MetricsAddress>().is_err(), "{text}");
        }
    }
}
