//! Objects of the kernel that outlive the process that uses them, because another process holds their descriptors too: shared memory and
//! pipes.

mod memory;
mod pipe;

use std::{io, os::fd::AsFd};

pub use self::{
    memory::{MESSAGE_WORDS, SENT_WORD, SharedMemory, largest_message},
    pipe::KeptPipe,
};

use crate::error::{Error, Kind};

/// How the names of threads begin that answer requests of the kernel. While one of them runs, no other process may answer in its place.
pub const SERVES: &str = "serve-";

/// What a watchdog sees of the threads that answer for a device.
pub trait ServerPulse: Send + Sync {
    /// The turns of each thread, `None` for one that has ended. A thread makes one each second at least, also without requests, unless the
    /// local disk holds it up.
    fn turns(&self) -> Vec<Option<u64>>;
}

/// The number by which two descriptors of one pipe, socket or memory are known to be of the same: unique in its kind until the next boot.
pub fn inode(descriptor: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(descriptor)?.st_ino)
}

/// The checksum of a journal's header.
pub(crate) fn checksum(header: &[u32]) -> u32 {
    let mut crc = flate2::Crc::new();
    for word in header {
        crc.update(&word.to_le_bytes());
    }
    crc.sum()
}

/// The error of kept descriptors that are not what a daemon leaves.
pub(crate) fn corrupt(why: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, why)
}
