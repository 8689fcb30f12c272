//! Trees of entries made by hand.

use std::collections::BTreeMap;

use super::{Error, Node, NodeKind, ROOT, Tree};
use crate::tar::{Entry, EntryKind, Timestamp};

fn entry(kind: EntryKind, name: &str) -> Entry {
    Entry {
        uid: 1,
        gid: 2,
        mtime: Some(Timestamp {
            seconds: 9,
            nanoseconds: 0,
        }),
        ..Entry::bare(kind, name)
    }
}

fn file(name: &str) -> Entry {
    entry(EntryKind::Regular, name)
}

fn dir(name: &str) -> Entry {
    entry(EntryKind::Directory, name)
}

fn link(kind: EntryKind, name: &str, target: &str) -> Entry {
    Entry {
        linkname: target.into(),
        ..entry(kind, name)
    }
}

fn symlink(name: &str, text: &str) -> Entry {
    link(EntryKind::Symlink, name, text)
}

fn hardlink(name: &str, target: &str) -> Entry {
    link(EntryKind::Hardlink, name, target)
}

fn with_xattrs(mut entry: Entry, xattrs: &[(&str, &str)]) -> Entry {
    for (name, value) in xattrs {
        let key = format!("SCHILY.xattr.{name}");
        entry.pax.push((key.into(), (*value).into()));
    }
    entry
}

/// The paths of a tree, a letter for the kind of each (files with the entry's number), in order.
fn paths(entries: &[Entry]) -> Vec<String> {
    let tree = Tree::build(entries).unwrap();
    check_sound(&tree);
    let mut found = vec![];
    tree.walk(|path, node| {
        let kind = match &tree.node(node).kind {
            NodeKind::File { entry, .. } => entry.to_string(),
            NodeKind::Directory(_) => "d".into(),
            NodeKind::Symlink(_) => "l".into(),
            NodeKind::Char(0, 0) => "whiteout".into(),
            NodeKind::Char(..) => "c".into(),
            NodeKind::Block(..) => "b".into(),
            NodeKind::Fifo => "p".into(),
        };
        found.push(format!("{} {kind}", String::from_utf8_lossy(path)));
    });
    assert_eq!(found.remove(0), " d");
    found
}

/// All nodes have names, as many as they say.
fn check_sound(tree: &Tree) {
    let mut names = vec![0; tree.nodes.len()];
    let mut parents = vec![];
    tree.walk(|path, node| {
        names[node as usize] += 1;
        if matches!(tree.node(node).kind, NodeKind::Directory(_)) && node != ROOT {
            let end = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
            parents.push(path[..end].to_vec());
        }
    });
    tree.walk(|path, node| {
        let links = tree.node(node).links;
        match tree.node(node).kind {
            NodeKind::Directory(_) => {
                let below = parents.iter().filter(|parent| *parent == path).count();
                assert_eq!(links as usize, 2 + below, "{path:?}");
            }
            _ => assert_eq!(links, names[node as usize], "{path:?}"),
        }
    });
    assert!(names.iter().all(|&count| count > 0), "a node has no name");
}

fn at<'t>(tree: &'t Tree<'t>, wanted: &str) -> &'t Node<'t> {
    let mut found = None;
    tree.walk(|path, node| {
        if path == wanted.as_bytes() {
            found = Some(node);
        }
    });
    tree.node(found.unwrap_or_else(|| panic!("no {wanted}")))
}

fn texts(paths: &[Vec<u8>]) -> Vec<&str> {
    paths
        .iter()
        .map(|path| std::str::from_utf8(path).unwrap())
        .collect()
}

#[test]
fn paths_are_cleaned_and_parents_implied() {
    let entries = [
        file("./a/b"),
        file("/a//c"),
        file("../../d"),
        file("bar/../bar////foo"),
        dir("e/"),
        file("e/f"),
    ];
    assert_eq!(
        paths(&entries),
        [
            "a d",
            "a/b 0",
            "a/c 1",
            "bar d",
            "bar/foo 3",
            "d 2",
            "e d",
            "e/f 5"
        ]
    );
    let tree = Tree::build(&entries).unwrap();
    assert_eq!(texts(&tree.implied), ["", "a", "bar"]);
    let implied = at(&tree, "a");
    assert_eq!((implied.mode, implied.uid), (0o755, 0));
    assert_eq!(implied.mtime, Timestamp::default());
}

