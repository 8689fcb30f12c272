//! Types for planning an overlay: a layer's tree, a node in it, and the attributes of a directory.

use std::io;

use crate::layer::StackingFacts;

/// A path inside a layer, without a leading `/`; the root is empty.
pub(super) type LayerPath = Vec<u8>;

/// The node at a path of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerNode {
    pub(super) kind: LayerNodeKind,
    pub(super) opaque: bool,
    pub(super) attributes: DirectoryAttributes,
}

/// The type of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LayerNodeKind {
    Directory,
    /// A symlink with its target.
    Symlink(Vec<u8>),
    Other,
}

impl LayerNode {
    pub(super) fn is_directory(&self) -> bool {
        self.kind == LayerNodeKind::Directory
    }
}

/// The attributes of a directory that the top tree copies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DirectoryAttributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, i64),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The tree of one layer.
pub(crate) trait LayerTree {
    /// Whiteouts, implied directories and the opaque mark of the layer.
    fn facts(&self) -> &StackingFacts;
    /// The node at `path`, without following symlinks. `None` if there is none.
    fn look(&self, path: &[u8]) -> io::Result<Option<LayerNode>>;
    /// The target of the symlink at `path`; `None` if it is not a symlink. Symlinks in the parent path are followed as the kernel does it;
    /// one that leaves the layer leads to `None`.
    fn link_text(&self, path: &[u8]) -> io::Result<Option<Vec<u8>>>;
}

/// The root, then each parent directory of `path`, then `path`.
pub(super) fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let root = (!path.is_empty()).then_some(&path[..0]);
    let between = path
        .iter()
        .enumerate()
        .filter(|&(_, &byte)| byte == b'/')
        .map(|(slash, _)| &path[..slash]);
    root.into_iter().chain(between).chain([path])
}
