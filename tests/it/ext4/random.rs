//! Random layers, as an unpack makes them.

use std::collections::BTreeMap;

use proptest::prelude::*;
use socinbd::tar::{Entry, EntryKind, Timestamp};

use super::{
    fixture::{Layer, xattr},
    reference::Reference,
};
use crate::support::compare::{Options, compare};

/// An entry before it is known whether it is possible where it stands.
#[derive(Clone, Debug)]
struct Wish {
    kind: EntryKind,
    path: Vec<String>,
    slash: bool,
    size: usize,
    mode: u16,
    owner: (u32, u32),
    time: (i64, u32),
    xattrs: Vec<(u8, usize)>,
    /// Which of the files there are, for a hard link.
    target: usize,
}

fn wish() -> impl Strategy<Value = Wish> {
    let kind = prop_oneof![
        6 => Just(EntryKind::Regular),
        4 => Just(EntryKind::Directory),
        2 => Just(EntryKind::Symlink),
        2 => Just(EntryKind::Hardlink),
        1 => Just(EntryKind::Char),
        1 => Just(EntryKind::Fifo),
    ];
    // few names, so that entries meet; long ones, so that directories grow
    let name = prop_oneof![
        3 => "[a-d]",
        1 => "[a-zé]{1,80}",
        1 => (0..40u32).prop_map(|n| format!("{n}{}", "long".repeat(50))),
    ];
    let path = prop::collection::vec(name, 1..5);
    let size = prop_oneof![3 => 0usize..100, 1 => 0usize..20_000];
    let owner = prop_oneof![(0..3u32, 0..3u32), any::<(u32, u32)>()];
    // -1 as an owner means to leave it
    let owner = owner.prop_map(|(u, g)| (u.min(u32::MAX - 1), g.min(u32::MAX - 1)));
    // e2fsck takes 2310 to 2378 for times before 1970 that old kernels wrote wrongly
    let seconds = prop_oneof![
        -0x9000_0000..0x2_8000_0000i64,
        0x3_0000_0000..0x4_0000_0000i64
    ];
    let time = (seconds, 0..1_000_000_000u32);
    let xattrs = prop::collection::vec((0..6u8, 0..400usize), 0..4);
    (
        (kind, path, any::<bool>(), size),
        (0..0o10000u16, owner, time, xattrs, any::<usize>()),
    )
        .prop_map(
            |((kind, path, slash, size), (mode, owner, time, xattrs, target))| Wish {
                kind,
                path,
                slash,
                size,
                mode,
                owner,
                time,
                xattrs,
                target,
            },
        )
}

/// The layer of those wishes that are possible one after the other.
fn layer(wishes: &[Wish]) -> Layer {
    let mut layer = Layer::default();
    // every path, and whether it is a directory
    let mut there: BTreeMap<String, bool> = BTreeMap::new();
    for wish in wishes {
        let path = wish.path.join("/");
        let parents = (1..wish.path.len()).map(|n| wish.path[..n].join("/"));
        let parents: Vec<String> = parents.collect();
        if parents
            .iter()
            .any(|parent| there.get(parent) == Some(&false))
        {
            continue;
        }
        let targets: Vec<String> = there
            .iter()
            .filter(|&(other, is_dir)| {
                !is_dir && *other != path && !other.starts_with(&format!("{path}/"))
            })
            .map(|(other, _)| other.clone())
            .collect();
        let is_dir = wish.kind == EntryKind::Directory;
        if wish.kind == EntryKind::Hardlink && targets.is_empty() {
            continue;
        }
        if there.get(&path) == Some(&true) && !is_dir {
            there.retain(|other, _| !other.starts_with(&format!("{path}/")));
        }
        there.extend(parents.into_iter().map(|parent| (parent, true)));
        there.insert(path.clone(), is_dir);
        let name = if wish.slash {
            format!("./{path}")
        } else {
            path
        };
        let entry = match wish.kind {
            EntryKind::Regular => {
                let byte = wish.size as u8 | 1;
                layer.file(name, vec![byte; wish.size])
            }
            EntryKind::Symlink => layer.symlink(name, "t".repeat(wish.size.clamp(1, 4095))),
            EntryKind::Hardlink => layer.hardlink(name, &targets[wish.target % targets.len()]),
            EntryKind::Char => layer.device(wish.kind, &name, 5, wish.size as i64),
            kind => layer.add(kind, name),
        };
        attributes(entry, wish);
    }
    for n in 0..wishes.len() % 3 {
        layer.add(EntryKind::Regular, format!("white outs/.wh.gone {n}"));
    }
    layer
}

fn attributes(entry: &mut Entry, wish: &Wish) {
    entry.mode = wish.mode.into();
    (entry.uid, entry.gid) = wish.owner;
    let (seconds, nanoseconds) = wish.time;
    entry.mtime = Some(Timestamp {
        seconds,
        nanoseconds,
    });
    let space = match entry.kind {
        EntryKind::Regular | EntryKind::Directory => "user",
        EntryKind::Hardlink => return,
        _ => "trusted",
    };
    for &(name, size) in &wish.xattrs {
        entry.pax.retain(|(key, _)| !key.ends_with(&[b'0' + name]));
        xattr(entry, &format!("{space}.{name}"), vec![name; size]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_random_layers_disk_is_what_an_unpack_makes(
        wishes in prop::collection::vec(wish(), 0..200),
    ) {
        let layer = layer(&wishes);
        let disk = layer.disk();
        disk.check();
        let mount = disk.mount();
        let reference = Reference::unpack(&layer);
        let found = compare(reference.path(), mount.path(), &Options::default()).unwrap();
        prop_assert!(found.is_empty(), "{found:#?}");
    }
}