#[test]
fn an_entry_for_the_root_gives_its_attributes() {
    for name in ["./", "/", "", "a/..", ".."] {
        let entries = [dir(name)];
        let tree = Tree::build(&entries).unwrap();
        assert_eq!((tree.nodes.len(), tree.nodes[0].uid), (1, 1), "{name}");
        assert_eq!(tree.implied, Vec::<Vec<u8>>::new());
        // what is no directory does not replace it
        let entries = [file(name), symlink(name, "x")];
        let tree = Tree::build(&entries).unwrap();
        assert_eq!((tree.nodes.len(), tree.nodes[0].uid), (1, 0), "{name}");
    }
}

#[test]
fn the_owner_that_chown_does_not_set_is_root() {
    for entry in [file("a"), dir("a")] {
        let odd = Entry {
            uid: u32::MAX,
            gid: u32::MAX,
            ..entry
        };
        let entries = [odd];
        let tree = Tree::build(&entries).unwrap();
        let a = at(&tree, "a");
        assert_eq!((a.uid, a.gid), (0, 0));
    }
}

#[test]
fn a_later_entry_replaces_all_but_a_directory_by_a_directory() {
    assert_eq!(paths(&[file("a"), file("b"), file("./a")]), ["a 2", "b 1"]);
    assert_eq!(paths(&[file("a"), dir("a"), file("a/b")]), ["a d", "a/b 2"]);
    assert_eq!(paths(&[dir("a"), file("a/b"), file("a")]), ["a 2"]);
    let entries = [
        with_xattrs(dir("a"), &[("user.old", "x")]),
        file("a/b"),
        Entry {
            uid: 7,
            ..with_xattrs(dir("a"), &[("user.new", "y")])
        },
    ];
    assert_eq!(paths(&entries), ["a d", "a/b 1"]);
    let tree = Tree::build(&entries).unwrap();
    let a = at(&tree, "a");
    assert_eq!(a.uid, 7);
    assert_eq!(
        a.xattrs,
        BTreeMap::from([(b"user.new".to_vec(), b"y".to_vec())])
    );
}

#[test]
fn a_directory_that_comes_back_does_not_bring_what_was_in_it() {
    let entries = [file("a/b"), file("a"), file("a2/x"), dir("a"), file("a/c")];
    assert_eq!(paths(&entries), ["a d", "a/c 4", "a2 d", "a2/x 2"]);
}

#[test]
fn a_named_directory_is_not_implied_whenever_its_entry_comes() {
    let entries = [file("a/b/c"), dir("a/b"), dir(".")];
    let tree = Tree::build(&entries).unwrap();
    assert_eq!(texts(&tree.implied), ["a"]);
}

#[test]
fn hard_links_share_a_node_whichever_comes_first() {
    for entries in [
        vec![file("a"), hardlink("b", "a"), hardlink("d/c", "./b")],
        vec![hardlink("d/c", "b"), hardlink("b", "/a"), file("a")],
        vec![hardlink("b", "a"), file("a"), hardlink("d/c", "b")],
    ] {
        let tree = Tree::build(&entries).unwrap();
        check_sound(&tree);
        assert_eq!(tree.nodes.len(), 3, "root, d, and one file");
        assert_eq!(at(&tree, "d/c").links, 3);
        assert!(matches!(at(&tree, "b").kind, NodeKind::File { .. }));
    }
    // a symlink is itself the target
    let entries = [symlink("a", "x"), hardlink("b", "a")];
    let tree = Tree::build(&entries).unwrap();
    assert!(matches!(at(&tree, "b").kind, NodeKind::Symlink(_)));
}

#[test]
fn a_replaced_target_lives_on_under_its_other_name() {
    let entries = [file("a"), hardlink("b", "a"), file("a")];
    assert_eq!(paths(&entries), ["a 2", "b 0"]);
    // and a forward link that was replaced asks for nothing
    assert_eq!(paths(&[hardlink("b", "nowhere"), file("b")]), ["b 1"]);
}

