//! The file tree of one layer as overlayfs wants it: paths cleaned, hard links joined, whiteouts turned into devices 0/0 and opaque
//! marks, parents that the tar only implies marked as such. Pure.

use std::collections::BTreeMap;

use crate::tar::{Entry, Timestamp};

/// The number of a node in its tree. The root is 0.
pub type NodeId = u32;

/// The tree of one layer.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The inodes; `nodes[0]` is the root directory.
    pub nodes: Vec<Node>,
    /// Paths (without a leading `/`) of directories that the tar does not name, only implies: their attributes say nothing. The root,
    /// when not named, is the empty path.
    pub implied: Vec<Vec<u8>>,
    /// Directories that hide what lower layers have there.
    pub opaque: Vec<Vec<u8>>,
    /// Paths that are whiteouts.
    pub whiteouts: Vec<Vec<u8>>,
}

/// One inode.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// The low 12 bits of the mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, used for all four times of the inode.
    pub mtime: Timestamp,
    /// Full names (`user.x`, `security.capability`, ...) and values, sorted; overlay's own added, an image's dropped.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names that point here; for a directory 2 plus its subdirectories.
    pub links: u32,
}

/// What a node is.
#[derive(Clone, Debug)]
pub enum NodeKind {
    /// A regular file. `entry` is the index of the tar entry that has its data.
    File {
        /// Index into the entries that the tree was built from.
        entry: usize,
        /// Bytes.
        size: u64,
    },
    /// A directory and its names, sorted bytewise, without `.` and `..`.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A symbolic link and its text.
    Symlink(Vec<u8>),
    /// A character device; 0/0 is an overlay whiteout.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// What a tree cannot hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}

impl Tree {
    /// Builds the tree of a layer.
    pub fn build(entries: &[Entry]) -> Result<Self, Error> {
        let _ = entries;
        unimplemented!("module tree")
    }
}
