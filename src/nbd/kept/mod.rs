//! Connections to the kernel's driver whose requests and replies survive the process that serves them.
//!
//! Three objects make such a connection, and whoever has their descriptors can go on with it: our end of the socket, a journal in shared
//! memory, and a pipe. Requests are received directly into the journal. Short replies are sent as messages of which the kernel records in the
//! journal that they were sent. Long ones go into the pipe first and from there to the socket, so what a dead process has not sent is still in
//! the pipe. The journal says which of the two is done (`journal::Phase`).

mod connection;
mod control;
mod journal;
mod replies;
mod server;

pub use self::{
    connection::KeptConnection, control::Control, journal::JOURNAL_VERSION, replies::Step,
};
