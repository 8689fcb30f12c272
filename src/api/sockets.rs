//! The daemon's two sockets, and their files in the run directory.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixListener as StdListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt},
};
use tokio::net::UnixListener;

use super::{control_socket, mounts_socket};
use crate::{
    error::{Kind, Result, ResultExt as _},
    keeper::{FdStore, Service},
};

/// The sockets' names in the descriptor store.
const CONTROL: &str = "control";
const MOUNTS: &str = "mounts";
/// Clients that may wait until they are accepted.
const BACKLOG: i32 = 128;

/// Both sockets.
pub(super) struct Sockets {
    pub(super) control: Socket,
    pub(super) mounts: Socket,
}

impl Sockets {
    /// Those of the daemon before, where clients reach them; else new ones.
    pub(super) fn take(run_dir: &Path, service: &mut Service) -> Result<Self> {
        let mut take = |name, path: PathBuf| {
            let inherited = service.take_inherited(name);
            let taken = inherited.and_then(|it| Socket::take(it, &path));
            taken.map_or_else(|| Socket::bind(name, &path, service.store()), Ok)
        };
        Ok(Self {
            control: take(CONTROL, control_socket(run_dir))?,
            mounts: take(MOUNTS, mounts_socket(run_dir))?,
        })
    }

    /// New ones. They replace files that are there, and what the store has.
    pub(super) fn bind(run_dir: &Path, store: &FdStore) -> Result<Self> {
        Ok(Self {
            control: Socket::bind(CONTROL, &control_socket(run_dir), store)?,
            mounts: Socket::bind(MOUNTS, &mounts_socket(run_dir), store)?,
        })
    }

    /// Whether one of the files was removed; clients cannot connect to it any more.
    pub(super) fn are_gone(&self) -> bool {
        let is_gone = |socket: &Socket| {
            fs::symlink_metadata(&socket.path)
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        is_gone(&self.control) || is_gone(&self.mounts)
    }

    /// Removes the files.
    pub(super) fn remove_files(&self) {
        for socket in [&self.control, &self.mounts] {
            // where the run directory was removed it may be that of another daemon
            if inode(&socket.path) != socket.inode {
                continue;
            }
            if let Err(error) = fs::remove_file(&socket.path) {
                tracing::debug!(%error, socket = %socket.path.display(), "removing a socket");
            }
        }
    }
}

/// A socket that listens.
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    inode: Option<u64>,
}

impl Socket {
    /// That of the daemon before, if its file leads to it.
    fn take(inherited: OwnedFd, path: &Path) -> Option<Self> {
        let listener = StdListener::from(inherited);
        // from now on clients see this process at the other end
        rustix::net::listen(&listener, BACKLOG).ok()?;
        if !leads_here(path).ok()? {
            return None;
        }
        Self::new(listener, path).ok()
    }

    fn bind(name: &str, path: &Path, store: &FdStore) -> Result<Self> {
        let bind = || {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = StdListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Self::new(listener, path)
        };
        let socket = bind().or_kind(Kind::Io, || format!("listening on {}", path.display()))?;
        if let Err(error) = store.put(name, socket.listener.as_fd()) {
            tracing::warn!(
                "clients will not wait for the next daemon: {}",
                error.report()
            );
        }
        Ok(socket)
    }

    fn new(listener: StdListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            path: path.to_owned(),
            inode: inode(path),
        })
    }
}

/// Whether the file leads to a socket of this process.
fn leads_here(path: &Path) -> Result<bool, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {
            let peer = sockopt::socket_peercred(&socket)?;
            Ok(peer.pid == rustix::process::getpid())
        }
        // clients have filled the queue; nobody else has the run directory
        Err(Errno::AGAIN) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// The number of a file.
fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path)
        .ok()
        .map(|metadata| metadata.ino())
}
