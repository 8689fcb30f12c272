//! Types for stacking: the entry at a path of a layer, and its attributes.

use std::io;

use crate::layer::StackingFacts;

/// A path inside a layer, without a leading `/`; the root is empty.
pub(super) type LayerPath = Vec<u8>;

/// What stands at a path of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerNode {
    pub(super) kind: LayerNodeKind,
    pub(super) opaque: bool,
    pub(super) attributes: DirectoryAttributes,
}

/// What it is, as far as stacking tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LayerNodeKind {
    Directory,
    /// With its text.
    Symlink(Vec<u8>),
    Other,
}

impl LayerNode {
    pub(super) fn is_directory(&self) -> bool {
        self.kind == LayerNodeKind::Directory
    }
}

/// What a directory of the tree on top takes over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DirectoryAttributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, i64),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One layer's tree, as far as stacking asks.
pub(crate) trait LayerTree {
    /// What stacking has to know of the layer.
    fn facts(&self) -> &StackingFacts;
    /// What stands at `path`; no symlink is followed on the way. `None`: nothing.
    fn look(&self, path: &[u8]) -> io::Result<Option<LayerNode>>;
    /// The text of the symlink at `path`, where it is one; symlinks on the way are followed as the kernel does it, and lead to nothing
    /// where they leave the layer.
    fn link_text(&self, path: &[u8]) -> io::Result<Option<Vec<u8>>>;
}

/// The root, then each directory on the way to `path`, then `path`.
pub(super) fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let root = (!path.is_empty()).then_some(&path[..0]);
    let between = path
        .iter()
        .enumerate()
        .filter(|&(_, &byte)| byte == b'/')
        .map(|(slash, _)| &path[..slash]);
    root.into_iter().chain(between).chain([path])
}
