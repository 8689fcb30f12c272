//! The ways in which a table can contradict the bytes of its layer.

use crate::{gzip::inflate, oci::Digest, units::SpanId, ztoc::HeaderMismatch};

/// A contradiction between a table and the bytes of a span.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableContradiction {
    /// The span does not decode, or its output is too short.
    #[error("it does not decode as the table says")]
    Data(#[source] inflate::Error),
    /// In a plain tar: the span is too short.
    #[error("it has {found} bytes, but the table states {expected}")]
    Length { expected: u64, found: usize },
    /// The span's output is too long: the offsets are wrong.
    #[error("it decodes to more than the {expected} bytes that the table states")]
    Surplus { expected: u64 },
    /// The span's output does not end with the window that the table has for the next span.
    #[error("it does not end with the window that the table has for span {next}")]
    Window { next: SpanId },
    /// The span was revoked.
    #[error(transparent)]
    Refuted(Refutation),
    /// The span refers to bytes before it that the stated window does not have.
    #[error("it refers to bytes before it that its stored window does not have")]
    Reference,
    /// A tar header differs from the table's entry.
    #[error(transparent)]
    Header(HeaderMismatch),
}

/// Evidence that a span contradicts its table, although the span alone does not show it.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refutation {
    /// See [`TableContradiction::Window`]: the same, found at the span before.
    #[error("the previous span does not end with the window that the table has for this one")]
    Window,
    /// A tar header that is in several spans differs from the table's entry, or there is none where one should be.
    #[error(transparent)]
    Header(HeaderMismatch),
    /// All spans together are not the layer.
    #[error("with this table the layer has the diff ID {found}, but the image states {expected}")]
    DiffId { found: Digest, expected: Digest },
    /// Evidence that was found before the daemon was restarted.
    #[error("it was revoked before: {0}")]
    Earlier(String),
}
