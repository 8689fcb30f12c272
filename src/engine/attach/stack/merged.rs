//! The layers' trees, merged as overlayfs merges them. Resolves the attributes of implied directories.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use rustix::fs::Mode;

use super::layer_tree::{
    DirectoryAttributes, LayerNode, LayerNodeKind, LayerPath, LayerTree, prefixes,
};

/// Maximum number of symlinks in the resolution of one path, as in containerd.
const SYMLINK_LIMIT: usize = 255;
/// Maximum number of path components to walk because of symlinks, over all paths; a long path counts as several. It limits the work that an
/// image can cause.
const STEP_LIMIT: usize = 1 << 20;
/// Maximum length of a path (PATH_MAX without the zero byte).
const PATH_LIMIT: usize = 4095;

/// The merged layers.
pub(crate) struct MergedLayers<'a, T> {
    layers: &'a [T],
    /// Number of layers that are stacked, counted from the topmost. The others only provide attributes.
    stacked: usize,
    implied: Vec<HashSet<&'a [u8]>>,
    looked: Vec<HashMap<LayerPath, Option<LayerNode>>>,
    resolved: Vec<HashMap<LayerPath, DirectoryAttributes>>,
    steps: usize,
}

impl<'a, T: LayerTree> MergedLayers<'a, T> {
    pub(crate) fn new(layers: &'a [T], stacked: usize) -> Self {
        Self {
            layers,
            stacked,
            implied: layers
                .iter()
                .map(|layer| layer.facts().implied.iter().map(Vec::as_slice).collect())
                .collect(),
            looked: vec![HashMap::new(); layers.len()],
            resolved: vec![HashMap::new(); layers.len()],
            steps: 0,
        }
    }

    /// The node at the path in one layer, without following symlinks.
    pub(crate) fn look(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<LayerNode>> {
        if let Some(found) = self.looked[layer].get(path) {
            return Ok(found.clone());
        }
        let found = self.layers[layer].look(path)?;
        self.looked[layer].insert(path.to_vec(), found.clone());
        Ok(found)
    }

    /// The layers whose directories are merged at `path`, topmost first; empty if the overlay has no directory there.
    pub(crate) fn parts(&mut self, path: &[u8]) -> io::Result<Vec<usize>> {
        let mut parts = Vec::new();
        'layers: for layer in 0..self.stacked {
            let mut cut = false;
            for prefix in prefixes(path) {
                match self.look(layer, prefix)? {
                    None => break,
                    Some(found) if !found.is_directory() => break 'layers,
                    Some(found) => {
                        cut |= found.opaque;
                        if prefix.len() == path.len() {
                            parts.push(layer);
                        }
                    }
                }
            }
            if cut {
                break;
            }
        }
        Ok(parts)
    }

    /// The attributes of a directory of a layer. A directory that the layer names has its own. An implied directory has those of the
    /// directory at its path in the nearest lower layer that has anything at that path; if that is not a directory, or no layer has any, it
    /// is like a new directory in its parent.
    pub(super) fn attributes(
        &mut self,
        layer: usize,
        path: &[u8],
    ) -> io::Result<DirectoryAttributes> {
        let mut parent = None;
        // parents first, so that the recursion goes to lower layers only
        for prefix in prefixes(path) {
            let resolved = self.resolved[layer].get(prefix);
            let attributes = match resolved {
                Some(attributes) => attributes.clone(),
                None => {
                    let found = self.attributes_in(layer, prefix, parent.as_ref())?;
                    self.resolved[layer].insert(prefix.to_vec(), found.clone());
                    found
                }
            };
            parent = Some(attributes);
        }
        Ok(parent.unwrap_or_default())
    }

    fn attributes_in(
        &mut self,
        layer: usize,
        path: &[u8],
        parent: Option<&DirectoryAttributes>,
    ) -> io::Result<DirectoryAttributes> {
        let found = self.look(layer, path)?;
        let mut own = found.map(|found| found.attributes).unwrap_or_default();
        if !self.implied[layer].contains(path) {
            return Ok(own);
        }
        if let Some((lower, resolved)) = self.below(layer, path)? {
            return self.attributes(lower, &resolved);
        }
        // a new directory in a setgid directory gets the group of its parent
        if let Some(parent) = parent.filter(|parent| parent.mode & Mode::SGID.as_raw_mode() != 0) {
            own.gid = parent.gid;
        }
        Ok(own)
    }

    /// The directory at a path in the nearest lower layer that has anything there: the layer, and the resolved path in it.
    fn below(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<(usize, LayerPath)>> {
        for lower in layer + 1..self.layers.len() {
            let Some(resolved) = self.resolve(lower, path)? else {
                return Ok(None);
            };
            // the deepest existing node: the directory itself, or a node that blocks its path
            let mut last = None;
            for prefix in prefixes(&resolved) {
                let Some(found) = self.look(lower, prefix)? else {
                    break;
                };
                last = Some((prefix.len(), found.is_directory()));
            }
            match last {
                Some((_, false)) => return Ok(None),
                Some((length, true)) if length == resolved.len() => {
                    return Ok(Some((lower, resolved)));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Resolves the symlinks of a path within a layer; the root of the layer is `/`. A missing component is not a symlink. `None` if there
    /// are too many symlinks.
    ///
    /// As in containerd, each pass over the path follows one symlink per component, and `..` removes the preceding name from the text, even
    /// if that name is a symlink or does not exist.
    fn resolve(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<LayerPath>> {
        let mut path = path.to_vec();
        let mut followed = 0;
        loop {
            let before = followed;
            let mut way = LayerPath::new();
            for component in path.split(|&byte| byte == b'/') {
                let parent = way;
                way = joined(&parent, component);
                if followed > 0 {
                    self.count_step(&way)?;
                }
                if followed > SYMLINK_LIMIT || way.len() > PATH_LIMIT {
                    return Ok(None);
                }
                let text = match self.look(layer, &way)?.map(|found| found.kind) {
                    Some(LayerNodeKind::Symlink(text)) => Some(text),
                    // the path may lead through symlinks that this pass has inserted
                    None if followed > before => self.layers[layer].link_text(&way)?,
                    _ => None,
                };
                if let Some(text) = text {
                    followed += 1;
                    way = match text.strip_prefix(b"/") {
                        Some(absolute) => absolute.to_vec(),
                        None => joined(&parent, &text),
                    };
                }
            }
            if followed == before {
                return Ok(Some(way));
            }
            path = way;
        }
    }

    fn count_step(&mut self, way: &[u8]) -> io::Result<()> {
        self.steps += 1 + way.len() / 64;
        match self.steps > STEP_LIMIT {
            false => Ok(()),
            true => Err(io::Error::other(format!(
                "resolving the symlinks in the paths of implied directories takes more than {STEP_LIMIT} steps"
            ))),
        }
    }
}

/// Joins two paths without `.`, `..` and empty components. `..` at the root stays at the root.
fn joined(way: &[u8], more: &[u8]) -> LayerPath {
    let mut components: Vec<&[u8]> = Vec::new();
    let both = [way, more].into_iter();
    for component in both.flat_map(|part| part.split(|&byte| byte == b'/')) {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()),
            name => components.push(name),
        }
    }
    components.join(&b'/')
}
