//! The daemon's two sockets, and their files in the run directory.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixListener as StdListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, getsockname, socket_with,
        sockopt,
    },
};
use tokio::net::UnixListener;

use super::{control_socket, mounts_socket};
use crate::{
    error::{Kind, Result, ResultExt as _},
    keeper::{FdStore, Service},
    regular_file,
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
    /// Those of the daemon before, where clients reach them; else those of a socket unit; else new ones.
    pub(super) fn take(run_dir: &Path, service: &mut Service) -> Result<Self> {
        Ok(Self {
            control: Socket::of(CONTROL, &control_socket(run_dir), Some(&mut *service))?,
            mounts: Socket::of(MOUNTS, &mounts_socket(run_dir), Some(service))?,
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
        self.control.is_gone() || self.mounts.is_gone()
    }

    /// Removes the files.
    pub(super) fn remove_files(&self) {
        self.control.remove_file();
        self.mounts.remove_file();
    }
}

/// A socket that listens.
pub(crate) struct Socket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    inode: Option<u64>,
    /// It is not that of a socket unit, which has to stay when the daemon ends.
    is_own: bool,
}

impl Socket {
    /// That of the daemon before, where clients reach it; else that of a socket unit; else a new one.
    pub(crate) fn of(name: &str, path: &Path, service: Option<&mut Service>) -> Result<Self> {
        let Some(service) = service else {
            return Self::bind(name, path, &FdStore::default());
        };
        let inherited = service.take_inherited(name);
        let activated = service.take_activated(|it| is_at(it, path));
        let taken = inherited.and_then(|it| Self::take(it, path, true));
        let taken = taken.or_else(|| {
            let taken = Self::take(activated?, path, false)?;
            // what was there leads nowhere, and the service manager passes this one to each daemon
            if let Err(error) = service.store().remove(name) {
                tracing::warn!("the descriptor store: {}", error.report());
            }
            Some(taken)
        });
        taken.map_or_else(|| Self::bind(name, path, service.store()), Ok)
    }

    /// The listener.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Whether its file was removed; clients cannot connect to it any more.
    pub(crate) fn is_gone(&self) -> bool {
        fs::symlink_metadata(&self.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Removes its file.
    pub(crate) fn remove_file(&self) {
        // where the directory was removed it may be that of another daemon
        if !self.is_own || inode(&self.path) != self.inode {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, socket = %self.path.display(), "removing a socket");
        }
    }

    /// That of the daemon before or of a socket unit, if its file leads to it.
    fn take(inherited: OwnedFd, path: &Path, is_own: bool) -> Option<Self> {
        let listener = StdListener::from(inherited);
        // from now on clients see this process at the other end
        rustix::net::listen(&listener, BACKLOG).ok()?;
        if !leads_here(path).ok()? {
            return None;
        }
        Self::new(listener, path, is_own).ok()
    }

    /// A new one. It replaces a file that is there, and what the store has.
    pub(crate) fn bind(name: &str, path: &Path, store: &FdStore) -> Result<Self> {
        let bind = || {
            regular_file::remove_one(path)?;
            let listener = StdListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Self::new(listener, path, true)
        };
        let socket = bind().or_kind(Kind::Io, || format!("listening on {}", path.display()))?;
        if let Err(error) = store.put(name, &[socket.listener.as_fd()]) {
            tracing::warn!(
                "clients will not wait for the next daemon: {}",
                error.report()
            );
        }
        Ok(socket)
    }

    fn new(listener: StdListener, path: &Path, is_own: bool) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            path: path.to_owned(),
            inode: inode(path),
            is_own,
        })
    }
}

/// Whether a socket is bound to this path. The service manager may have been given the path with symbolic links in it.
fn is_at(socket: BorrowedFd<'_>, path: &Path) -> bool {
    let bound = || {
        let address = SocketAddrUnix::try_from(getsockname(socket).ok()?).ok()?;
        let bound = Path::new(OsStr::from_bytes(address.path_bytes()?)).to_owned();
        Some(bound.canonicalize().unwrap_or(bound))
    };
    let path = path.canonicalize();
    bound().is_some_and(|bound| path.is_ok_and(|path| bound == path))
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
