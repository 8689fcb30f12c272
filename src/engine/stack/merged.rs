//! Layers' trees merged as overlayfs merges them, and where an implied directory has its attributes from.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use super::{Found, LayerPath, LayerTree, prefixes};

/// The layers merged, looked at by path.
pub(super) struct Merged<'a, T> {
    layers: &'a [T],
    implied: Vec<HashSet<&'a [u8]>>,
    looked: Vec<HashMap<LayerPath, Option<Found>>>,
}

impl<'a, T: LayerTree> Merged<'a, T> {
    pub(super) fn new(layers: &'a [T]) -> Self {
        Self {
            layers,
            implied: layers
                .iter()
                .map(|layer| layer.facts().implied.iter().map(Vec::as_slice).collect())
                .collect(),
            looked: vec![HashMap::new(); layers.len()],
        }
    }

    pub(super) fn look(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<Found>> {
        if let Some(found) = self.looked[layer].get(path) {
            return Ok(found.clone());
        }
        let found = self.layers[layer].look(path)?;
        self.looked[layer].insert(path.to_vec(), found.clone());
        Ok(found)
    }

    /// The layers whose directories make up the merged one at `path`, topmost first; none where the merged tree has no directory.
    pub(super) fn parts(&mut self, path: &[u8]) -> io::Result<Vec<usize>> {
        let mut parts = Vec::new();
        'layers: for layer in 0..self.layers.len() {
            let mut cut = false;
            for prefix in prefixes(path) {
                match self.look(layer, prefix)? {
                    None => break,
                    Some(found) if !found.directory => break 'layers,
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

    /// Of these layers the one whose attributes count for the directory: the topmost that names it, else the topmost.
    pub(super) fn owner(&self, path: &[u8], parts: &[usize]) -> Option<usize> {
        let named = parts
            .iter()
            .find(|&&layer| !self.implied[layer].contains(path));
        named.or(parts.first()).copied()
    }
}
