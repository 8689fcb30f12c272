//! The NBD server: handshake and transmission over any stream of bytes.
//!
//! Each connection has one thread, which reads requests and writes replies. Nothing else uses the socket, so replies cannot mix, and a
//! client that stops reading blocks only itself. The thread answers requests for present data at once. For absent data it hands the
//! request to the async side, whose completion comes back through a queue (`pending`); replies are then out of order.
//!
//! - [`serve_connection`]: handshake, then transmission, for clients that connect to a [`Server`];
//! - [`kept`]: no handshake, for the kernel's end of a socket pair; its requests and replies survive the process.

use crate::error::{Error, Kind};

pub mod protocol;

mod connection;
mod content;
mod counters;
mod error;
mod export;
mod handshake;
mod input;
pub mod kept;
mod pending;
mod reply;
mod server;
mod stream;
mod timed;
mod transmission;

pub use self::{
    connection::serve_connection,
    counters::{Counters, Counts},
    error::ConnectionError,
    export::Exports,
    server::{Address, Limits, Server},
    stream::Stream,
};

/// Bytes of the longest read: the payload that every client may ask for ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Bytes of one part of a read's reply. A read up to this length is answered whole or with an error, never torn.
const MAX_PART: u32 = 1 << 20;

/// The transmission flags of every export. `NBD_FLAG_SEND_DF` comes to them where structured replies are agreed on.
pub const TRANSMISSION_FLAGS: u16 = protocol::NBD_FLAG_HAS_FLAGS
    | protocol::NBD_FLAG_READ_ONLY
    | protocol::NBD_FLAG_CAN_MULTI_CONN
    | protocol::NBD_FLAG_SEND_CACHE;

/// The NBD error value for an error.
///
/// Nearly all are `NBD_EIO`: the client asked for a range of a device, and why its bytes cannot be had is reported by the state of the
/// layer, not by an errno.
pub fn errno_of(error: &Error) -> u32 {
    match error.kind() {
        Kind::InvalidArgument => protocol::NBD_EINVAL,
        Kind::Corrupt
        | Kind::Unsupported
        | Kind::NotFound
        | Kind::Unauthorized
        | Kind::Unavailable
        | Kind::Busy
        | Kind::Immutable
        | Kind::Kernel
        | Kind::Io => protocol::NBD_EIO,
    }
}
