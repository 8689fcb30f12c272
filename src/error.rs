//! The error of the crate's boundaries: whose fault it is, what was being done, and what was underneath.
//!
//! Formats have errors of their own with coordinates (`ztoc::Error`, `tar::Error`, ...). Where they cross into levels that do I/O
//! they are wrapped here with a [`Kind`] and a context. `Display` of an [`Error`] is its context alone; [`Error::report`] walks the
//! sources.

use std::fmt;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is. The three exits (NBD errno, HTTP status, exit code) are functions of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Bytes that do not say what they must: a digest, a structure, a length.
    Corrupt,
    /// Well-formed, and not something that this program or this kernel can do.
    Unsupported,
    /// What was named does not exist.
    NotFound,
    /// Credentials are missing or refused.
    Unauthorized,
    /// A peer does not answer, or answers that it cannot now; later may work.
    Unavailable,
    /// In use, by the processes that the context names.
    Busy,
    /// What is there already may not be replaced: a tag that its registry keeps.
    Immutable,
    /// A system call on mounts, devices or sockets of the kernel failed.
    Kernel,
    /// The caller asked for what makes no sense.
    InvalidArgument,
    /// The local disk or another local resource failed.
    Io,
}

/// An error with its kind, its context (operation, image, layer, path, offset) and its source.
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error that has nothing underneath.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error over another one.
    pub fn with_source(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// This error as the source of a wider one of the same kind.
    #[must_use]
    pub fn context(self, context: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            context: context.into(),
            source: Some(Box::new(self)),
        }
    }

    /// The context and every source, joined by `: `.
    pub fn report(&self) -> String {
        report(self)
    }
}

/// What any error says, and every source of it, joined by `: `.
pub fn report(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let line = error.to_string();
        // libraries that repeat their source in their own text are not printed twice
        if !text.ends_with(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        next = error.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.report())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// Adds kind and context to the errors of others.
pub trait ResultExt<T> {
    /// Wraps the error as the source of an [`Error`] with this kind and context.
    fn or_kind(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> ResultExt<T>
    for std::result::Result<T, E>
{
    fn or_kind(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::with_source(kind, context(), source))
    }
}
