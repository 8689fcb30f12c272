//! Buffers for what is read and sent on at once. All threads share a few: one a connection would be most of what a daemon with many idle
//! disks holds, and a page fault for each of its pages.

use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
};

/// Buffers that are kept on a machine with fewer processors; otherwise one a processor. More are in use only where threads wait.
const LEAST_KEPT: usize = 4;

static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer, until it is dropped. It holds whatever its last user has left in it.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<u8>);

impl Buffer {
    /// One that is free, or a new one.
    pub(crate) fn lend() -> Self {
        Self(kept().pop().unwrap_or_default())
    }

    /// Its first `length` bytes. What was in them stays; what was not there before is zero.
    pub(crate) fn of_length(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length {
            set_length(&mut self.0, length);
        }
        &mut self.0[..length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        static LIMIT: OnceLock<usize> = OnceLock::new();
        let limit = *LIMIT.get_or_init(|| {
            let processors = thread::available_parallelism().map_or(1, usize::from);
            processors.max(LEAST_KEPT)
        });
        let mut kept = kept();
        if kept.len() < limit {
            kept.push(std::mem::take(&mut self.0));
        }
    }
}

/// Gives a vector this length. What was in it stays; what was not there before is zero. New memory is not written for it: it is zero when
/// the kernel gives it.
pub(crate) fn set_length(bytes: &mut Vec<u8>, length: usize) {
    if bytes.capacity() == 0 {
        *bytes = vec![0; length];
    } else {
        bytes.resize(length, 0);
    }
}

fn kept() -> MutexGuard<'static, Vec<Vec<u8>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_it_stays_while_it_grows() {
        let mut buffer = Buffer::lend();
        buffer.of_length(10).fill(7);
        assert_eq!(buffer.of_length(5000)[..10], [7; 10]);
        assert_eq!(buffer.of_length(3), [7; 3]);
    }
}
