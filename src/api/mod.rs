//! The API between the command line and the daemon: HTTP/1.1 with JSON on the Unix socket `<run-dir>/socinbd.sock`.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /metrics` | | the metrics of the daemon, for Prometheus (`docs/metrics.md`) |
//! | `GET /v1/openapi.json` | | the OpenAPI document of this API |
//! | `GET /v1/daemon` | | [`DaemonInfo`] |
//! | `POST /v1/hand-over` | [`HandOver`] | all that has begun is complete; the daemon ends, and the next one starts |
//! | `GET /v1/attachments` | | a list of [`AttachmentStatus`](crate::engine::AttachmentStatus) |
//! | `GET /v1/layers` | | a list of [`LayerStatus`](crate::engine::LayerStatus) |
//! | `POST /v1/attachments` | [`AttachRequest`](crate::engine::AttachRequest) | lines of JSON, each an [`AttachLine`]; the last is `attached`, `failed` or `ending` |
//! | `GET /v1/attachments/ID/why` | | an [`Explanation`](crate::engine::Explanation) |
//! | `GET /v1/attachments/ID/fetches` | | a [`FetchReport`](crate::engine::FetchReport) |
//! | `POST /v1/attachments/ID/mounted` | | the caller has mounted it; from now on it is kept, if the request has asked for it |
//! | `POST /v1/disks/check` | [`CheckRequest`](crate::engine::examine::check::CheckRequest) | lines of JSON, each a [`CheckLine`]; the last is `done` or `failed` |
//! | `GET /v1/disks` | | a [`SpaceReport`](crate::engine::space::usage::SpaceReport) |
//! | `POST /v1/disks/prune` | [`PruneRequest`](crate::engine::space::prune::PruneRequest) | a [`PruneReport`](crate::engine::space::prune::PruneReport) |
//! | `POST /v1/images/pin` | [`PinRequest`] | the image is pinned, or is not any more; an [`ImageRecord`](crate::engine::space::image_record::ImageRecord) |
//! | `DELETE /v1/attachments/ID` | | its devices are released (or have been before), and it is not kept any more; `Busy` while they are in use |
//! | `DELETE /v1/attachments/ID?keep` | | the same, but a kept attachment stays kept |
//! | `POST /v1/config/reload` | | reads the configuration file again; a [`Reloaded`](control::Reloaded) |
//! | `GET /v1/log` | | the filter of the log: a [`LogFilter`](control::LogFilter) |
//! | `POST /v1/log` | [`LogFilter`](control::LogFilter) | the filter is changed; the new one |
//! | `POST /v1/restore` | | attaches kept attachments that are not attached; a list of [`RestoreResult`], one for each kept attachment |
//!
//! The body of an error is a [`Failure`], with the HTTP status of its kind. The descriptor of a mount is passed over `<run-dir>/mounts.sock`:
//! the client writes the ID of the attachment and a newline, and receives the descriptor with `SCM_RIGHTS`. The client makes the last
//! `move_mount` itself, so that it works from its own mount namespace. The answer to an attach ends when the client has sent `mounted`; if
//! the client disconnects before that, its attachment is released. What a request has begun is completed even if its client disconnects.

pub mod body;
pub mod client;
mod connection;
pub mod control;
pub mod metrics;
pub mod openapi;
pub mod routes;
pub mod server;
pub(crate) mod sockets;
mod space;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    engine::{
        Attachment, Formats, OpenEvent, RestoredAttachment, ServingProgram,
        examine::check::CheckEvent,
    },
    error::{Error, Kind},
    oci::Reference,
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
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
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
    /// The program that runs.
    #[serde(default)]
    pub program: Option<ServingProgram>,
    /// The versions of what it leaves to the next daemon.
    #[serde(default)]
    pub formats: Option<Formats>,
}

/// A request to be replaced by another daemon.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct HandOver {
    /// The program of the next daemon.
    pub program: PathBuf,
}

/// A request to pin an image, or to unpin it.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PinRequest {
    /// The reference by which it was opened.
    pub reference: Reference,
    /// Whether its disks stay although nobody uses them.
    pub pinned: bool,
}

/// One line of the answer to an attach.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
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
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckLine {
    /// A line of the answer to a check.
    Event(CheckEvent),
    /// All has been looked at.
    Done,
    /// It was broken off.
    Failed(Failure),
}

/// The result for one kept attachment.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RestoreResult {
    /// Its ID.
    pub id: String,
    /// The attachment; none if its record cannot be read.
    pub attachment: Option<Attachment>,
    /// Why it is not attached; none if it is.
    pub failure: Option<Failure>,
}

impl From<RestoredAttachment> for RestoreResult {
    fn from(restored: RestoredAttachment) -> Self {
        Self {
            id: restored.id,
            attachment: restored.attachment,
            failure: restored.result.as_ref().err().map(Failure::from),
        }
    }
}

/// An error on the wire.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Failure {
    /// Its kind, e.g. `not_found`.
    pub kind: String,
    /// The whole report.
    pub message: String,
}

/// The HTTP status of a kind of error.
pub fn status_of(kind: Kind) -> u16 {
    match kind {
        Kind::Corrupt => 422,
        Kind::Unsupported => 501,
        Kind::NotFound => 404,
        Kind::Unauthorized => 403,
        Kind::Unavailable => 503,
        Kind::Busy | Kind::Immutable => 409,
        Kind::InvalidArgument => 400,
        Kind::Io | Kind::Kernel => 500,
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            kind: error.kind().name().to_owned(),
            message: error.report(),
        }
    }
}

impl Failure {
    /// The error that was put on the wire.
    pub fn into_error(self) -> Error {
        Error::new(Kind::of_name(&self.kind).unwrap_or(Kind::Io), self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for (kind, name) in Kind::ALL {
            let failure = Failure::from(&Error::new(kind, "text"));
            assert_eq!(failure.kind, name);
            assert_eq!(failure.into_error().kind(), kind);
        }
    }
}
