//! Objects of the kernel that outlive the process that uses them, because another process holds their descriptors too: shared memory and
//! pipes.

mod memory;
mod pipe;

use std::{io, os::fd::AsFd};

pub use self::{memory::SharedMemory, pipe::KeptPipe};

/// The number by which two descriptors of one pipe, socket or memory are known to be of the same: unique in its kind until the next boot.
pub fn inode(descriptor: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(descriptor)?.st_ino)
}
