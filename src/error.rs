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
    /// Credentials are missing or refused, or a verifier has refused an image.
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

impl Kind {
    /// All kinds, with their names for programs, in the order of the declaration.
    pub const ALL: [(Self, &'static str); 10] = [
        (Self::Corrupt, "corrupt"),
        (Self::Unsupported, "unsupported"),
        (Self::NotFound, "not_found"),
        (Self::Unauthorized, "unauthorized"),
        (Self::Unavailable, "unavailable"),
        (Self::Busy, "busy"),
        (Self::Immutable, "immutable"),
        (Self::Kernel, "kernel"),
        (Self::InvalidArgument, "invalid_argument"),
        (Self::Io, "io"),
    ];

    /// The name for programs, e.g. `not_found`.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1 // a test compares the orders
    }

    /// The kind with this name.
    pub fn of_name(name: &str) -> Option<Self> {
        let known = Self::ALL.iter().find(|known| known.1 == name);
        known.map(|known| known.0)
    }
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

    /// The same kind and report in an error that several can hold.
    pub fn to_shared(&self) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self::new(self.kind, self.report()))
    }

    /// The source of a type, however deep: what a caller asks for that has to tell causes of the same kind apart.
    pub fn cause<T: std::error::Error + 'static>(&self) -> Option<&T> {
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            next = error.source();
        }
        None
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
    if let Some(advice) = advice(&text) {
        text.push_str(" (");
        text.push_str(advice);
        text.push(')');
    }
    text
}

/// Errors that a limit of the process or of the machine makes, as [`std::io::Error`] ends their text, and what the person can do. They are
/// known by their text: many libraries hand on no more of what was underneath.
const LIMITS: [(&str, &str); 5] = [
    (
        "(os error 24)",
        "the limit of open files is used up: raise LimitNOFILE= of the service, or `ulimit -n` of the shell that starts the process",
    ),
    (
        "(os error 23)",
        "the machine's limit of open files is used up: raise the sysctl fs.file-max",
    ),
    (
        "(os error 27)",
        "a limit forbids files of this size: raise LimitFSIZE= of the service, or `ulimit -f` of the shell that starts the process",
    ),
    (
        "(os error 28)",
        "the file system is full: remove what is not needed there, or make it larger",
    ),
    (
        "(os error 122)",
        "the disk quota is used up: remove what is not needed, or raise the quota",
    ),
];

/// What to do about an error of this text. One that has the advice already gets none.
fn advice(text: &str) -> Option<&'static str> {
    let (_, advice) = LIMITS.iter().find(|(mark, _)| text.contains(mark))?;
    (!text.contains(advice)).then_some(advice)
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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn limits_are_named_once_with_what_to_do() {
        for (code, words) in [
            (24, "ulimit -n"),
            (23, "fs.file-max"),
            (27, "ulimit -f"),
            (28, "full"),
        ] {
            let error =
                Error::with_source(Kind::Io, "opening it", io::Error::from_raw_os_error(code));
            assert_eq!(
                error.report().matches(words).count(),
                1,
                "{}",
                error.report()
            );
            // handed on as text
            let again = Error::new(Kind::Io, error.report()).context("attaching");
            assert_eq!(
                again.report().matches(words).count(),
                1,
                "{}",
                again.report()
            );
        }
        let other = Error::with_source(Kind::Io, "x", io::Error::from_raw_os_error(2));
        assert!(!other.report().contains("ulimit"), "{}", other.report());
    }
}
