//! The socket of a keeper: a file in the run directory, which nobody else can reach.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::PermissionsExt as _, net::UnixDatagram},
    },
    path::Path,
};

use tempfile::NamedTempFile;

use crate::{
    error::{Kind, Result, ResultExt as _},
    layer::make_private,
};

/// How the file's name begins; with what follows it is as long as that of the control socket, at most.
const PREFIX: &str = "notify-";
const RANDOM_BYTES: usize = 5;

/// A bound socket; its file goes when this is dropped.
#[derive(Debug)]
pub(super) struct Socket(NamedTempFile<UnixDatagram>);

impl Socket {
    /// Binds a new one in the run directory, which is made where missing.
    pub(super) fn bind(run_dir: &Path) -> Result<Self> {
        make_private(run_dir)?;
        let bind = |path: &Path| {
            let socket = UnixDatagram::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            rustix::net::sockopt::set_socket_passcred(&socket, true)?;
            Ok(socket)
        };
        let mut named = tempfile::Builder::new();
        named.prefix(PREFIX).rand_bytes(RANDOM_BYTES);
        let bound = named.make_in(run_dir, bind).or_kind(Kind::Io, || {
            format!("making a socket in {}", run_dir.display())
        })?;
        Ok(Self(bound))
    }

    /// Its file.
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_file().as_fd()
    }
}

/// Removes the sockets of keepers that were killed.
pub(super) fn remove_stale(run_dir: &Path) {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let connected = UnixDatagram::unbound().and_then(|socket| socket.connect(entry.path()));
        if connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            let _ = fs::remove_file(entry.path()); // somebody else may have
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_that_nobody_has_are_stale() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Socket::bind(folder.path()).unwrap();
        let stale = folder.path().join("notify-aaaaa");
        drop(UnixDatagram::bind(&stale).unwrap());
        let other = folder.path().join("other");
        drop(UnixDatagram::bind(&other).unwrap());
        remove_stale(folder.path());
        assert!(kept.path().exists() && other.exists() && !stale.exists());
        let path = kept.path().to_owned();
        assert_eq!(path.file_name().unwrap().len(), "socinbd.sock".len());
        drop(kept);
        assert!(!path.exists());
    }
}
