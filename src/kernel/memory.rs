//! The process's own memory.

/// Gives free memory back to the kernel. The allocator keeps what a burst of work has freed, in an arena a thread: after an attach of many
/// layers, several times what they need from then on.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and touches free memory only; it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
