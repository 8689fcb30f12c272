//! From a layer's entries, in tar order, to its tree.

mod finish;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    Error, Node, NodeId, NodeKind, ROOT, Tree,
    path::{Clean, Leaf, split_plain},
    shown, xattr,
};
use crate::tar::{Entry, EntryKind, Timestamp};

/// Linux's own (MAXSYMLINKS).
const SYMLINK_LIMIT: usize = 40;
/// Components walked because a symlink says so, over all entries. A path may cost 40 symlinks of 4 KiB each; all of them together
/// may not.
const STEP_LIMIT: usize = 1 << 24;
/// One path of 4 KiB may imply 2,000 directories, at a hundred times the memory of its bytes in a table.
const IMPLIED_LIMIT: usize = 1 << 19;
/// Entries that a tree may have, so that nodes (entries, implied directories, the root) can be numbered as ext4's inodes are.
const ENTRY_LIMIT: usize = 1 << 31;

const IMPLIED_MODE: u16 = 0o755;
/// The mode that symlinks have on Linux, whatever a tar says.
const SYMLINK_MODE: u16 = 0o777;

/// What a name stands for from its removal until its next node is there.
const GONE: NodeId = NodeId::MAX;

pub(super) fn build(entries: &[Entry]) -> Result<Tree<'_>, Error> {
    if entries.len() > ENTRY_LIMIT {
        return Err(Error::TooManyEntries {
            count: entries.len(),
            limit: ENTRY_LIMIT,
        });
    }
    let mut builder = Builder {
        entries,
        nodes: vec![implied_directory()],
        named: vec![false],
        late: BTreeMap::new(),
        marks: BTreeMap::new(),
        forward: HashMap::new(),
        implied: 0,
        steps: 0,
        last_parent: None,
        last_directory: None,
    };
    builder.nodes.reserve(entries.len());
    let mut clean = Clean::default();
    for entry in 0..entries.len() {
        builder.add(entry, &mut clean)?;
    }
    builder.finish()
}

