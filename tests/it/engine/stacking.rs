//! The whole image's root is right, not only each layer: what umoci unpacks is what is seen on the mount.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    process::Command,
};

use super::Host;
use crate::{
    soci::make::MadeLayout,
    support::{
        compare::{Options, assert_same},
        tars::Layer,
    },
};

/// Attaches an image of these layers, the lowest first, once streamed and once lazily, and holds it against umoci's unpack of it.
fn check(layers: Vec<Layer>, look: impl Fn(&Path)) {
    let host = Host::new();
    let layout = MadeLayout::of(layers);
    let bundle = host.mountpoint("bundles").join("bundle");
    let unpacked = Command::new("umoci")
        .args(["--log=error", "unpack", "--image"])
        .arg(format!("{}:latest", layout.path().display()))
        .arg(&bundle)
        .status()
        .expect("this test needs umoci");
    assert!(unpacked.success());
    // umoci drops parts of a second, and leaves the times of implied directories to the clock
    let options = Options {
        nanoseconds: false,
        directory_times: false,
        ..Options::default()
    };
    let mountpoint = host.mountpoint("mnt");
    for lazily in [false, true] {
        if lazily {
            host.run(&[
                "index",
                "create",
                &layout.reference(""),
                "--min-layer-size",
                "0",
            ]);
            fs::remove_dir_all(host.root().join("layers/sha256")).unwrap();
        }
        let attachment = host.attach(&layout.reference(""), &mountpoint, &[]);
        assert_eq!(attachment["index"].is_object(), lazily, "{attachment}");
        assert_same(&bundle.join("rootfs"), &mountpoint, &options);
        look(&mountpoint);
        host.detach(&mountpoint);
        assert_eq!(host.left_over(), [""; 0]);
        host.end_daemon();
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_layer_that_occurs_twice_is_stacked_once() {
    let twice = || Layer::new().directory("a", 0o755).file("a/f", b"twice");
    let between = Layer::new().whiteout("a").file("b", b"between");
    check(vec![twice(), between, twice()], |root| {
        assert_eq!(fs::read(root.join("a/f")).unwrap(), b"twice");
    });
}

#[test]
fn an_opaque_root_hides_every_layer_below() {
    let layers = vec![
        Layer::new().file("old", b"old").directory("d", 0o700),
        Layer::new().opaque("").file("new", b"new"),
        Layer::new().file("newer", b"newer"),
    ];
    check(layers, |root| {
        assert!(!root.join("old").exists() && !root.join("d").exists());
        assert!(root.join("new").exists() && root.join("newer").exists());
    });
}

#[test]
fn implied_parents_leave_the_lower_ones_attributes_alone() {
    let layers = vec![
        Layer::new()
            .directory("tmp", 0o1777)
            .directory("a", 0o711)
            .directory("a/b", 0o2750),
        Layer::new().file("tmp/x", b"x"),
        Layer::new().file("a/b/c", b"c").file("new/y", b"y"),
        Layer::new().file("a/b/d", b"d"),
    ];
    check(layers, |root| {
        assert_eq!(
            [
                mode(&root.join("tmp")),
                mode(&root.join("a")),
                mode(&root.join("a/b"))
            ],
            [0o1777, 0o711, 0o2750]
        );
        assert_eq!(mode(&root.join("new")), 0o755);
        assert_eq!(
            fs::metadata(root.join("a/b")).unwrap().mtime(),
            1_600_000_000
        );
    });
}

#[test]
fn whiteouts_over_nothing_are_not_seen() {
    let layers = vec![
        Layer::new()
            .directory("a", 0o755)
            .file("a/keep", b"1")
            .whiteout("a/gone")
            .whiteout("nothing"),
        Layer::new()
            .directory("b", 0o755)
            .whiteout("b/gone")
            .file("b/keep", b"2"),
    ];
    check(layers, |root| {
        for folder in [root.to_owned(), root.join("a"), root.join("b")] {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                assert!(
                    !entry.file_type().unwrap().is_char_device(),
                    "{:?}",
                    entry.path()
                );
            }
        }
        assert!(fs::symlink_metadata(root.join("a/gone")).is_err());
    });
}

#[test]
fn whiteouts_in_an_opaque_directory_are_not_seen() {
    let layers = vec![
        Layer::new()
            .directory("a", 0o755)
            .file("a/old", b"1")
            .file("a/older", b"1"),
        Layer::new()
            .directory("a", 0o700)
            .opaque("a")
            .whiteout("a/old")
            .file("a/new", b"2"),
    ];
    check(layers, |root| {
        let names: Vec<_> = fs::read_dir(root.join("a"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["new"]);
    });
}

#[test]
fn an_image_of_one_layer_is_attached() {
    check(
        vec![
            Layer::new()
                .directory("a", 0o700)
                .file("a/f", b"one")
                .symlink("l", "a/f")
                .hardlink("h", "a/f"),
        ],
        |root| {
            assert_eq!(fs::read(root.join("l")).unwrap(), b"one");
        },
    );
}

#[test]
fn files_and_directories_take_each_others_place() {
    let layers = vec![
        Layer::new()
            .directory("d", 0o755)
            .file("d/x", b"x")
            .file("f", b"f")
            .symlink("l", "d"),
        Layer::new()
            .whiteout("d")
            .file("d", b"now a file")
            .whiteout("f")
            .directory("f", 0o700)
            .file("f/y", b"y")
            .whiteout("l"),
        Layer::new().directory("l", 0o750).file("l/z", b"z"),
    ];
    check(layers, |root| {
        assert_eq!(fs::read(root.join("d")).unwrap(), b"now a file");
        assert_eq!(fs::read(root.join("l/z")).unwrap(), b"z");
    });
}

#[test]
fn a_hundred_and_twenty_seven_layers_are_stacked() {
    let layer = |number: usize| {
        let layer = Layer::new().file(&format!("dir/file-{number}"), number.to_string().as_bytes());
        let layer = layer.file("top", number.to_string().as_bytes());
        if number > 0 && number.is_multiple_of(5) {
            layer.whiteout(&format!("dir/file-{}", number - 1))
        } else {
            layer
        }
    };
    check((0..127).map(layer).collect(), |root| {
        assert_eq!(fs::read(root.join("top")).unwrap(), b"126");
        assert!(root.join("dir/file-0").exists() && !root.join("dir/file-4").exists());
    });
}
