//! The file tree of one layer as overlayfs wants it: paths cleaned, hard links joined, whiteouts turned into devices 0/0 and opaque
//! marks, parents that the tar only implies marked as such. Pure.
//!
//! The rules are those of containerd's unpack (`pkg/archive`, applyNaive), so that an attached image is what a pulled one is. Where
//! that refuses what AWS's tool accepts, or depends on the order of entries for no reason, this is the wider of the two; each such
//! place says so.

use std::collections::BTreeMap;

use crate::tar::{Entry, Timestamp};

mod build;
mod path;
#[cfg(test)]
mod tests;
mod xattr;

/// The number of a node in its tree. The root is 0.
pub type NodeId = u32;

/// The root directory.
pub const ROOT: NodeId = 0;

/// The tree of one layer. Its names and texts are those of the entries that it was built from.
#[derive(Clone, Debug)]
pub struct Tree<'a> {
    /// The inodes, each of them with at least one name, in the order in which the tar first names or implies them; `nodes[0]` is the
    /// root directory.
    pub nodes: Vec<Node<'a>>,
    /// Paths (without a leading `/`) of directories that the tar does not name, only implies: their attributes say nothing. The root,
    /// when not named, is the empty path. Sorted.
    pub implied: Vec<Vec<u8>>,
    /// Directories that hide what lower layers have there. Sorted.
    pub opaque: Vec<Vec<u8>>,
    /// Paths that are whiteouts. Sorted.
    pub whiteouts: Vec<Vec<u8>>,
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<'a> {
    /// What it is.
    pub kind: NodeKind<'a>,
    /// The low 12 bits of the mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, used for all four times of the inode.
    pub mtime: Timestamp,
    /// Full names (`user.x`, `security.capability`, ...) and values, sorted; overlay's own added, an image's dropped. POSIX ACLs are
    /// in the form that setxattr(2) takes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names that point here; for a directory 2 plus its subdirectories.
    pub links: u32,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeKind<'a> {
    /// A regular file. `entry` is the index of the tar entry that has its data.
    File {
        /// Index into the entries that the tree was built from.
        entry: usize,
        /// Bytes.
        size: u64,
    },
    /// A directory and its names, sorted bytewise, without `.` and `..`.
    Directory(Vec<(&'a [u8], NodeId)>),
    /// A symbolic link and its text.
    Symlink(&'a [u8]),
    /// A character device; 0/0 is an overlay whiteout.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// What a tree cannot hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A component of a path is longer than Linux has it (255 bytes).
    #[error("{path}: a name of {length} bytes; the limit is {limit}")]
    NameTooLong {
        /// The whole path.
        path: String,
        /// Bytes of the component.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// A path is longer than a system call takes (4095 bytes).
    #[error("{path}...: a path of {length} bytes; the limit is {limit}")]
    PathTooLong {
        /// Its beginning.
        path: String,
        /// Bytes.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// A zero byte in a path, a link's text or an xattr's name.
    #[error("{path}: a zero byte in a name")]
    ZeroByte {
        /// The path.
        path: String,
    },
    /// Something in the way of a path is neither a directory nor a symlink to one.
    #[error("{path}: {parent} is not a directory")]
    ParentNotDirectory {
        /// The path.
        path: String,
        /// The parent that is something else.
        parent: String,
    },
    /// Too many symlinks in the parents of a path: a loop.
    #[error("{path}: more than {limit} symlinks on the way")]
    TooManySymlinks {
        /// The path.
        path: String,
        /// The most.
        limit: usize,
    },
    /// A hard link to what the layer does not have.
    #[error("{path}: hard link to {target}, which is not in this layer")]
    LinkTargetMissing {
        /// The link.
        path: String,
        /// What it names.
        target: String,
    },
    /// A hard link to a directory.
    #[error("{path}: hard link to {target}, which is a directory")]
    LinkToDirectory {
        /// The link.
        path: String,
        /// What it names.
        target: String,
    },
    /// A symlink without a text.
    #[error("{path}: a symlink with an empty text")]
    EmptySymlink {
        /// The symlink.
        path: String,
    },
    /// A device number that is negative or over 32 bits.
    #[error("{path}: device {major}/{minor} is not a device number")]
    DeviceNumber {
        /// The device.
        path: String,
        /// As the tar has it.
        major: i64,
        /// As the tar has it.
        minor: i64,
    },
    /// More directories are implied, and not named, than any honest layer has.
    #[error("{path}: the layer implies more than {limit} directories that it does not name")]
    TooManyImplied {
        /// The path at which the limit was passed.
        path: String,
        /// The most.
        limit: usize,
    },
    /// The symlinks in the parents of all paths together take too many steps to follow.
    #[error("{path}: following the layer's symlinks takes more than {limit} steps")]
    TooManySteps {
        /// The path at which the limit was passed.
        path: String,
        /// The most.
        limit: usize,
    },
    /// More entries than a tree can number.
    #[error("{count} entries; the limit is {limit}")]
    TooManyEntries {
        /// How many.
        count: usize,
        /// The most.
        limit: usize,
    },
}

impl<'a> Tree<'a> {
    /// Builds the tree of a layer.
    ///
    /// - An entry that is there already is replaced, with all below it, unless both are directories: then the attributes are.
    /// - Symlinks in the parents of a path are followed, as they are when the entry comes, and never out of the layer's root.
    /// - A hard link may come before its target (AWS's tool refuses that). Its own attributes say nothing.
    /// - A whiteout hides what lower layers have, whatever the order of entries in this one: beside a directory of this layer it makes
    ///   that opaque, beside anything else it says nothing more.
    /// - Xattrs that an unpack could not set, because the kernel has no such namespace for that kind of file, are dropped.
    pub fn build(entries: &'a [Entry]) -> Result<Self, Error> {
        build::build(entries)
    }

    /// One path of a node, for messages; the first in bytewise order that is not through another node of the same number.
    pub fn path_of(&self, wanted: NodeId) -> Vec<u8> {
        let mut found = Vec::new();
        self.walk(|path, node| {
            if node == wanted && found.is_empty() {
                found = path.to_vec();
            }
        });
        found
    }

    /// Calls `visit` with the path and node of every name, parents first, in the bytewise order of names in each directory. The root
    /// is the empty path.
    pub fn walk(&self, mut visit: impl FnMut(&[u8], NodeId)) {
        let mut path = Vec::new();
        visit(&path, ROOT);
        // a stack of directories under way, and how long the path was at each: a layer's depth must not be the program's
        let mut under_way = vec![(self.names(ROOT), 0)];
        while let Some((names, length)) = under_way.last_mut() {
            path.truncate(*length);
            let Some((name, node)) = names.next() else {
                under_way.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            visit(&path, *node);
            if matches!(self.node(*node).kind, NodeKind::Directory(_)) {
                under_way.push((self.names(*node), path.len()));
            }
        }
    }

    /// The node of that number.
    ///
    /// # Panics
    /// If the tree has none: a tree's own numbers always stand for something.
    pub fn node(&self, node: NodeId) -> &Node<'a> {
        &self.nodes[node as usize]
    }

    fn names(&self, node: NodeId) -> std::slice::Iter<'_, (&'a [u8], NodeId)> {
        match &self.node(node).kind {
            NodeKind::Directory(names) => names.iter(),
            _ => Default::default(),
        }
    }
}

/// Bytes of a path as a message shows them.
pub(crate) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().to_string()
}
