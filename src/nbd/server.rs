//! Listeners: a thread that accepts, a thread for each connection, and a way to stop them all.

use std::{
    collections::HashMap,
    fmt, io,
    net::{Shutdown, SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::{Mode, chmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use tokio::runtime::Handle;

use super::{
    connection::{HANDSHAKE_LIMIT, serve},
    export::Exports,
    stream::Stream,
};
use crate::error::{Error, Kind, Result, ResultExt, report};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Stack of a connection's thread. Nothing there is deep.
const STACK: usize = 256 << 10;

/// Maximum time for connections to answer their requests when the server stops; then their sockets are closed.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Limits for the clients of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at one time; each costs a thread and up to 1.3 MiB. More are closed as they come.
    pub connections: usize,
    /// From connecting to the transmission.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake: HANDSHAKE_LIMIT,
        }
    }
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Address {
    /// The URI of an export here, as the NBD URI specification has it (doc/uri.md).
    pub fn uri(&self, export: &str) -> String {
        // characters that are not plain in a path or query are escaped
        const ESCAPED: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
            .remove(b'-')
            .remove(b'.')
            .remove(b'_')
            .remove(b'~')
            .remove(b'/')
            .remove(b':');
        let export = percent_encoding::utf8_percent_encode(export, ESCAPED);
        match self {
            Self::Unix(path) => {
                use std::os::unix::ffi::OsStrExt as _;
                let path = percent_encoding::percent_encode(path.as_os_str().as_bytes(), ESCAPED);
                format!("nbd+unix:///{export}?socket={path}")
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix socket {}", path.display()),
            Self::Tcp(address) => write!(f, "tcp {address}"),
        }
    }
}

/// A listener and its connections. Dropped, it stops.
pub struct Server {
    address: Address,
    /// The inode of the socket. A file with another inode is not removed.
    file: Option<u64>,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on a Unix socket that only its owner can connect to. A socket file that no process listens on is replaced. The file is
    /// removed when the server stops.
    pub fn listen_unix(
        path: &Path,
        exports: Arc<Exports>,
        runtime: Handle,
        limits: Limits,
    ) -> Result<Self> {
        let listener = bind_unix(path)?;
        let address = Address::Unix(path.to_owned());
        let accept = Accept::Unix(listener);
        Self::start(address, accept, exports, runtime, limits)
    }

    /// Listens on a TCP address. There is no authentication: any client that can connect can read.
    pub fn listen_tcp(
        address: SocketAddr,
        exports: Arc<Exports>,
        runtime: Handle,
        limits: Limits,
    ) -> Result<Self> {
        let listening = || format!("listening on {address}");
        let listener = TcpListener::bind(address).or_kind(Kind::Io, listening)?;
        let address = listener.local_addr().or_kind(Kind::Io, listening)?;
        let accept = Accept::Tcp(listener);
        Self::start(Address::Tcp(address), accept, exports, runtime, limits)
    }

    fn start(
        address: Address,
        accept: Accept,
        exports: Arc<Exports>,
        runtime: Handle,
        limits: Limits,
    ) -> Result<Self> {
        let starting = || format!("starting the server on {address}");
        let stop = eventfd(0, EventfdFlags::CLOEXEC).or_kind(Kind::Io, starting)?;
        accept.set_nonblocking().or_kind(Kind::Io, starting)?;
        let shared = Arc::new(Shared {
            exports,
            runtime,
            limits,
            stop,
            connections: Mutex::default(),
            ended: Condvar::new(),
        });
        let accepting = thread::Builder::new()
            .name("nbd-accept".into())
            .stack_size(STACK)
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept_all(&accept)
            })
            .or_kind(Kind::Io, starting)?;
        let file = match &address {
            Address::Unix(path) => inode(path),
            Address::Tcp(_) => None,
        };
        Ok(Self {
            address,
            file,
            shared,
            accepting: Some(accepting),
        })
    }

    /// The address that it listens on; port zero is replaced by the real port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connections at the moment.
    pub fn connections(&self) -> usize {
        self.shared.connections().open.len()
    }

    /// Stops the server: it accepts no more connections, lets existing connections answer their requests, and returns when all have ended.
    pub fn stop(mut self) {
        self.stop_all();
    }

    fn stop_all(&mut self) {
        let Some(accepting) = self.accepting.take() else {
            return;
        };
        // an eventfd takes this value, and the thread is there to see it
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        let _ = accepting.join();
        if let Address::Unix(path) = &self.address
            && inode(path) == self.file
        {
            let _ = std::fs::remove_file(path); // gone already is as good
        }
        self.shared.end_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_all();
    }
}

