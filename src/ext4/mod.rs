//! A layer's ext4 image: from a tree to a layout (pure), from a layout to bytes.
//!
//! Data comes first and metadata last, so that a layer can be written to its disk while it streams by, before its tree is known:
//! the data of the n-th regular entry has its place by rule ([`DataPlacer`]), whatever the tree turns out to be.
//!
//! The file system is for reading only: no journal, everything packed full, no room to grow. There is no `lost+found`: it would show
//! in the image's root, and `e2fsck -n` does not ask for it.

mod acl;
mod area;
mod dir;
mod extent;
pub mod format;
mod group;
mod hash;
mod inode;
mod layout;
mod place;
mod region;
mod superblock;
#[cfg(test)]
mod tests;
mod xattr;

pub use layout::Layout;
pub use place::DataPlacer;
pub use region::table::RegionTable;
pub use region::{DataRegion, RegionError, Regions};

/// Bytes of a block.
pub const BLOCK_SIZE: u64 = 4096;
/// Bytes at the end of a disk that are zero: `blkid` and udev look there for what others put at the end of a device.
pub const TAIL_BYTES: u64 = 2 << 20;

/// What ext4 cannot hold: the path and the limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The disk would be larger than this program makes them.
    #[error("the layer's disk would be larger than {limit} bytes")]
    DiskTooLarge {
        /// Bytes.
        limit: u64,
    },
    /// A file has more names than ext4 counts.
    #[error("{path}: {links} hard links; the limit is {limit}")]
    TooManyLinks {
        /// One of them.
        path: String,
        /// How many.
        links: u32,
        /// The most.
        limit: u32,
    },
    /// A directory has more names than an index of two levels takes.
    #[error("{path}: a directory of {names} names; the limit is {limit} blocks of them")]
    TooManyNames {
        /// The directory.
        path: String,
        /// How many.
        names: usize,
        /// The most blocks.
        limit: usize,
    },
    /// A symlink's text does not fit into a block.
    #[error("{path}: a symlink of {length} bytes; the limit is {limit}")]
    SymlinkTooLong {
        /// The symlink.
        path: String,
        /// Bytes of its text.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// A device number that Linux does not have.
    #[error("{path}: device {major}/{minor}; the limits are 4095/1048575")]
    DeviceNumber {
        /// The device.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// Xattrs do not fit into an inode and a block.
    #[error("{path}: xattrs of {bytes} bytes do not fit into its inode; the limit is {limit}")]
    XattrsTooLarge {
        /// Whose they are.
        path: String,
        /// Bytes of those that are not in the inode.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// An xattr's name is longer than Linux has it.
    #[error("{path}: xattr {name} has a name of more than {limit} bytes")]
    XattrNameTooLong {
        /// Whose it is.
        path: String,
        /// The name.
        name: String,
        /// The most.
        limit: usize,
    },
    /// An xattr that is to be a POSIX ACL and is not a valid one, or a default ACL of what is no directory.
    #[error("{path}: xattr {name} is not a valid POSIX ACL for it")]
    Acl {
        /// Whose it is.
        path: String,
        /// The name.
        name: String,
    },
    /// A segment of a sparse file is out of order, overlaps another or ends beyond the file.
    #[error("{path}: its sparse segment at {offset} is out of order or beyond its size")]
    SparseSegment {
        /// The file.
        path: String,
        /// Where in the file.
        offset: u64,
    },
    /// Data that ends beyond what 64 bits count.
    #[error("{path}: its data ends beyond the layer")]
    DataBeyondLayer {
        /// The file.
        path: String,
    },
    /// The data of entries overlaps or is not in their order.
    #[error(transparent)]
    Regions(#[from] RegionError),
}
