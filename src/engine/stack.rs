//! What one overlay over all layers gets wrong, and the small directory tree on top that mends it.
//!
//! Given the layers' trees, topmost first:
//! - Layers below an opaque root are left out (overlayfs ignores the mark there).
//! - A directory that a layer's tar only implies has attributes that say nothing. Where a lower layer names it, the tree on top has the
//!   directory with that layer's attributes.
//! - A directory that only one layer has is not merged, and overlayfs then lists the whiteouts in it as devices. The tree on top has
//!   such directories too, with their own attributes, which makes them merged ones.
//!
//! An image of one layer has an empty directory as its second lower: overlayfs wants two where nothing is writable.

mod merged;
mod mounted;
mod top;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use merged::Merged;
pub(super) use mounted::MountedLayer;
pub(super) use top::make_top;

use crate::layer::StackingFacts;

/// A path inside a layer, without a leading `/`; the root is empty.
type LayerPath = Vec<u8>;

/// What stands at a path of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    directory: bool,
    opaque: bool,
    attributes: Attributes,
}

/// What a directory of the tree on top takes over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One layer's tree, as far as stacking asks.
pub(super) trait LayerTree {
    /// What stacking has to know of the layer.
    fn facts(&self) -> &StackingFacts;
    /// What stands at `path`; no symlink is followed on the way. `None`: nothing.
    fn look(&self, path: &[u8]) -> io::Result<Option<Found>>;
}

/// What is to be stacked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// How many layers, from the topmost, are stacked.
    pub layers: usize,
    /// Directories of the tree on top with their attributes; parents come before children. Empty: no such tree.
    pub top: BTreeMap<LayerPath, Attributes>,
}

impl Plan {
    /// The attributes of the merged root.
    pub(super) fn root_attributes<T: LayerTree>(&self, layers: &[T]) -> io::Result<Attributes> {
        if let Some(attributes) = self.top.get(&[][..]) {
            return Ok(attributes.clone());
        }
        let root = layers
            .first()
            .map(|layer| layer.look(b""))
            .transpose()?
            .flatten();
        Ok(root.map(|found| found.attributes).unwrap_or_default())
    }
}

/// Plans the stack of these layers, topmost first. Equal layers have been taken out.
pub(super) fn plan<T: LayerTree>(layers: &[T]) -> io::Result<Plan> {
    let opaque = layers.iter().position(|layer| layer.facts().opaque_root);
    let kept = opaque.map_or(layers.len(), |opaque| opaque + 1);
    let mut merged = Merged::new(&layers[..kept]);
    let mut wanted: BTreeSet<&[u8]> = BTreeSet::new();
    for (number, layer) in layers[..kept].iter().enumerate() {
        for path in &layer.facts().implied {
            let parts = merged.parts(path)?;
            if merged.owner(path, &parts) != parts.first().copied() {
                wanted.extend(prefixes(path));
            }
        }
        for whiteout in &layer.facts().whiteouts {
            let slash = whiteout.iter().rposition(|&byte| byte == b'/');
            let parent = &whiteout[..slash.unwrap_or_default()];
            if merged.parts(parent)? == [number] {
                wanted.extend(prefixes(parent));
            }
        }
    }
    let mut plan = Plan {
        layers: kept,
        ..Plan::default()
    };
    for path in wanted {
        let parts = merged.parts(path)?;
        let owner = merged
            .owner(path, &parts)
            .map(|owner| merged.look(owner, path))
            .transpose()?;
        if let Some(found) = owner.flatten() {
            plan.top.insert(path.to_vec(), found.attributes);
        }
    }
    Ok(plan)
}

