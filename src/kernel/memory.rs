//! The process's own memory.

/// Bytes of freed memory that an arena of the allocator may keep at its end.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 1 << 20;

/// Has the allocator give back what is freed at the end of an arena. Left alone it raises by itself what it keeps there, up to 64 MiB, to
/// what a burst of work has needed, and [`give_back`] does not reach it. What fits into that is not mapped by itself either, which would be
/// faulted in page by page each time.
///
/// And it has one arena a processor, not eight: work that goes from one thread to the next, a layer after another, then finds the memory of
/// the one before.
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

/// Gives free memory back to the kernel that lies between what is in use. After an attach of many layers it is several times what they
/// need from then on.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and touches free memory only; it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
