//! The API between the command line and the daemon: HTTP/1.1 with JSON on the Unix socket `<run-dir>/socinbd.sock`.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/daemon` | | [`DaemonInfo`] |
//! | `GET /v1/attachments` | | a list of [`AttachmentStatus`](crate::engine::AttachmentStatus) |
//! | `POST /v1/attachments` | [`AttachRequest`](crate::engine::AttachRequest) | lines of JSON, each an [`AttachLine`]; the last is `attached`, `failed` or `ending` |
//! | `GET /v1/attachments/ID/why` | | an [`Explanation`](crate::engine::Explanation) |
//! | `POST /v1/attachments/ID/mounted` | | the caller has mounted it |
//! | `POST /v1/disks/check` | [`CheckRequest`](crate::engine::examine::check::CheckRequest) | lines of JSON, each a [`CheckLine`]; the last is `done` or `failed` |
//! | `DELETE /v1/attachments/ID` | | its devices are released (or have been before); `Busy` while they are in use |
//!
//! The body of an error is a [`Failure`], with the HTTP status of its kind. The descriptor of a mount is passed over `<run-dir>/mounts.sock`:
//! the client writes the ID of the attachment and a newline, and receives the descriptor with `SCM_RIGHTS`. The client makes the last
//! `move_mount` itself, so that it works from its own mount namespace. The answer to an attach ends when the client has sent `mounted`; if
//! the client disconnects before that, its attachment is released. What a request has begun is completed even if its client disconnects.

pub mod client;
pub mod server;
mod sockets;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    engine::{Attachment, OpenEvent, examine::check::CheckEvent},
    error::{Error, Kind},
};

/// The daemon's HTTP socket.
pub fn control_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("socinbd.sock")
}

/// The socket that hands out mounts.
pub fn mounts_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("mounts.sock")
}

/// The identity of a daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// The program's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Its root.
    pub root: PathBuf,
    /// The daemon is shutting down and refuses attachments.
    #[serde(default)]
    pub is_ending: bool,
}

/// One line of the answer to an attach.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachLine {
    /// A line of the answer to an attach.
    Progress(OpenEvent),
    /// It is attached; its mount waits at `mounts.sock`.
    Attached(Box<Attachment>),
    /// It failed, and nothing is left of it.
    Failed(Failure),
    /// The daemon is ending, and attaches nothing any more: a new one has to be asked.
    Ending,
}

/// One line of the answer to a check.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckLine {
    /// A line of the answer to a check.
    Event(CheckEvent),
    /// All has been looked at.
    Done,
    /// It was broken off.
    Failed(Failure),
}

/// An error on the wire.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Its kind, e.g. `not_found`.
    pub kind: String,
    /// The whole report.
    pub message: String,
}

/// Each kind with its name on the wire and its HTTP status. An unknown name is read as the first.
const KINDS: [(Kind, &str, u16); 10] = [
    (Kind::Io, "io", 500),
    (Kind::Corrupt, "corrupt", 422),
    (Kind::Unsupported, "unsupported", 501),
    (Kind::NotFound, "not_found", 404),
    (Kind::Unauthorized, "unauthorized", 403),
    (Kind::Unavailable, "unavailable", 503),
    (Kind::Busy, "busy", 409),
    (Kind::Immutable, "immutable", 409),
    (Kind::Kernel, "kernel", 500),
    (Kind::InvalidArgument, "invalid_argument", 400),
];

/// The HTTP status of a kind of error.
pub fn status_of(kind: Kind) -> u16 {
    KINDS
        .iter()
        .find(|row| row.0 == kind)
        .map_or(500, |row| row.2)
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let name = KINDS
            .iter()
            .find(|row| row.0 == error.kind())
            .map_or("io", |row| row.1);
        Self {
            kind: name.to_owned(),
            message: error.report(),
        }
    }
}

impl Failure {
    /// The error that was put on the wire.
    pub fn into_error(self) -> Error {
        let row = KINDS.iter().find(|row| row.1 == self.kind);
        Error::new(row.map_or(Kind::Io, |row| row.0), self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for (kind, name, status) in KINDS {
            let failure = Failure::from(&Error::new(kind, "text"));
            assert_eq!((failure.kind.as_str(), status_of(kind)), (name, status));
            assert_eq!(failure.into_error().kind(), kind);
        }
    }
}
