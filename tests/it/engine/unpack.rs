//! Directories that a layer only implies have the attributes that containerd's unpack gives them: its snapshots are what is compared
//! with.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use socinbd::oci::Digest;

use super::{Host, containerd::Containerd};
use crate::{
    soci::make::MadeLayout,
    support::{tars::Layer, unmount},
};

/// What is seen at each path: mode with type, owner and group, and a directory's extended attributes.
type Seen = BTreeMap<PathBuf, (u32, u32, u32, String)>;

fn look(root: &Path) -> Seen {
    let mut seen = Seen::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let Ok(found) = fs::symlink_metadata(&path) else {
                continue; // overlayfs lists whiteouts of directories that only one layer has, and does not show them
            };
            if found.file_type().is_char_device() {
                continue;
            }
            let mut xattrs = String::new();
            if found.is_dir() {
                folders.push(path.clone());
                let listed = Command::new("getfattr")
                    .args(["--absolute-names", "-d", "-m", "^user"])
                    .arg(&path)
                    .output()
                    .expect("this test needs getfattr (attr)");
                let listed = String::from_utf8(listed.stdout).unwrap();
                xattrs = listed.lines().skip(1).collect();
            }
            let relative = path.strip_prefix(root).unwrap().to_owned();
            seen.insert(relative, (found.mode(), found.uid(), found.gid(), xattrs));
        }
    }
    seen
}

/// A host and a containerd, for one image after another.
struct Both {
    host: Host,
    containerd: Containerd,
}

impl Both {
    fn new() -> Self {
        Self {
            host: Host::new(),
            containerd: Containerd::start(),
        }
    }

    /// The image as containerd unpacks it, and as it is attached. `None`: containerd refuses it.
    fn look(&self, layers: Vec<Layer>) -> Option<(Seen, Seen)> {
        let mut layout = MadeLayout::new();
        let tars: Vec<_> = layers
            .into_iter()
            .map(|layer| ("application/vnd.oci.image.layer.v1.tar", layer.tar()))
            .collect();
        let image = layout.image(architecture(), &tars);
        layout.tag(&image, "latest");
        let packed = layout.packed("");
        let path = packed.path().to_str().unwrap();
        let mountpoint = self.host.mountpoint("unpacked");
        let mounted = mountpoint.to_str().unwrap();
        // a name of its own: what a name led to before is collected as garbage at any time
        let name = format!(
            "localhost/{}",
            &Digest::of(&fs::read(path).unwrap()).hex()[..12]
        );
        let import = ["images", "import", "--base-name", &name, path];
        let output = self.containerd.ctr(&import);
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            let refuses = ["not a directory", "too many links", "symbolic links"];
            assert!(refuses.iter().any(|why| error.contains(why)), "{error}");
            return None;
        }
        let image = format!("{name}:latest");
        let output = self.containerd.ctr(&["images", "mount", &image, mounted]);
        assert!(output.status.success(), "{output:?}");
        let unpacked = look(&mountpoint);
        unmount(&mountpoint);
        let unmount = self.containerd.ctr(&["snapshots", "rm", mounted]);
        assert!(unmount.status.success(), "{unmount:?}");

        let mountpoint = self.host.mountpoint("attached");
        self.host.attach(&layout.reference(""), &mountpoint, &[]);
        let attached = look(&mountpoint);
        self.host.detach(&mountpoint);
        Some((unpacked, attached))
    }

    /// The same of an image that containerd takes; both are equal.
    fn check(&self, layers: Vec<Layer>) -> Seen {
        let (unpacked, attached) = self.look(layers).expect("containerd takes it");
        assert_eq!(unpacked, attached);
        attached
    }
}

/// The architecture that containerd unpacks for.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

fn lock() -> Layer {
    Layer::new().file("lock/x", b"x")
}

fn run() -> Layer {
    Layer::new().directory("run", 0o755).directory_with_xattr(
        "run/lock",
        0o1777,
        ("user.kept", "yes"),
    )
}

#[test]
fn an_implied_directory_over_a_symlink_is_as_containerd_unpacks_it() {
    let both = Both::new();
    for text in [
        "run/lock",
        "/run/lock",
        "../../run/./lock",
        "/run/../run/lock/",
    ] {
        let seen = both.check(vec![run().symlink("lock", text), lock()]);
        let (mode, uid, gid, xattrs) = &seen[Path::new("lock")];
        assert_eq!((mode & 0o7777, *uid, *gid), (0o1777, 1000, 2000), "{text}");
        assert_eq!(xattrs, "user.kept=\"yes\"");
    }
    for (mode, below) in [
        // a chain, one link of which stands in a directory
        (
            0o1777,
            vec![
                run()
                    .symlink("lock", "a")
                    .symlink("a", "run/b")
                    .symlink("run/b", "lock"),
            ],
        ),
        // what it leads to is in another layer
        (0o755, vec![run(), Layer::new().symlink("lock", "run/lock")]),
        (
            0o711,
            vec![
                run().directory("lock", 0o711),
                Layer::new().symlink("lock", "run/lock"),
            ],
        ),
        // what it leads to is implied, and named below
        (
            0o1777,
            vec![
                run(),
                Layer::new()
                    .file("run/lock/y", b"y")
                    .symlink("lock", "run/lock"),
            ],
        ),
        // a file, nothing
        (
            0o755,
            vec![Layer::new().file("f", b"f").symlink("lock", "f")],
        ),
        (0o755, vec![Layer::new().symlink("lock", "nothing")]),
        // the link is removed; what it leads to is removed by a layer between, which the link's layer does not see
        (
            0o755,
            vec![
                run().symlink("lock", "run/lock"),
                Layer::new().whiteout("lock"),
            ],
        ),
        (
            0o1777,
            vec![
                run().symlink("lock", "run/lock"),
                Layer::new().whiteout("run/lock"),
            ],
        ),
        (
            0o1777,
            vec![
                run().symlink("lock", "run/lock"),
                Layer::new().opaque("run"),
            ],
        ),
    ] {
        let seen = both.check(below.into_iter().chain([lock()]).collect());
        assert_eq!(seen[Path::new("lock")].0 & 0o7777, mode, "{seen:?}");
    }
}