fn inode(path: &Path) -> Option<u64> {
    let there = std::fs::symlink_metadata(path).ok()?;
    Some(there.ino())
}

/// A Unix socket of mode 0600. The mode of its file is set before it listens, so other users can never connect.
fn bind_unix(path: &Path) -> Result<UnixListener> {
    let listening = || format!("listening on unix socket {}", path.display());
    let address = SocketAddrUnix::new(path).or_kind(Kind::InvalidArgument, || {
        format!(
            "the socket path {} is too long: at most 107 bytes",
            path.display()
        )
    })?;
    let kind = SocketType::STREAM;
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .or_kind(Kind::Io, listening)?;
    if bind(&socket, &address).is_err() {
        match UnixStream::connect(path) {
            Ok(_) => {
                return Err(Error::new(
                    Kind::Busy,
                    format!("another process is listening on {}", path.display()),
                ));
            }
            // a stale socket; connecting to a regular file is refused with the same error
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let there = std::fs::symlink_metadata(path).or_kind(Kind::Io, listening)?;
                if !there.file_type().is_socket() {
                    return Err(Error::new(
                        Kind::InvalidArgument,
                        format!("{} exists and is not a socket", path.display()),
                    ));
                }
                std::fs::remove_file(path).or_kind(Kind::Io, listening)?;
            }
            Err(_) => {} // the second bind says what is wrong
        }
        bind(&socket, &address).or_kind(Kind::Io, listening)?;
    }
    chmod(path, Mode::RUSR | Mode::WUSR).or_kind(Kind::Io, listening)?;
    listen(&socket, BACKLOG).or_kind(Kind::Io, listening)?;
    Ok(UnixListener::from(socket))
}

enum Accept {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Accept {
    /// a client that disconnects between poll and accept must not block the thread
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| stream.into()),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| stream.into()),
        }
    }

    fn poll_fd(&self) -> PollFd<'_> {
        match self {
            Self::Unix(listener) => PollFd::new(listener, PollFlags::IN),
            Self::Tcp(listener) => PollFd::new(listener, PollFlags::IN),
        }
    }
}

struct Shared {
    exports: Arc<Exports>,
    runtime: Handle,
    limits: Limits,
    stop: OwnedFd,
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Default)]
struct Connections {
    next: u64,
    /// A second descriptor of each connection's socket, to end it by.
    open: HashMap<u64, Stream>,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_all(self: &Arc<Self>, accept: &Accept) {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
                accept.poll_fd(),
            ];
            let _ = poll(&mut fds, None); // interrupted: accept says that there is nothing
            if fds[0].revents().contains(PollFlags::IN) {
                return;
            }
            match accept.accept() {
                Ok(stream) => self.connect(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // out of descriptors or memory: the client stays in the backlog, and this must not spin
                    tracing::warn!("cannot accept an nbd connection: {}", report(&error));
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn connect(self: &Arc<Self>, stream: Stream) {
        let id = {
            let mut connections = self.connections();
            if connections.open.len() >= self.limits.connections {
                tracing::debug!(limit = self.limits.connections, "too many nbd connections");
                return;
            }
            let second = match stream.try_clone() {
                Ok(second) => second,
                Err(error) => {
                    // the client sees its connection closed
                    tracing::warn!("an nbd connection is closed: {}", report(&error));
                    return;
                }
            };
            connections.next += 1;
            let id = connections.next;
            connections.open.insert(id, second);
            id
        };
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("nbd".into())
            .stack_size(STACK)
            .spawn(move || {
                let _ended = Ended {
                    shared: &shared,
                    id,
                };
                let stream = stream; // closed before the connection counts as ended
                let result = serve(
                    &stream,
                    &shared.exports,
                    &shared.runtime,
                    shared.limits.handshake,
                );
                if let Err(error) = result {
                    tracing::debug!(connection = id, %error, "nbd connection ended");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start a thread for an nbd connection");
            self.connections().open.remove(&id);
        }
    }

    /// Ends all connections: first those that read or wait, then, after a while, those that write to a client that does not read.
    fn end_all(&self) {
        for (how, limit) in [(Shutdown::Read, Some(STOP_LIMIT)), (Shutdown::Both, None)] {
            let connections = self.connections();
            for stream in connections.open.values() {
                let _ = stream.shutdown(how); // closed already is as good
            }
            let is_open = |connections: &mut Connections| !connections.open.is_empty();
            match limit {
                Some(limit) => drop(self.ended.wait_timeout_while(connections, limit, is_open)),
                None => drop(self.ended.wait_while(connections, is_open)),
            }
        }
    }
}

/// Takes a connection off the list when its thread ends, in whatever way.
struct Ended<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.shared.connections().open.remove(&self.id);
        self.shared.ended.notify_all();
    }
}
