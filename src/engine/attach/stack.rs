//! Plans the overlay over all layers, and the small directory tree on top (the top tree) that corrects what overlayfs would show wrongly.
//!
//! The rules, for the layers' trees, topmost first:
//! - Layers below an opaque root are left out, because overlayfs ignores the opaque mark of a root.
//! - A directory that a layer's tar only implies has no attributes of its own. As when containerd unpacks layers, it gets the attributes of
//!   the directory at its path in the nearest lower layer. Symlinks in that path are followed within the lower layer; opaque marks do not
//!   matter. If there is no such directory, it gets the group of its parent if the parent is setgid. If its attributes change by this, it
//!   is added to the top tree.
//! - A directory that only one layer has is not merged, and overlayfs then lists the whiteouts in it as devices. Adding the directory to
//!   the top tree, with its own attributes, makes it a merged one.
//!
//! An image of one layer gets an empty directory as its second lower layer: overlayfs needs two if there is no upper layer.

pub(crate) mod directories;
mod layer_tree;
mod merged;
mod mounted;
mod top;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use layer_tree::{DirectoryAttributes, LayerPath, LayerTree, prefixes};
use merged::MergedLayers;
pub(super) use mounted::MountedLayer;
pub(super) use top::make_top;

/// The plan of an overlay.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StackPlan {
    /// Number of layers to stack, counted from the topmost.
    pub layers: usize,
    /// Directories of the top tree with their attributes, parents before children. If empty, there is no top tree.
    pub top: BTreeMap<LayerPath, DirectoryAttributes>,
}