/// The root, then each directory on the way to `path`, then `path`.
fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let root = (!path.is_empty()).then_some(&path[..0]);
    let between = path
        .iter()
        .enumerate()
        .filter(|&(_, &byte)| byte == b'/')
        .map(|(slash, _)| &path[..slash]);
    root.into_iter().chain(between).chain([path])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        facts: StackingFacts,
        nodes: BTreeMap<LayerPath, Found>,
    }

    impl LayerTree for Fake {
        fn facts(&self) -> &StackingFacts {
            &self.facts
        }
        fn look(&self, path: &[u8]) -> io::Result<Option<Found>> {
            Ok(self.nodes.get(path).cloned())
        }
    }

    fn found(directory: bool, opaque: bool, mode: u32) -> Found {
        Found {
            directory,
            opaque,
            attributes: Attributes {
                mode,
                ..Attributes::default()
            },
        }
    }

    /// `+dir mode`, `~dir` implied, `!dir mode` opaque, `-path` whiteout, `file`.
    fn layer(lines: &[&str]) -> Fake {
        let mut fake = Fake::default();
        fake.facts.implied.push(Vec::new());
        fake.nodes.insert(Vec::new(), found(true, false, 0o755));
        for line in lines {
            let (sign, rest) = line.split_at(1);
            let (path, mode) = rest.split_once(' ').unwrap_or((rest, "755"));
            let mode = u32::from_str_radix(mode, 8).unwrap();
            let path = path.as_bytes().to_vec();
            match sign {
                "+" => drop(fake.nodes.insert(path, found(true, false, mode))),
                "!" => drop(fake.nodes.insert(path, found(true, true, mode))),
                "~" => {
                    fake.facts.implied.push(path.clone());
                    fake.nodes.insert(path, found(true, false, 0o755));
                }
                "-" => {
                    fake.facts.whiteouts.push(path.clone());
                    fake.nodes.insert(path, found(false, false, 0));
                }
                _ => drop(fake.nodes.insert(path, found(false, false, mode))),
            }
        }
        fake
    }

    fn top(layers: &[Fake]) -> Vec<(String, u32)> {
        let plan = plan(layers).unwrap();
        plan.top
            .iter()
            .map(|(path, attributes)| (String::from_utf8(path.clone()).unwrap(), attributes.mode))
            .collect()
    }

    #[test]
    fn an_implied_parent_takes_the_attributes_of_the_layer_that_names_it() {
        let layers = [
            layer(&["~tmp", "=tmp/x"]),
            layer(&["~tmp"]),
            layer(&["+tmp 1777"]),
        ];
        assert_eq!(
            top(&layers),
            [(String::new(), 0o755), ("tmp".into(), 0o1777)]
        );
    }

    #[test]
    fn an_implied_parent_that_nobody_names_needs_nothing() {
        assert_eq!(top(&[layer(&["~tmp"]), layer(&["~tmp"])]), []);
    }

    #[test]
    fn what_is_named_above_needs_nothing() {
        assert_eq!(
            top(&[
                layer(&["+tmp 700"]),
                layer(&["~tmp"]),
                layer(&["+tmp 1777"])
            ]),
            []
        );
    }

    #[test]
    fn an_opaque_or_removed_parent_does_not_show_what_lies_below() {
        assert_eq!(
            top(&[layer(&["!a", "~a/b"]), layer(&["+a", "+a/b 700"])]),
            []
        );
        assert_eq!(
            top(&[
                layer(&["~a", "~a/b"]),
                layer(&["-a"]),
                layer(&["+a 711", "+a/b 700"])
            ]),
            []
        );
        assert_eq!(
            top(&[
                layer(&["-a"]),
                layer(&["~a", "~a/b"]),
                layer(&["+a 711", "+a/b 700"])
            ]),
            []
        );
    }

    #[test]
    fn parents_of_a_mended_directory_keep_their_own_attributes() {
        let layers = [layer(&["~a", "~a/b"]), layer(&["+a 711", "+a/b 700"])];
        assert_eq!(
            top(&layers),
            [
                (String::new(), 0o755),
                ("a".into(), 0o711),
                ("a/b".into(), 0o700)
            ]
        );
    }

    #[test]
    fn an_opaque_root_drops_what_is_below() {
        let mut opaque = layer(&["+a"]);
        opaque.facts.opaque_root = true;
        let plan = plan(&[layer(&["~b"]), opaque, layer(&["+b 700", "-c/d"])]).unwrap();
        assert_eq!((plan.layers, plan.top.len()), (2, 0));
    }

    #[test]
    fn whiteouts_in_a_directory_of_one_layer_have_it_on_top() {
        let layers = [layer(&["+a 700", "+a/b 711", "-a/b/c"])];
        assert_eq!(
            top(&layers),
            [
                (String::new(), 0o755),
                ("a".into(), 0o700),
                ("a/b".into(), 0o711)
            ]
        );
        // below an opaque directory, and above a whiteout, nothing is merged
        let opaque = [layer(&["!a 700", "-a/b"]), layer(&["+a", "+a/b"])];
        assert_eq!(top(&opaque), [(String::new(), 0o755), ("a".into(), 0o700)]);
        let cut = [
            layer(&["+a 700", "-a/b"]),
            layer(&["-a", "+x"]),
            layer(&["+a", "+a/b"]),
        ];
        assert_eq!(top(&cut).last(), Some(&("a".to_owned(), 0o700)));
    }

    #[test]
    fn whiteouts_in_merged_or_hidden_directories_need_nothing() {
        assert_eq!(top(&[layer(&["+a", "-a/b"]), layer(&["+a", "+a/b"])]), []);
        assert_eq!(
            top(&[layer(&["-a", "+x"]), layer(&["+a", "-a/b"]), layer(&["+x"])]),
            []
        );
    }
}
