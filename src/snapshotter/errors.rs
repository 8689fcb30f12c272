//! Errors of requests, as containerd's `errdefs` knows them.

use tonic::Status;

use crate::error::{Error, Kind};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is no such snapshot.
    #[error("{0}: not found")]
    NotFound(String),
    /// There is one by this name.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The snapshot is not of the kind that the request needs.
    #[error("{0}: failed precondition")]
    FailedPrecondition(String),
    /// The request is wrong.
    #[error("{0}: invalid argument")]
    InvalidArgument(String),
    /// All else.
    #[error(transparent)]
    Other(#[from] Error),
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        let message = match &error {
            SnapshotError::Other(error) => error.report(),
            other => other.to_string(),
        };
        match &error {
            SnapshotError::NotFound(_) => Self::not_found(message),
            SnapshotError::AlreadyExists(_) => Self::already_exists(message),
            SnapshotError::FailedPrecondition(_) => Self::failed_precondition(message),
            SnapshotError::InvalidArgument(_) => Self::invalid_argument(message),
            SnapshotError::Other(error) => match error.kind() {
                Kind::NotFound => Self::not_found(message),
                Kind::InvalidArgument => Self::invalid_argument(message),
                Kind::Busy | Kind::Immutable => Self::failed_precondition(message),
                Kind::Unauthorized => Self::permission_denied(message),
                Kind::Unavailable => Self::unavailable(message),
                Kind::Unsupported => Self::unimplemented(message),
                Kind::Corrupt | Kind::Kernel | Kind::Io => Self::internal(message),
            },
        }
    }
}
