//! The layers' trees, merged as overlayfs merges them; resolves the attributes of implied directories.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use rustix::fs::Mode;

use super::layer_tree::{
    DirectoryAttributes, LayerNode, LayerNodeKind, LayerPath, LayerTree, prefixes,
};

/// Symlinks that one path may lead through, as in containerd.
const SYMLINK_LIMIT: usize = 255;
/// Components that are walked because of symlinks, over all paths; a long way counts as several. An image must not
/// keep the daemon busy with them.
const STEP_LIMIT: usize = 1 << 20;
/// Bytes of a path that can be asked for (PATH_MAX without its zero byte).
const PATH_LIMIT: usize = 4095;

/// The layers merged, looked at by path.
pub(crate) struct MergedLayers<'a, T> {
    layers: &'a [T],
    /// So many of them, from the topmost, are stacked. The others give attributes alone.
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

    /// What stands at the path in one layer; no symlink is followed.
    pub(crate) fn look(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<LayerNode>> {
        if let Some(found) = self.looked[layer].get(path) {
            return Ok(found.clone());
        }
        let found = self.layers[layer].look(path)?;
        self.looked[layer].insert(path.to_vec(), found.clone());
        Ok(found)
    }

    /// The layers whose directories make up the merged one at `path`, topmost first; none where the merged tree has no directory.
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

    /// The attributes that a directory of a layer comes to. One that the layer names has its own. One that it only implies has those
    /// of the directory that the nearest lower layer has at its path; where that layer has something else there, or none has anything,
    /// it is made anew in its parent.
    pub(super) fn attributes(
        &mut self,
        layer: usize,
        path: &[u8],
    ) -> io::Result<DirectoryAttributes> {
        let mut parent = None;
        // parents first: so this calls itself for lower layers only
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
        // what is made in a directory with this bit has its group
        if let Some(parent) = parent.filter(|parent| parent.mode & Mode::SGID.as_raw_mode() != 0) {
            own.gid = parent.gid;
        }
        Ok(own)
    }

    /// The directory that the nearest of the layers below that has anything at a path has there: the layer, and the path in it.
    fn below(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<(usize, LayerPath)>> {
        for lower in layer + 1..self.layers.len() {
            let Some(resolved) = self.resolve(lower, path)? else {
                return Ok(None);
            };
            // the last that is there: what is asked for, or what is in its way
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

    /// The path with its symlinks followed within the layer, whose root is theirs too. What is not there is no symlink. `None`: they
    /// go on for too long.
    ///
    /// As in containerd each pass over the path follows one symlink a component, and `..` takes out the name before it in the text, be
    /// that a symlink or not there at all.
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
                    // there may be one behind those that this pass has put into the way
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
                "following the symlinks on the way to implied directories takes more than {STEP_LIMIT} steps"
            ))),
        }
    }
}

/// The two one after the other, without `.`, `..` and empty components. `..` at the root stays there.
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
