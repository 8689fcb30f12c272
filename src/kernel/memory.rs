//! The memory of this process.

/// Bytes of freed memory that an arena of the allocator may keep at its end.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 1 << 20;

/// Makes the allocator return memory that is freed at the end of an arena. By default it raises the amount that it keeps there, up to 64
/// MiB, to what a burst of work has needed, and [`give_back`] does not reach that memory. Allocations that fit into it are not mapped one
/// by one either, which would fault in each page every time.
///
/// There is also one arena per processor instead of eight: work that moves from thread to thread, layer by layer, then finds the memory of
/// the layer before.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let arenas = libc::c_int::try_from(processors).unwrap_or(libc::c_int::MAX);
        // SAFETY: each takes two numbers and sets an option of the allocator, under the allocator's own lock.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
            libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
            libc::mallopt(libc::M_ARENA_MAX, arenas);
        }
    }
}

/// Returns free memory between used blocks to the kernel. After an attach of many layers, it is several times the memory that they need
/// from then on.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and touches free memory only; it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
