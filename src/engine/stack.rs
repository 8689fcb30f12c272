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

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid},
    io::Errno,
};

use crate::{
    error::{Kind, Result, ResultExt},
    layer::StackingFacts,
};

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

/// The layers merged, looked at by path.
struct Merged<'a, T> {
    layers: &'a [T],
    implied: Vec<HashSet<&'a [u8]>>,
    looked: Vec<HashMap<LayerPath, Option<Found>>>,
}

impl<'a, T: LayerTree> Merged<'a, T> {
    fn new(layers: &'a [T]) -> Self {
        Self {
            layers,
            implied: layers
                .iter()
                .map(|layer| layer.facts().implied.iter().map(Vec::as_slice).collect())
                .collect(),
            looked: vec![HashMap::new(); layers.len()],
        }
    }

    fn look(&mut self, layer: usize, path: &[u8]) -> io::Result<Option<Found>> {
        if let Some(found) = self.looked[layer].get(path) {
            return Ok(found.clone());
        }
        let found = self.layers[layer].look(path)?;
        self.looked[layer].insert(path.to_vec(), found.clone());
        Ok(found)
    }

    /// The layers whose directories make up the merged one at `path`, topmost first; none where the merged tree has no directory.
    fn parts(&mut self, path: &[u8]) -> io::Result<Vec<usize>> {
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
    fn owner(&self, path: &[u8], parts: &[usize]) -> Option<usize> {
        let named = parts
            .iter()
            .find(|&&layer| !self.implied[layer].contains(path));
        named.or(parts.first()).copied()
    }
}

/// A layer's tree on its mount.
pub(super) struct MountedLayer<'a> {
    /// The root of the mount.
    pub root: BorrowedFd<'a>,
    /// See [`LayerTree::facts`].
    pub facts: StackingFacts,
}

impl LayerTree for MountedLayer<'_> {
    fn facts(&self) -> &StackingFacts {
        &self.facts
    }

    fn look(&self, path: &[u8]) -> io::Result<Option<Found>> {
        let name = if path.is_empty() {
            OsStr::new(".")
        } else {
            OsStr::from_bytes(path)
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat2(
            self.root,
            name,
            flags,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
        ) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let stat = rustix::fs::fstat(&fd)?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let xattrs = if directory { xattrs(&fd)? } else { Vec::new() };
        let (marks, xattrs): (Vec<_>, Vec<_>) = xattrs
            .into_iter()
            .partition(|(name, _)| name.starts_with(b"trusted.overlay."));
        Ok(Some(Found {
            directory,
            opaque: marks
                .iter()
                .any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y"),
            attributes: Attributes {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: (
                    stat.st_mtime,
                    i64::try_from(stat.st_mtime_nsec).unwrap_or_default(),
                ),
                xattrs,
            },
        }))
    }
}

/// The xattrs of what an O_PATH descriptor stands for, through its name in /proc (fgetxattr refuses such descriptors).
fn xattrs(fd: &OwnedFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let mut names = vec![0; 64 * 1024]; // XATTR_LIST_MAX
    let length = rustix::fs::listxattr(&path, &mut names[..])?;
    let mut value = vec![0; 64 * 1024]; // XATTR_SIZE_MAX
    names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let length = rustix::fs::getxattr(&path, name, &mut value[..])?;
            Ok((name.to_vec(), value[..length].to_vec()))
        })
        .collect()
}

/// Makes the tree on top in `folder`, which does not exist yet.
pub(super) fn make_top(folder: &Path, plan: &Plan) -> Result<()> {
    let make = || -> io::Result<()> {
        make_directory(folder)?;
        for path in plan.top.keys().filter(|path| !path.is_empty()) {
            make_directory(&folder.join(OsStr::from_bytes(path)))?;
        }
        // children first: making an entry changes its parent's time
        for (path, attributes) in plan.top.iter().rev() {
            attributes.apply(&folder.join(OsStr::from_bytes(path)))?;
        }
        Ok(())
    };
    make().or_kind(Kind::Io, || {
        format!(
            "making the tree on top of the layers in {}",
            folder.display()
        )
    })
}

fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

impl Attributes {
    /// Gives them to the directory at `path`.
    pub(super) fn apply(&self, path: &Path) -> io::Result<()> {
        let directory = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::fs::fchown(
            &directory,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(self.mode))?;
        for (name, value) in &self.xattrs {
            rustix::fs::fsetxattr(
                &directory,
                name.as_slice(),
                value,
                rustix::fs::XattrFlags::empty(),
            )?;
        }
        let time = Timespec {
            tv_sec: self.mtime.0,
            tv_nsec: self.mtime.1,
        };
        rustix::fs::utimensat(
            directory.as_fd(),
            c"",
            &Timestamps {
                last_access: time,
                last_modification: time,
            },
            AtFlags::EMPTY_PATH,
        )
        .or_else(|_| {
            rustix::fs::futimens(
                &directory,
                &Timestamps {
                    last_access: time,
                    last_modification: time,
                },
            )
        })?;
        Ok(())
    }
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