#[test]
fn hard_links_to_nothing_and_to_directories_are_refused() {
    let missing = |path: &str, target: &str| Error::LinkTargetMissing {
        path: path.into(),
        target: target.into(),
    };
    let refused = |entries: &[Entry]| Tree::build(entries).unwrap_err();
    assert_eq!(refused(&[hardlink("b", "a")]), missing("b", "a"));
    assert_eq!(
        refused(&[hardlink("b", "b")]),
        missing("b", "b"),
        "a link to itself"
    );
    assert!(matches!(
        refused(&[hardlink("a", "b"), hardlink("b", "c"), hardlink("c", "a")]),
        Error::LinkTargetMissing { .. }
    ));
    assert_eq!(
        refused(&[file("a"), hardlink("a", "a")]),
        missing("a", "a"),
        "a link in the place of its own target"
    );
    let to_directory = Error::LinkToDirectory {
        path: "b".into(),
        target: "a".into(),
    };
    assert_eq!(refused(&[dir("a"), hardlink("b", "a")]), to_directory);
    assert_eq!(refused(&[hardlink("b", "a"), dir("a")]), to_directory);
    let to_root = refused(&[hardlink("b", "/")]);
    assert!(matches!(to_root, Error::LinkToDirectory { .. }));
}

#[test]
fn whiteouts_hide_what_lower_layers_have() {
    let entries = [file("d/.wh.gone"), file(".wh.x"), file("d/.wh.gone")];
    assert_eq!(paths(&entries), ["d d", "d/gone whiteout", "x whiteout"]);
    let tree = Tree::build(&entries).unwrap();
    assert_eq!(texts(&tree.whiteouts), ["d/gone", "x"]);
    assert_eq!(texts(&tree.implied), ["", "d"]);
    assert_eq!(tree.opaque, Vec::<Vec<u8>>::new());
}

#[test]
fn a_whiteout_beside_a_name_of_the_same_layer() {
    let opaque = |entries: &[Entry]| {
        let tree = Tree::build(entries).unwrap();
        check_sound(&tree);
        assert_eq!(tree.whiteouts, Vec::<Vec<u8>>::new());
        let marked: Vec<String> = texts(&tree.opaque).into_iter().map(Into::into).collect();
        for path in &marked {
            assert_eq!(at(&tree, path).xattrs[&b"trusted.overlay.opaque"[..]], b"y");
        }
        marked
    };
    assert_eq!(opaque(&[file("a"), file(".wh.a")]), [""; 0]);
    assert_eq!(opaque(&[file(".wh.a"), file("a")]), [""; 0]);
    assert_eq!(opaque(&[dir("a"), file(".wh.a")]), ["a"]);
    assert_eq!(opaque(&[file(".wh.a"), dir("a")]), ["a"]);
    assert_eq!(opaque(&[file(".wh.a"), file("a/b")]), ["a"]);
    assert_eq!(opaque(&[file("a/.wh..wh..opq"), dir("a")]), ["a"]);
    assert_eq!(
        opaque(&[file(".wh..wh..opq"), file("a/b/.wh..wh..opq")]),
        ["", "a/b"]
    );
}

#[test]
fn marks_go_with_the_directory_that_had_them() {
    let entries = [file("a/.wh.x"), file("a/.wh..wh..opq"), file("a"), dir("a")];
    let tree = Tree::build(&entries).unwrap();
    assert_eq!(paths(&entries), ["a d"]);
    assert_eq!(tree.opaque, Vec::<Vec<u8>>::new());
}

#[test]
fn names_that_begin_as_whiteouts_never_show() {
    let entries = [
        dir(".wh..wh.plnk"),
        file(".wh..wh.plnk/1.2"),
        hardlink("kept", ".wh..wh.plnk/1.2"),
        file(".wh..wh.aufs"),
        file(".wh."),
        file(".wh.."),
        file(".wh..."),
        file("d/.wh.x/below"),
    ];
    assert_eq!(paths(&entries), ["d d", "kept 1"]);
}

