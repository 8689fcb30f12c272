//! The NBD server: against a raw client that can say anything, and against the programs and libraries of others.

mod client;
mod export;
mod handshake;
mod hostile;
mod kept;
pub(crate) mod kept_in_vm;
mod peers;
mod transmission;