impl StackPlan {
    /// The attributes of the root directory of the overlay.
    pub(super) fn root_attributes<T: LayerTree>(
        &self,
        layers: &[T],
    ) -> io::Result<DirectoryAttributes> {
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

/// Plans the overlay of these layers, topmost first. Repeated layers have been removed.
pub(super) fn plan<T: LayerTree>(layers: &[T]) -> io::Result<StackPlan> {
    let opaque = layers.iter().position(|layer| layer.facts().opaque_root);
    let kept = opaque.map_or(layers.len(), |opaque| opaque + 1);
    let mut merged = MergedLayers::new(layers, kept);
    let mut wanted: BTreeSet<&[u8]> = BTreeSet::new();
    for (number, layer) in layers[..kept].iter().enumerate() {
        for path in &layer.facts().implied {
            if merged.parts(path)?.first() != Some(&number) {
                continue;
            }
            let attributes = merged.attributes(number, path)?;
            if merged
                .look(number, path)?
                .is_some_and(|found| found.attributes != attributes)
            {
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
    let mut plan = StackPlan {
        layers: kept,
        ..StackPlan::default()
    };
    for path in wanted {
        if let Some(&topmost) = merged.parts(path)?.first() {
            let attributes = merged.attributes(topmost, path)?;
            plan.top.insert(path.to_vec(), attributes);
        }
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::{
        layer_tree::{LayerNode, LayerNodeKind},
        *,
    };
    use crate::layer::StackingFacts;

    #[derive(Default)]
    struct FakeLayer {
        facts: StackingFacts,
        nodes: BTreeMap<LayerPath, LayerNode>,
    }

    impl LayerTree for FakeLayer {
        fn facts(&self) -> &StackingFacts {
            &self.facts
        }
        fn look(&self, path: &[u8]) -> io::Result<Option<LayerNode>> {
            Ok(self.nodes.get(path).cloned())
        }
        fn link_text(&self, path: &[u8]) -> io::Result<Option<Vec<u8>>> {
            Ok(match self.nodes.get(path).map(|found| &found.kind) {
                Some(LayerNodeKind::Symlink(text)) => Some(text.clone()),
                _ => None, // links on the way are left to the tests of real images
            })
        }
    }

    fn found(kind: LayerNodeKind, opaque: bool, mode: u32) -> LayerNode {
        LayerNode {
            kind,
            opaque,
            attributes: DirectoryAttributes {
                mode,
                ..DirectoryAttributes::default()
            },
        }
    }

    /// `+dir mode`, `~dir` implied, `!dir mode` opaque, `-path` whiteout, `@link text`, `=file`.
    fn layer(lines: &[&str]) -> FakeLayer {
        let mut fake = FakeLayer::default();
        fake.facts.implied.push(Vec::new());
        fake.nodes
            .insert(Vec::new(), found(LayerNodeKind::Directory, false, 0o755));
        for line in lines {
            let (sign, rest) = line.split_at(1);
            let (path, mode) = rest.split_once(' ').unwrap_or((rest, "755"));
            let mode = u32::from_str_radix(mode, 8).unwrap_or_default();
            let path = path.as_bytes().to_vec();
            match sign {
                "+" => drop(
                    fake.nodes
                        .insert(path, found(LayerNodeKind::Directory, false, mode)),
                ),
                "!" => drop(
                    fake.nodes
                        .insert(path, found(LayerNodeKind::Directory, true, mode)),
                ),
                "~" => {
                    fake.facts.implied.push(path.clone());
                    fake.nodes
                        .insert(path, found(LayerNodeKind::Directory, false, 0o755));
                }
                "@" => {
                    let text = rest.split_once(' ').unwrap().1.as_bytes().to_vec();
                    let link = found(LayerNodeKind::Symlink(text), false, 0o777);
                    fake.nodes.insert(path, link);
                }
                "-" => {
                    fake.facts.whiteouts.push(path.clone());
                    fake.nodes
                        .insert(path, found(LayerNodeKind::Other, false, 0));
                }
                _ => drop(
                    fake.nodes
                        .insert(path, found(LayerNodeKind::Other, false, mode)),
                ),
            }
        }
        fake
    }

    fn top(layers: &[FakeLayer]) -> Vec<(String, u32)> {
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
    fn an_implied_directory_that_is_new_has_the_group_of_a_parent_that_passes_it_on() {
        let with_group = |mode: &str| {
            let mut layer = layer(&[&format!("+a {mode}"), "~a/b", "~a/b/c"]);
            let a = layer.nodes.get_mut(&b"a"[..]).unwrap();
            a.attributes.gid = 50;
            layer
        };
        let groups = |mode: &str| {
            let plan = plan(&[with_group(mode)]).unwrap();
            let groups = plan.top.values().map(|attributes| attributes.gid);
            groups.collect::<Vec<u32>>()
        };
        assert_eq!(
            groups("2775"),
            [0, 50, 50],
            "its child's parent is an ordinary one"
        );
        assert_eq!(groups("1775"), [0; 0]);
    }

    #[test]
    fn an_opaque_parent_hides_contents_and_not_attributes() {
        assert_eq!(
            top(&[layer(&["!a 711", "~a/b"]), layer(&["+a", "+a/b 700"])]),
            [
                (String::new(), 0o755),
                ("a".into(), 0o711),
                ("a/b".into(), 0o700)
            ]
        );
        let mut opaque = layer(&["~a"]);
        opaque.facts.opaque_root = true;
        assert_eq!(
            top(&[opaque, layer(&["+a 700"])]),
            [(String::new(), 0o755), ("a".into(), 0o700)]
        );
    }

    #[test]
    fn an_implied_parent_over_a_symlink_takes_the_attributes_of_what_it_leads_to() {
        let implied = || layer(&["~lock", "=lock/x"]);
        let mode = |lower: &[&str]| top(&[implied(), layer(lower)]).last().cloned();
        let lock = |mode| Some(("lock".to_owned(), mode));
        let run = ["+run", "+run/lock 1777"];
        for text in [
            "run/lock",
            "/run/lock",
            "../../run/lock",
            "./run//lock/",
            "/run/../run/lock",
        ] {
            let link = format!("@lock {text}");
            assert_eq!(mode(&[&run[..], &[&link]].concat()), lock(0o1777), "{text}");
        }
        // a chain; relative to where the link is
        let chain = ["@lock a", "@a run/b", "@run/b lock"];
        assert_eq!(mode(&[&run[..], &chain].concat()), lock(0o1777));
        // loops, files, and links to nothing say nothing
        assert_eq!(mode(&["@lock a", "@a lock"]), None);
        assert_eq!(mode(&["@lock lock/x"]), None);
        assert_eq!(mode(&["@lock f", "=f"]), None);
        assert_eq!(mode(&["@lock f/x", "=f"]), None);
        assert_eq!(mode(&["@lock nothing"]), None);
    }

    #[test]
    fn a_link_is_followed_within_its_layer_and_what_leads_nowhere_is_passed_over() {
        let implied = || layer(&["~lock", "=lock/x"]);
        let link = || layer(&["@lock run/lock"]);
        let target = layer(&["+run", "+run/lock 1777"]);
        assert_eq!(top(&[implied(), link(), target]), []);
        let directory = layer(&["+lock 711", "+run", "+run/lock 1777"]);
        assert_eq!(
            top(&[implied(), link(), directory]).last(),
            Some(&("lock".to_owned(), 0o711))
        );
        // what the link leads to may be implied itself
        let there = layer(&["~run", "~run/lock", "@lock run/lock"]);
        let below = layer(&["+run", "+run/lock 1777"]);
        assert_eq!(
            top(&[implied(), there, below])
                .iter()
                .find(|(path, _)| path == "lock"),
            Some(&("lock".to_owned(), 0o1777))
        );
    }

    #[test]
    fn a_link_on_the_way_to_an_implied_parent_is_followed() {
        let layers = [
            layer(&["~a", "~a/c", "=a/c/x"]),
            layer(&["+b 711", "+b/c 700", "@a b"]),
        ];
        assert_eq!(
            top(&layers),
            [
                (String::new(), 0o755),
                ("a".into(), 0o711),
                ("a/c".into(), 0o700)
            ]
        );
    }

    #[test]
    fn links_without_end_are_refused_and_not_followed_for_ever() {
        let names = || (0..20).map(|number| format!("lock{number}"));
        let implied: Vec<String> = names().map(|name| format!("~{name}")).collect();
        let turns = "d/../".repeat(800);
        let links = names().map(|name| format!("@{name} /{turns}{name}"));
        let links: Vec<String> = links.chain(["+d".to_owned()]).collect();
        let layers = [implied, links].map(|lines| {
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            layer(&lines)
        });
        let error = plan(&layers).unwrap_err();
        assert!(error.to_string().contains("symlinks"), "{error}");
    }

    #[test]
    fn a_removed_parent_does_not_show_what_lies_below() {
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
        let plan = plan(&[layer(&["+b"]), opaque, layer(&["+b 700", "-c/d"])]).unwrap();
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
