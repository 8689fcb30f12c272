//! The subset of the FUSE protocol (include/uapi/linux/fuse.h, version 7.31) for one read-only file.
//!
//! Requests come from the kernel, whose format is trusted; they are parsed with bounds all the same.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const FUSE_FORGET: u32 = 2;
pub(super) const FUSE_GETATTR: u32 = 3;
pub(super) const FUSE_OPEN: u32 = 14;
pub(super) const FUSE_READ: u32 = 15;
pub(super) const FUSE_STATFS: u32 = 17;
pub(super) const FUSE_RELEASE: u32 = 18;
pub(super) const FUSE_INIT: u32 = 26;
pub(super) const FUSE_DESTROY: u32 = 38;
pub(super) const FUSE_BATCH_FORGET: u32 = 42;

/// The root's node; here the only one, and a regular file.
pub(super) const FUSE_ROOT_ID: u64 = 1;

pub(super) const KERNEL_VERSION: u32 = 7;
/// Linux 5.4's: `max_pages` is there, and fsopen(2) is as old.
pub(super) const KERNEL_MINOR_VERSION: u32 = 31;

pub(super) const FUSE_ASYNC_READ: u32 = 1 << 0;
/// Direct reads are sent without waiting for each other.
pub(super) const FUSE_ASYNC_DIO: u32 = 1 << 15;
/// Requests of up to `max_pages` pages.
pub(super) const FUSE_MAX_PAGES: u32 = 1 << 22;

/// The kernel's offer has a second word of flags (Linux 5.17).
pub(super) const FUSE_INIT_EXT: u32 = 1 << 30;
/// `FUSE_NOTIFY_RESEND` is known (Linux 6.9). A flag of the second word.
pub(super) const FUSE_HAS_RESEND: u64 = 1 << 39;

pub(super) const FOPEN_DIRECT_IO: u32 = 1 << 0;
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// No FLUSH when a descriptor of the file is closed (Linux 5.16).
pub(super) const FOPEN_NOFLUSH: u32 = 1 << 5;

/// A notification that makes the kernel send all requests again that were received and not answered.
pub(super) const FUSE_NOTIFY_RESEND: i32 = 7;

/// `struct fuse_in_header`; since Linux 6.2 the last word holds the length of extensions, which none of these requests has.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
pub(super) struct InHeader {
    pub(super) len: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) nodeid: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) pid: u32,
    pub(super) padding: u32,
}

/// `struct fuse_out_header`
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
pub(super) struct OutHeader {
    pub(super) len: u32,
    /// Zero, or an error number below zero. Where `unique` is zero: the code of a notification.
    pub(super) error: i32,
    pub(super) unique: u64,
}

/// The part of `struct fuse_init_in` that all versions have. With FUSE_INIT_EXT, the next word has flags 32 to 63.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
pub(super) struct InitIn {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    pub(super) flags: u32,
}

/// `struct fuse_init_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub(super) struct InitOut {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    pub(super) flags: u32,
    pub(super) max_background: u16,
    pub(super) congestion_threshold: u16,
    pub(super) max_write: u32,
    pub(super) time_gran: u32,
    pub(super) max_pages: u16,
    pub(super) map_alignment: u16,
    pub(super) flags2: u32,
    pub(super) unused: [u32; 7],
}

/// `struct fuse_read_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
pub(super) struct ReadIn {
    pub(super) fh: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
    pub(super) read_flags: u32,
    pub(super) lock_owner: u64,
    pub(super) flags: u32,
    pub(super) padding: u32,
}

/// `struct fuse_attr_out` with its `struct fuse_attr`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub(super) struct AttrOut {
    /// Seconds for which the kernel need not ask again.
    pub(super) attr_valid: u64,
    pub(super) attr_valid_nsec: u32,
    pub(super) dummy: u32,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) atime: u64,
    pub(super) mtime: u64,
    pub(super) ctime: u64,
    pub(super) atimensec: u32,
    pub(super) mtimensec: u32,
    pub(super) ctimensec: u32,
    pub(super) mode: u32,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: u32,
    pub(super) blksize: u32,
    pub(super) flags: u32,
}

/// `struct fuse_open_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub(super) struct OpenOut {
    pub(super) fh: u64,
    pub(super) open_flags: u32,
    pub(super) padding: u32,
}

/// `struct fuse_statfs_out`, which is a `struct fuse_kstatfs`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub(super) struct StatfsOut {
    pub(super) blocks: u64,
    pub(super) bfree: u64,
    pub(super) bavail: u64,
    pub(super) files: u64,
    pub(super) ffree: u64,
    pub(super) bsize: u32,
    pub(super) namelen: u32,
    pub(super) frsize: u32,
    pub(super) padding: u32,
    pub(super) spare: [u32; 6],
}

const _: () = assert!(
    size_of::<InHeader>() == 40
        && size_of::<OutHeader>() == 16
        && size_of::<InitOut>() == 64
        && size_of::<ReadIn>() == 40
        && size_of::<AttrOut>() == 104
        && size_of::<OpenOut>() == 16
        && size_of::<StatfsOut>() == 80
);