#[test]
fn symlinks_in_the_parents_are_followed_within_the_root() {
    let entries = [
        symlink("lib", "usr/lib"),
        file("lib/a"),
        symlink("abs", "/usr/../usr/./lib"),
        file("abs/b"),
        symlink("usr/up", "../../../usr"),
        file("usr/up/c"),
        hardlink("link", "lib/a"),
    ];
    assert_eq!(
        paths(&entries),
        [
            "abs l",
            "lib l",
            "link 1",
            "usr d",
            "usr/c 5",
            "usr/lib d",
            "usr/lib/a 1",
            "usr/lib/b 3",
            "usr/up l"
        ]
    );
    // what is there when the entry comes counts
    let entries = [
        file("l/a"),
        symlink("l", "d"),
        file("l/b"),
        dir("l"),
        file("l/c"),
    ];
    assert_eq!(paths(&entries), ["d d", "d/b 2", "l d", "l/c 4"]);
}

#[test]
fn parents_that_lead_nowhere_are_refused() {
    let refused = |entries: &[Entry]| Tree::build(entries).unwrap_err();
    assert_eq!(
        refused(&[file("a"), file("a/b")]),
        Error::ParentNotDirectory {
            path: "a/b".into(),
            parent: "a".into()
        }
    );
    assert!(matches!(
        refused(&[symlink("a", "b"), symlink("b", "a"), file("a/c")]),
        Error::TooManySymlinks { limit: 40, .. }
    ));
    assert!(matches!(
        refused(&[symlink("a", &"n".repeat(256)), file("a/c")]),
        Error::NameTooLong { length: 256, .. }
    ));
    assert!(matches!(
        refused(&[symlink("a", "")]),
        Error::EmptySymlink { .. }
    ));
    assert!(matches!(
        refused(&[symlink("a", "x\0y")]),
        Error::ZeroByte { .. }
    ));
    let negative = Entry {
        devmajor: -1,
        ..entry(EntryKind::Char, "a")
    };
    assert!(matches!(
        refused(&[negative]),
        Error::DeviceNumber { major: -1, .. }
    ));
}

#[test]
fn the_symlinks_of_many_entries_have_a_limit_together() {
    let text = "d/../".repeat(800);
    let mut entries = vec![dir("d")];
    for n in 0..30 {
        let next = format!("{text}l{}", n + 1);
        entries.push(symlink(&format!("l{n}"), &next));
    }
    entries.push(symlink("l30", "d"));
    entries.extend((0..1000).map(|n| file(&format!("l0/./{n}/../{n}"))));
    assert!(matches!(
        Tree::build(&entries),
        Err(Error::TooManySteps { .. })
    ));
}

#[test]
fn implied_directories_have_a_limit() {
    let deep = "d/".repeat(1000);
    let entries: Vec<Entry> = (0..600).map(|n| file(&format!("{n}/{deep}f"))).collect();
    assert!(matches!(
        Tree::build(&entries),
        Err(Error::TooManyImplied { .. })
    ));
    assert_eq!(Tree::build(&entries[..10]).unwrap().implied.len(), 10_011);
}

#[test]
fn xattrs_of_the_image_that_overlayfs_would_obey_are_dropped() {
    let entries = [with_xattrs(
        dir("a"),
        &[
            ("trusted.overlay.opaque", "y"),
            ("user.overlay.opaque", "y"),
            ("user.kept", ""),
            ("com.apple.quarantine", "x"),
        ],
    )];
    let tree = Tree::build(&entries).unwrap();
    let names: Vec<&Vec<u8>> = at(&tree, "a").xattrs.keys().collect();
    assert_eq!(names, [b"user.kept"]);
    assert_eq!(tree.opaque, Vec::<Vec<u8>>::new());
}

#[test]
fn a_hard_links_own_attributes_say_nothing() {
    let entries = [
        file("a"),
        Entry {
            uid: 99,
            ..with_xattrs(hardlink("b", "a"), &[("user.x", "y")])
        },
    ];
    let tree = Tree::build(&entries).unwrap();
    assert_eq!(at(&tree, "a").uid, 1);
    assert!(at(&tree, "a").xattrs.is_empty());
}