#[test]
fn links_on_the_way_to_an_implied_directory_are_as_containerd_follows_them() {
    let both = Both::new();
    let deep = || {
        Layer::new()
            .directory("b", 0o711)
            .directory("b/c", 0o700)
            .directory("z", 0o1777)
    };
    let c = || Layer::new().file("a/c/x", b"x");
    let seen = both.check(vec![deep().symlink("a", "b"), c()]);
    let modes = ["a", "a/c"].map(|path| seen[Path::new(path)].0 & 0o7777);
    assert_eq!(modes, [0o711, 0o700]);
    both.check(vec![
        deep().symlink("b/a", "../z").symlink("a", "/b/a"),
        c(),
    ]);
    both.check(vec![
        deep()
            .symlink("b/l", "../z")
            .symlink("a", "d")
            .symlink("d", "b"),
        Layer::new().file("a/l/x", b"x"),
    ]);
    // `..` behind a symlink, relative and absolute
    both.check(vec![
        deep().symlink("d", "b/c").symlink("lock", "d/../z"),
        lock(),
    ]);
    both.check(vec![
        deep().symlink("d", "b/c").symlink("lock", "/d/../z"),
        lock(),
    ]);
    // a link behind one that the same pass has put into the way: its text goes on from that way, and not from where it stands
    let behind = deep()
        .directory("b/q", 0o700)
        .directory("q", 0o1777)
        .symlink("d", "b")
        .symlink("b/x", "../z")
        .symlink("z/y", "../q")
        .symlink("lock", "d/x");
    let seen = both.check(vec![behind, Layer::new().file("lock/y/x", b"x")]);
    assert_eq!(seen[Path::new("lock/y")].0 & 0o7777, 0o700);
    // an opaque directory hides names, and not attributes
    both.check(vec![deep(), Layer::new().opaque("b").file("b/c/x", b"x")]);
    // as below an opaque root, which containerd's snapshots do not know
    let (opaque, c) = (Layer::new().opaque(""), Layer::new().file("b/c/x", b"x"));
    let (unpacked, attached) = both.look(vec![deep(), opaque, c]).unwrap();
    for path in ["b", "b/c"].map(Path::new) {
        assert_eq!(unpacked[path], attached[path]);
    }
}

#[test]
fn images_that_containerd_refuses_for_their_symlinks_are_attached() {
    let host = Host::new();
    let mountpoint = host.mountpoint("mnt");
    for below in [
        Layer::new().symlink("lock", "a").symlink("a", "lock"),
        Layer::new().symlink("lock", "lock/x"),
        Layer::new().symlink("lock", "f/x").file("f", b"f"),
        Layer::new().symlink("lock", &"d/".repeat(2000)),
    ] {
        let layout = MadeLayout::of(vec![below, lock()]);
        host.attach(&layout.reference(""), &mountpoint, &[]);
        assert_eq!(look(&mountpoint)[Path::new("lock")].0, 0o40755);
        host.detach(&mountpoint);
    }
}

/// One entry of a layer.
#[derive(Clone, Debug)]
enum Wish {
    File,
    Directory(u32),
    Symlink(&'static str),
    Whiteout,
    Opaque,
}

type Wishes = BTreeMap<String, Wish>;

fn wishes() -> impl Strategy<Value = Wishes> {
    // few names, so that entries meet
    let path = prop::collection::vec("[a-c]", 1..4).prop_map(|names| names.join("/"));
    let mode = prop::sample::select(vec![0o700, 0o711, 0o1777, 0o2750]);
    let text = prop::sample::select(vec![
        "a", "b", "c", "b/c", "/a", "/b", "/a/b", "..", "../c", "../../b", "./b/../a", "c/../b",
    ]);
    let wish = prop_oneof![
        4 => Just(Wish::File),
        4 => mode.prop_map(Wish::Directory),
        4 => text.prop_map(Wish::Symlink),
        1 => Just(Wish::Whiteout),
        1 => Just(Wish::Opaque),
    ];
    prop::collection::btree_map(path, wish, 1..8)
}

/// The layer of these entries, without those that stand below something of it that is no directory: what becomes of such depends on
/// their order.
fn layer(wishes: &Wishes) -> Layer {
    let is_directory = |path: &str| match wishes.get(path) {
        None | Some(Wish::Directory(_) | Wish::Opaque) => true,
        Some(_) => false,
    };
    let mut layer = Layer::new();
    for (path, wish) in wishes {
        let mut parents = path.match_indices('/').map(|(slash, _)| &path[..slash]);
        if !parents.all(is_directory) {
            continue;
        }
        layer = match wish {
            Wish::File => layer.file(path, b"file"),
            Wish::Directory(mode) => layer.directory(path, *mode),
            Wish::Symlink(text) => layer.symlink(path, text),
            Wish::Whiteout => layer.whiteout(path),
            Wish::Opaque => layer.opaque(path),
        };
    }
    layer
}

#[test]
fn random_images_are_as_containerd_unpacks_them() {
    let both = Both::new();
    let images = prop::collection::vec(wishes(), 2..5);
    let config = Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&images, |image| {
            if let Some((unpacked, attached)) = both.look(image.iter().map(layer).collect()) {
                prop_assert_eq!(unpacked, attached);
            }
            Ok(())
        })
        .unwrap();
}
