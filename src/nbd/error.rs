//! What can end a connection.

use std::io;

use super::protocol::options::Malformed;

/// Why a connection ended without the client's request. The cause is the client or the network; the server continues.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The socket failed.
    #[error("{doing} failed")]
    Io {
        /// The step that failed.
        doing: &'static str,
        /// The socket's error.
        source: io::Error,
    },
    /// The client went away without `NBD_CMD_DISC` or `NBD_OPT_ABORT`.
    #[error("the client disconnected without NBD_CMD_DISC")]
    Disconnected,
    /// The handshake took too long.
    #[error("the handshake took more than its time limit")]
    HandshakeTimeout,
    /// The client set flags that were not offered.
    #[error("unknown client flags {flags:#x}")]
    ClientFlags {
        /// All its flags.
        flags: u32,
    },
    /// An option does not start with its magic.
    #[error("an option starts with {found:#018x}")]
    OptionMagic {
        /// The value that was received.
        found: u64,
    },
    /// An option has more data than is even skipped.
    #[error("option {option} with {length} bytes of data")]
    OptionLength {
        /// The option.
        option: u32,
        /// Its data's length.
        length: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` with data that is not a name.
    #[error("NBD_OPT_EXPORT_NAME with a bad name")]
    ExportName(#[source] Malformed),
    /// `NBD_OPT_EXPORT_NAME` for an export that does not exist.
    #[error("NBD_OPT_EXPORT_NAME for {name:?}, which does not exist")]
    UnknownExport {
        /// The name.
        name: String,
    },
    /// A request does not start with its magic.
    #[error("a request starts with {found:#010x}")]
    RequestMagic {
        /// The value that was received.
        found: u32,
    },
    /// A write with more data than is skipped.
    #[error("a write of {length} bytes to a read-only export")]
    WriteLength {
        /// Bytes of data announced.
        length: u32,
    },
    /// The local disk failed after the first part of a simple reply had been sent; the protocol has no other way to report that.
    #[error("the disk failed at {offset} within a reply")]
    Torn {
        /// Start of the part that could not be read.
        offset: u64,
    },
}

impl ConnectionError {
    pub(super) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