struct Builder<'a> {
    entries: &'a [Entry],
    /// All nodes that ever were, also those that later entries replaced.
    nodes: Vec<Node<'a>>,
    /// For each node: does an entry name it? Only directories may be without.
    named: Vec<bool>,
    /// Names that came after a greater one of their directory, until all have come. Most tars are in order, and so a directory's names
    /// are a sorted list that grows at its end; but one in any order must not take time by the square of its length.
    late: BTreeMap<(NodeId, &'a [u8]), NodeId>,
    /// What whiteouts say of each directory.
    marks: BTreeMap<NodeId, Marks<'a>>,
    /// Nodes that stand for a hard link whose target has not come yet, and the link's entry.
    forward: HashMap<NodeId, usize>,
    implied: usize,
    steps: usize,
    /// The parent of the last entry, as its text and as its node, until anything is replaced.
    last_parent: Option<(&'a [u8], NodeId)>,
    /// Likewise the last entry that is a directory: what comes next is often in it.
    last_directory: Option<(&'a [u8], NodeId)>,
}

#[derive(Default)]
struct Marks<'a> {
    opaque: bool,
    hidden: BTreeSet<&'a [u8]>,
}

/// How far a walk over directories came.
enum Walked {
    Whole,
    /// There is no such name.
    Missing,
}

impl<'a> Builder<'a> {
    fn add(&mut self, index: usize, clean: &mut Clean<'a>) -> Result<(), Error> {
        let entries = self.entries;
        let entry = &entries[index];
        let plain = split_plain(&entry.name);
        let known = plain.and_then(|(parent, name)| Some((self.known(parent)?, name)));
        let (parent, leaf) = match known {
            Some(found) => found,
            None => {
                clean.set(&entry.name)?;
                let Some((leaf, parents)) = clean.split() else {
                    return self.add_root(index);
                };
                let node = self.parent(parents, &entry.name)?;
                if let Some((parent, _)) = plain {
                    self.last_parent = Some((parent, node));
                }
                (node, leaf)
            }
        };
        match Leaf::of(leaf) {
            Leaf::Name(name) => {
                let node = self.add_name(parent, name, index)?;
                if plain.is_some() && entry.kind == EntryKind::Directory {
                    let path = entry.name.strip_suffix(b"/").unwrap_or(&entry.name);
                    self.last_directory = Some((path, node));
                }
            }
            Leaf::Whiteout(name) => {
                self.marks.entry(parent).or_default().hidden.insert(name);
            }
            Leaf::Opaque => self.marks.entry(parent).or_default().opaque = true,
            Leaf::Nothing => {}
        }
        Ok(())
    }

    /// The directory of this text, if it is one of those that come again and again.
    fn known(&self, parent: &[u8]) -> Option<NodeId> {
        [self.last_parent, self.last_directory]
            .into_iter()
            .flatten()
            .find(|(text, _)| *text == parent)
            .map(|(_, node)| node)
    }

    /// `./` gives the root its attributes; anything else that comes to the root is passed over, as in containerd.
    fn add_root(&mut self, index: usize) -> Result<(), Error> {
        if self.entries[index].kind == EntryKind::Directory {
            self.set_directory(ROOT, index)?;
        }
        Ok(())
    }

    fn add_name(&mut self, parent: NodeId, name: &'a [u8], index: usize) -> Result<NodeId, Error> {
        let entry = &self.entries[index];
        if let Some(existing) = self.child(parent, name) {
            let both = entry.kind == EntryKind::Directory && self.is_directory(existing);
            if both {
                self.set_directory(existing, index)?;
                return Ok(existing);
            }
            self.insert(parent, name, GONE);
            // what was replaced may have been a directory or symlink on the way there
            self.last_parent = None;
            self.last_directory = None;
        }
        let node = match entry.kind {
            EntryKind::Hardlink => self.link(index)?,
            _ => {
                let node = self.new_node(index)?;
                self.push(node, true)
            }
        };
        self.insert(parent, name, node);
        Ok(node)
    }

    /// The node that a hard link's name will stand for.
    fn link(&mut self, index: usize) -> Result<NodeId, Error> {
        let entries = self.entries;
        let entry = &entries[index];
        match self.find(entry)? {
            Some(node) if self.is_directory(node) => Err(link_to_directory(entry)),
            Some(node) => Ok(node),
            None => {
                let node = self.push(implied_directory(), true);
                self.nodes[node as usize].kind = NodeKind::Fifo;
                self.forward.insert(node, index);
                Ok(node)
            }
        }
    }

    fn new_node(&self, index: usize) -> Result<Node<'a>, Error> {
        let entries = self.entries;
        let entry = &entries[index];
        let path = || shown(&entry.name);
        let device = || -> Result<(u32, u32), Error> {
            let number = |value: i64| u32::try_from(value).ok();
            number(entry.devmajor)
                .zip(number(entry.devminor))
                .ok_or_else(|| Error::DeviceNumber {
                    path: path(),
                    major: entry.devmajor,
                    minor: entry.devminor,
                })
        };
        let kind = match entry.kind {
            EntryKind::Regular => NodeKind::File {
                entry: index,
                size: entry.size,
            },
            EntryKind::Directory => NodeKind::Directory(vec![]),
            EntryKind::Symlink if entry.linkname.is_empty() => {
                return Err(Error::EmptySymlink { path: path() });
            }
            EntryKind::Symlink if entry.linkname.contains(&0) => {
                return Err(Error::ZeroByte { path: path() });
            }
            EntryKind::Symlink => NodeKind::Symlink(&entry.linkname),
            EntryKind::Char => device().map(|(major, minor)| NodeKind::Char(major, minor))?,
            EntryKind::Block => device().map(|(major, minor)| NodeKind::Block(major, minor))?,
            // a link never gets here: it has no node of its own
            EntryKind::Fifo | EntryKind::Hardlink => NodeKind::Fifo,
        };
        let mode = match kind {
            NodeKind::Symlink(_) => SYMLINK_MODE,
            _ => mode_bits(entry.mode),
        };
        Ok(Node {
            kind,
            mode,
            uid: owner(entry.uid),
            gid: owner(entry.gid),
            mtime: entry.mtime.unwrap_or_default(),
            xattrs: xattr::of(entry)?,
            links: 0,
        })
    }

    fn set_directory(&mut self, node: NodeId, index: usize) -> Result<(), Error> {
        let entry = &self.entries[index];
        let xattrs = xattr::of(entry)?;
        let directory = &mut self.nodes[node as usize];
        directory.mode = mode_bits(entry.mode);
        directory.uid = owner(entry.uid);
        directory.gid = owner(entry.gid);
        directory.mtime = entry.mtime.unwrap_or_default();
        directory.xattrs = xattrs;
        self.named[node as usize] = true;
        Ok(())
    }

    /// The directory that a path's parents name; those that are missing are made.
    fn parent(&mut self, parents: &[&'a [u8]], path: &[u8]) -> Result<NodeId, Error> {
        let mut ancestors = vec![ROOT];
        let mut links = 0;
        self.descend(
            &mut ancestors,
            parents.iter().copied(),
            &mut links,
            true,
            path,
        )?;
        Ok(last(&ancestors))
    }

    /// The node that a hard link names, if it is there yet. A symlink there is itself the target.
    fn find(&mut self, link: &'a Entry) -> Result<Option<NodeId>, Error> {
        let mut clean = Clean::default();
        clean.set(&link.linkname)?;
        let Some((leaf, parents)) = clean.split() else {
            return Ok(Some(ROOT));
        };
        let mut ancestors = vec![ROOT];
        let parents = parents.iter().copied();
        match self.descend(&mut ancestors, parents, &mut 0, false, &link.name)? {
            Walked::Whole => Ok(self.child(last(&ancestors), leaf)),
            Walked::Missing => Ok(None),
        }
    }

    /// Walks from the last of `ancestors` down `names`, through symlinks, and leaves in `ancestors` the way from the root to where
    /// that leads. Calls itself for the text of a symlink, 40 deep at most.
    fn descend(
        &mut self,
        ancestors: &mut Vec<NodeId>,
        names: impl Iterator<Item = &'a [u8]>,
        links: &mut usize,
        create: bool,
        path: &[u8],
    ) -> Result<Walked, Error> {
        for name in names {
            if *links > 0 {
                self.steps += 1;
                if self.steps > STEP_LIMIT {
                    return Err(Error::TooManySteps {
                        path: shown(path),
                        limit: STEP_LIMIT,
                    });
                }
            }
            match name {
                b"" | b"." => continue,
                b".." => {
                    if ancestors.len() > 1 {
                        ancestors.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = last(ancestors);
            let Some(child) = self.child(here, name) else {
                if !create {
                    return Ok(Walked::Missing);
                }
                ancestors.push(self.imply(here, name, path)?);
                continue;
            };
            match self.nodes[child as usize].kind {
                NodeKind::Directory(_) => ancestors.push(child),
                NodeKind::Symlink(text) => {
                    *links += 1;
                    if *links > SYMLINK_LIMIT {
                        return Err(Error::TooManySymlinks {
                            path: shown(path),
                            limit: SYMLINK_LIMIT,
                        });
                    }
                    if text.starts_with(b"/") {
                        ancestors.truncate(1);
                    }
                    // a box ends the chain of types that a function calling itself with another iterator would make
                    let names: Box<dyn Iterator<Item = &'a [u8]>> =
                        Box::new(text.split(|&byte| byte == b'/'));
                    if let Walked::Missing = self.descend(ancestors, names, links, create, path)? {
                        return Ok(Walked::Missing);
                    }
                }
                _ if create => {
                    return Err(Error::ParentNotDirectory {
                        path: shown(path),
                        parent: shown(name),
                    });
                }
                _ => return Ok(Walked::Missing),
            }
        }
        Ok(Walked::Whole)
    }

    fn imply(&mut self, parent: NodeId, name: &'a [u8], path: &[u8]) -> Result<NodeId, Error> {
        self.implied += 1;
        if self.implied > IMPLIED_LIMIT {
            return Err(Error::TooManyImplied {
                path: shown(path),
                limit: IMPLIED_LIMIT,
            });
        }
        // a symlink's text has not been through `Clean`
        if name.len() > super::path::NAME_LIMIT {
            return Err(Error::NameTooLong {
                path: shown(path),
                length: name.len(),
                limit: super::path::NAME_LIMIT,
            });
        }
        let node = self.push(implied_directory(), false);
        self.insert(parent, name, node);
        Ok(node)
    }

    fn push(&mut self, node: Node<'a>, named: bool) -> NodeId {
        // ENTRY_LIMIT and IMPLIED_LIMIT together are below 2^32, and GONE
        let id = self.nodes.len() as NodeId;
        self.nodes.push(node);
        self.named.push(named);
        id
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let NodeKind::Directory(names) = &self.nodes[parent as usize].kind else {
            return None;
        };
        let found = match place(names, name) {
            EntryPlace::At(at) => names[at].1,
            EntryPlace::Late => *self.late.get(&(parent, name))?,
            EntryPlace::End => return None,
        };
        (found != GONE).then_some(found)
    }

    /// Makes a name stand for a node, whatever it stood for.
    fn insert(&mut self, parent: NodeId, name: &'a [u8], node: NodeId) {
        let names = self.names_mut(parent);
        match place(names, name) {
            EntryPlace::At(at) => names[at].1 = node,
            EntryPlace::End => names.push((name, node)),
            EntryPlace::Late => {
                self.late.insert((parent, name), node);
            }
        }
    }

    fn names_mut(&mut self, directory: NodeId) -> &mut Vec<(&'a [u8], NodeId)> {
        match &mut self.nodes[directory as usize].kind {
            NodeKind::Directory(names) => names,
            _ => unreachable!("only directories are taken as parents"),
        }
    }

    fn is_directory(&self, node: NodeId) -> bool {
        matches!(self.nodes[node as usize].kind, NodeKind::Directory(_))
    }
}

/// Where a name is, or would be.
enum EntryPlace {
    /// In its directory's list.
    At(usize),
    /// Behind all of the list.
    End,
    /// Among the late names.
    Late,
}

fn place(names: &[(&[u8], NodeId)], name: &[u8]) -> EntryPlace {
    match names.last() {
        Some((last, _)) if name <= *last => names
            .binary_search_by_key(&name, |(name, _)| name)
            .map_or(EntryPlace::Late, EntryPlace::At),
        _ => EntryPlace::End,
    }
}

fn mode_bits(mode: i64) -> u16 {
    (mode & 0o7777) as u16
}

fn last(ancestors: &[NodeId]) -> NodeId {
    ancestors.last().copied().unwrap_or(ROOT)
}

fn link_to_directory(entry: &Entry) -> Error {
    Error::LinkToDirectory {
        path: shown(&entry.name),
        target: shown(&entry.linkname),
    }
}

fn implied_directory() -> Node<'static> {
    Node {
        kind: NodeKind::Directory(vec![]),
        mode: IMPLIED_MODE,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: BTreeMap::new(),
        links: 0,
    }
}

/// The owner of a file after an unpack: -1 leaves the owner unchanged in chown(2), and root has created the file.
fn owner(id: u32) -> u32 {
    match id {
        u32::MAX => 0,
        id => id,
    }
}
