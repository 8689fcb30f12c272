//! Containers in user namespaces: the owners of lazy layers are mapped.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::Path,
};

use socinbd::snapshotter::labels::{GID_MAPPING, TARGET, UID_MAPPING};
use tonic::Code;

use super::{
    Snapshotter,
    client::Mounted,
    image::{Image, layer_mounts},
    lazy::layers,
};
use crate::support::{registry::Registry, tars::Layer, wait};

const MAPS: [(&str, &str); 2] = [
    (UID_MAPPING, "0:100000:65536"),
    (GID_MAPPING, "0:200000:65536"),
];

/// The owner of all files of the layers of tests, and of what they only imply.
const OWNER: (u32, u32) = (1000, 2000);
const ROOT: (u32, u32) = (0, 0);

/// The same in the user namespace, on the host.
fn mapped((user, group): (u32, u32)) -> (u32, u32) {
    (100_000 + user, 200_000 + group)
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn idmapped_layers_show_the_owners_of_the_container() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    let mounts = client.prepare("default/9/mapped", &top, &MAPS).unwrap();
    let container = Mounted::at(snapshotter.host.mountpoint("mapped"), &mounts);
    let plain = client.prepare("default/9/plain", &top, &[]).unwrap();
    let plain = Mounted::at(snapshotter.host.mountpoint("plain"), &plain);
    // files, directories of one layer and of several, and the root, which is a directory of this container
    for (name, expected) in [
        ("", ROOT),
        ("etc", OWNER),
        ("etc/tag", OWNER),
        ("etc/upper", OWNER),
        ("data", ROOT),
        ("srv", OWNER),
        ("srv/x", OWNER),
    ] {
        assert_eq!(owner(&plain.path().join(name)), expected, "{name}");
        let found = owner(&container.path().join(name));
        assert_eq!(found, mapped(expected), "{name}");
    }
    assert_eq!(container.read("etc/tag"), "lower");
    // a copy keeps the owner
    let tag = container.path().join("etc/tag");
    fs::set_permissions(&tag, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(owner(&tag), mapped(OWNER));
    // the same mounts after the death of the daemon
    snapshotter.host.kill_served_by_keeper();
    wait("the next daemon answers", || {
        super::client::Client::connect(&snapshotter.socket()).is_some()
    });
    let client = snapshotter.client();
    let before = layer_mounts(&snapshotter.host).len();
    assert_eq!(client.mounts("default/9/mapped").unwrap(), mounts);
    assert_eq!(layer_mounts(&snapshotter.host).len(), before);
    assert_eq!(owner(&container.path().join("srv/x")), mapped(OWNER));
    drop(container);
    client.remove("default/9/mapped").unwrap();
    // those of the layers stay
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    drop(plain);
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn idmapped_directories_of_extracted_layers_too() {
    let registry = Registry::start();
    let other = Layer::new().file("etc/tag", b"tag");
    let image = Image::push(&registry, "app", vec![other], false);
    let snapshotter = Snapshotter::start(&[]);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    let mounts = client.prepare("default/9/mapped", &top, &MAPS).unwrap();
    {
        let container = Mounted::at(snapshotter.host.mountpoint("mapped"), &mounts);
        assert_eq!(owner(&container.path().join("etc/tag")), mapped(OWNER));
    }
    client.remove_all();
    assert_eq!(layer_mounts(&snapshotter.host).len(), 0);
    snapshotter.end();
}

#[test]
fn idmapped_only_where_containerd_has_not_changed_the_owners() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    // as containerd does without the capability: a copy with other owners, then a container with the labels on it
    let copy = client.prepare("default/8/x-remap", &top, &[]).unwrap();
    {
        let copy = Mounted::at(snapshotter.host.mountpoint("copy"), &copy);
        for name in ["etc/tag", ""] {
            chown(copy.path().join(name), Some(100_000), Some(200_000)).unwrap();
        }
    }
    client
        .commit("default/8/x", "default/8/x-remap", "", &[])
        .unwrap();
    let mounts = client
        .prepare("default/9/copied", "default/8/x", &MAPS)
        .unwrap();
    {
        let copied = Mounted::at(snapshotter.host.mountpoint("copied"), &mounts);
        for name in ["", "etc/tag"] {
            let found = owner(&copied.path().join(name));
            assert_eq!(found, (100_000, 200_000), "{name}");
        }
        assert_eq!(owner(&copied.path().join("etc/upper")), OWNER);
    }
    client.remove_all();
    snapshotter.end();
}

#[test]
fn idmapped_snapshots_with_hostile_maps_are_refused_and_extractions_ignore_maps() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    for (number, map) in ["", "x", "1:1:1", "0:0:0", "0:4294967295:2", "0:0:1,,"]
        .into_iter()
        .enumerate()
    {
        let key = format!("default/9/{number}");
        let labels = [(UID_MAPPING, map), (GID_MAPPING, "0:0:1")];
        let answer = client.prepare(&key, &top, &labels);
        if map.is_empty() {
            // a label without a value is none
            answer.unwrap();
            continue;
        }
        let (code, message) = answer.unwrap_err();
        assert_eq!(code, Code::InvalidArgument, "{map}: {message}");
        assert!(message.contains("user map"), "{message}");
        // and nothing is left of it
        assert_eq!(client.stat(&key).unwrap_err().0, Code::NotFound);
    }
    let unknown = socinbd::oci::Digest::of(b"unknown").to_string();
    let labels = [(TARGET, unknown.as_str()), MAPS[0], MAPS[1]];
    let mounts = client.prepare("default/7/x", &top, &labels).unwrap();
    {
        let extraction = Mounted::at(snapshotter.host.mountpoint("extraction"), &mounts);
        assert_eq!(owner(&extraction.path().join("etc/tag")), OWNER);
        assert_eq!(owner(extraction.path()), ROOT);
    }
    client.remove_all();
    snapshotter.end();
}

#[test]
fn idmapped_devices_are_mapped_by_containerd() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--layer-mounts", "containerd"]);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    let mounts = client.prepare("default/9/mapped", &top, &MAPS).unwrap();
    let overlay = mounts.last().unwrap();
    for option in ["uidmap=0:100000:65536", "gidmap=0:200000:65536"] {
        assert!(overlay.options.iter().any(|it| it == option), "{overlay:?}");
    }
    assert_eq!(layer_mounts(&snapshotter.host).len(), 0);
    client.remove_all();
    snapshotter.end();
}
