//! What is done once all entries have come: links whose target came late, whiteouts, counts of links, and the numbers of the nodes.

use std::collections::HashMap;

use super::{
    super::{Error, Node, NodeId, NodeKind, ROOT, Tree, path::WHITEOUT_PREFIX, shown, xattr},
    Builder, implied_directory, link_to_directory,
};

impl<'a> Builder<'a> {
    pub(super) fn finish(mut self) -> Result<Tree<'a>, Error> {
        self.sort_late_names();
        self.join_forward_links()?;
        self.apply_marks();
        self.remove_hidden_names();
        let live = self.count_links();
        Ok(self.into_tree(&live))
    }

    /// Brings late names to their places.
    fn sort_late_names(&mut self) {
        let late = std::mem::take(&mut self.late);
        let mut directories: Vec<NodeId> = late.keys().map(|(directory, _)| *directory).collect();
        directories.dedup();
        for ((directory, name), node) in late {
            self.names_mut(directory).push((name, node));
        }
        for directory in directories {
            // two sorted lists, one after the other: a sort that looks for such merges them
            self.names_mut(directory).sort_by_key(|(name, _)| *name);
        }
    }

    /// Gives the names of forward hard links the nodes of their targets.
    fn join_forward_links(&mut self) -> Result<(), Error> {
        if self.forward.is_empty() {
            return Ok(());
        }
        let mut waiting: Vec<(NodeId, &[u8], NodeId)> = vec![];
        for directory in self.reachable_directories() {
            let NodeKind::Directory(names) = &self.nodes[directory as usize].kind else {
                continue;
            };
            for (name, node) in names {
                if self.forward.contains_key(node) {
                    waiting.push((directory, name, *node));
                }
            }
        }
        let mut resolved: HashMap<NodeId, NodeId> = HashMap::new();
        for (_, _, first) in &waiting {
            // a target may itself be a forward link: follow until something that is there, and remember it for the whole way
            let mut way = vec![];
            let mut at = *first;
            while let Some(&index) = self.forward.get(&at) {
                if let Some(&known) = resolved.get(&at) {
                    at = known;
                    continue;
                }
                let entries = self.entries;
                let entry = &entries[index];
                let target = self.find(entry)?;
                way.push(at);
                match target {
                    Some(node) if self.is_directory(node) => return Err(link_to_directory(entry)),
                    // links that only lead to each other lead to nothing
                    Some(node) if way.len() <= self.forward.len() => at = node,
                    _ => {
                        return Err(Error::LinkTargetMissing {
                            path: shown(&entry.name),
                            target: shown(&entry.linkname),
                        });
                    }
                }
            }
            resolved.extend(way.into_iter().map(|link| (link, at)));
        }
        for (directory, name, link) in waiting {
            if let Some(&node) = resolved.get(&link) {
                self.insert(directory, name, node);
            }
        }
        Ok(())
    }

    /// Directories that are still in the tree, parents first.
    fn reachable_directories(&self) -> Vec<NodeId> {
        let mut found = vec![ROOT];
        let mut next = 0;
        while let Some(&directory) = found.get(next) {
            next += 1;
            if let NodeKind::Directory(names) = &self.nodes[directory as usize].kind {
                let nodes = names.iter().map(|(_, node)| *node);
                found.extend(nodes.filter(|&node| self.is_directory(node)));
            }
        }
        found
    }

    fn apply_marks(&mut self) {
        for (directory, marks) in std::mem::take(&mut self.marks) {
            if marks.opaque {
                self.set_opaque(directory);
            }
            let mut whiteouts = vec![];
            for name in marks.hidden {
                match self.child(directory, name) {
                    Some(node) if self.is_directory(node) => self.set_opaque(node),
                    // anything else hides what is below by itself
                    Some(_) => {}
                    None => whiteouts.push((name, self.push(whiteout(), true))),
                }
            }
            if !whiteouts.is_empty() {
                let names = self.names_mut(directory);
                names.extend(whiteouts);
                names.sort_by_key(|(name, _)| *name);
            }
        }
    }

    fn set_opaque(&mut self, directory: NodeId) {
        let xattrs = &mut self.nodes[directory as usize].xattrs;
        xattrs.insert(xattr::OPAQUE.to_vec(), b"y".to_vec());
    }

    /// Takes out names that only an implied parent can have given (AUFS kept hard links' targets in `.wh..wh.plnk/`).
    fn remove_hidden_names(&mut self) {
        for node in &mut self.nodes {
            if let NodeKind::Directory(names) = &mut node.kind {
                let first = names.partition_point(|(name, _)| *name < WHITEOUT_PREFIX);
                let is_hidden = |(name, _): &(&[u8], NodeId)| name.starts_with(WHITEOUT_PREFIX);
                let count = names[first..].partition_point(is_hidden);
                names.drain(first..first + count);
            }
        }
    }

    /// Counts the names of each node; a node that is left without is not in the tree.
    fn count_links(&mut self) -> Vec<u32> {
        let mut links = vec![0u32; self.nodes.len()];
        for directory in self.reachable_directories() {
            links[directory as usize] += 2;
            let NodeKind::Directory(names) = &self.nodes[directory as usize].kind else {
                continue;
            };
            for &(_, node) in names {
                if self.is_directory(node) {
                    links[directory as usize] += 1;
                } else {
                    links[node as usize] += 1;
                }
            }
        }
        links
    }

    /// The tree of the nodes that have a name, numbered anew if there are others.
    fn into_tree(mut self, links: &[u32]) -> Tree<'a> {
        for (node, &links) in self.nodes.iter_mut().zip(links) {
            node.links = links;
        }
        if links.contains(&0) {
            self.remove_nameless(links);
        }
        let (nodes, named) = (self.nodes, self.named);
        let mut tree = Tree {
            nodes,
            implied: vec![],
            opaque: vec![],
            whiteouts: vec![],
        };
        let (mut implied, mut opaque, mut whiteouts) = (vec![], vec![], vec![]);
        tree.walk(|path, id| {
            let node = tree.node(id);
            if !named[id as usize] {
                implied.push(path.to_vec());
            }
            if node.kind == NodeKind::Char(0, 0) {
                whiteouts.push(path.to_vec());
            }
            if node.xattrs.contains_key(xattr::OPAQUE) {
                opaque.push(path.to_vec());
            }
        });
        for paths in [&mut implied, &mut opaque, &mut whiteouts] {
            paths.sort_unstable();
        }
        tree.implied = implied;
        tree.opaque = opaque;
        tree.whiteouts = whiteouts;
        tree
    }

    fn remove_nameless(&mut self, links: &[u32]) {
        let mut number = 0;
        let numbers: Vec<NodeId> = links
            .iter()
            .map(|&links| {
                let this = number;
                number += NodeId::from(links > 0);
                this
            })
            .collect();
        for node in &mut self.nodes {
            if let NodeKind::Directory(names) = &mut node.kind {
                for (_, child) in names {
                    *child = numbers[*child as usize];
                }
            }
        }
        let mut named = links.iter();
        self.named.retain(|_| named.next() != Some(&0));
        self.nodes.retain(|node| node.links > 0);
    }
}

fn whiteout() -> Node<'static> {
    Node {
        kind: NodeKind::Char(0, 0),
        mode: 0,
        ..implied_directory()
    }
}
