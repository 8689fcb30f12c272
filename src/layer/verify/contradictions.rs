//! The ways in which a table may contradict its layer.

use crate::{gzip::inflate, oci::Digest, units::SpanId, ztoc::HeaderMismatch};

/// What a table says of a span, and the span does not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableContradiction {
    /// It does not decode, or to less.
    #[error("it does not decode as the table says")]
    Data(#[source] inflate::Error),
    /// It has less, in a plain tar.
    #[error("it has {found} bytes, and the table states {expected}")]
    Length { expected: u64, found: usize },
    /// It decodes to more: the offsets are wrong.
    #[error("it decodes to more than the {expected} bytes that the table states")]
    Surplus { expected: u64 },
    /// The 32 KiB before the next span are others than those that the table has for it.
    #[error("it does not end with the window that the table has for span {next}")]
    Window { next: SpanId },
    /// What was found elsewhere.
    #[error(transparent)]
    Refuted(Refutation),
    /// It refers to bytes before it that the stated window does not have.
    #[error("it refers to bytes before it that its stored window does not have")]
    Reference,
    /// A tar header says something else.
    #[error(transparent)]
    Header(HeaderMismatch),
}

/// What shows that a span is not what the table says, though it decodes well by itself.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refutation {
    /// See [`TableContradiction::Window`], from the other side.
    #[error("the span before it does not end with the window that the table has for it")]
    Window,
    /// A header that lies in several spans says something else, or none is where one should be.
    #[error(transparent)]
    Header(HeaderMismatch),
    /// All spans together are another layer.
    #[error("by its table the layer has the diff ID {found}, and the image states {expected}")]
    DiffId { found: Digest, expected: Digest },
    /// What was found before the daemon was started again.
    #[error("it was taken back before: {0}")]
    Earlier(String),
}
