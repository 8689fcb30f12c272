//! Descriptors from one process to the next: through a store (sd_pid_notify_with_fds(3)) and by inheritance (sd_listen_fds(3)).

mod child;
mod datagram;
mod inherited;

pub use child::{Program, spawn};
pub use datagram::{Datagram, receive};
pub use inherited::{Handed, Inherited, KEEPER, VARIABLES};

use std::os::fd::RawFd;

/// The number of the first descriptor that is handed to a program.
const FIRST: RawFd = 3;
