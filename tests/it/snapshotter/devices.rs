//! Lazy layers that containerd mounts, from their devices.

use socinbd::snapshotter::proto::types::Mount;

use super::{
    Snapshotter,
    image::{Container, Image, Pulled, layer_mounts},
    lazy::layers,
};
use crate::support::{
    noise,
    registry::Registry,
    tars::Layer,
    vm::{is_vm, run_tests},
    wait,
};

const OPTIONS: [&str; 4] = ["--unproven", "lazy", "--layer-mounts", "containerd"];

fn types(mounts: &[Mount]) -> Vec<&str> {
    mounts.iter().map(|mount| mount.r#type.as_str()).collect()
}

/// The devices among the mounts.
fn devices(mounts: &[Mount]) -> Vec<String> {
    let devices = mounts.iter().filter(|mount| mount.r#type == "ext4");
    devices.map(|mount| mount.source.clone()).collect()
}

#[test]
fn devices_are_handed_out_and_nothing_of_ours_is_mounted() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&OPTIONS);
    let client = snapshotter.client();
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy, Pulled::Lazy]);
    let first = Container::start(&snapshotter, "first", &top);
    let mounts = client.mounts("default/9/first").unwrap();
    // the first is the directory of the snapshot, the second the small tree that corrects the overlay
    assert_eq!(
        types(&mounts),
        ["bind", "bind", "ext4", "ext4", "ext4", "format/overlay"]
    );
    assert_eq!(layer_mounts(&snapshotter.host).len(), 0);
    assert_eq!(first.root.read("etc/tag"), "lower");
    assert!(!first.root.path().join("etc/removed").exists());
    let mode = |name: &str| {
        let metadata = std::fs::metadata(first.root.path().join(name)).unwrap();
        std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777
    };
    assert_eq!((mode("etc"), mode("srv")), (0o750, 0o711));
    first.root.write("etc/written", "written");
    // another container has the same devices
    let second = Container::start(&snapshotter, "second", &top);
    let again = client.mounts("default/9/second").unwrap();
    assert_eq!(devices(&again), devices(&mounts));
    // a view of one layer is its device
    let lowest = client.stat(&top).unwrap().parent;
    let lowest = client.stat(&lowest).unwrap().parent;
    let view = client.view("view", &lowest).unwrap();
    assert_eq!(types(&view), ["ext4"]);
    assert!(devices(&mounts).contains(&view[0].source));
    first.end();
    second.end();
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn the_device_of_a_snapshot_stays_when_the_daemon_is_killed_and_the_disk_becomes_complete() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&OPTIONS);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    let before = client.prepare("default/9/first", &top, &[]).unwrap();
    // nobody has the devices open but the daemon: their numbers must not become those of other devices
    snapshotter.host.kill_served_by_keeper();
    wait("the next daemon answers", || {
        super::client::Client::connect(&snapshotter.socket()).is_some()
    });
    let place = snapshotter.host.mountpoint("first");
    let root = super::client::Mounted::at(place, &before);
    assert_eq!(root.read("etc/tag"), "lower");
    let client = snapshotter.client();
    assert_eq!(
        devices(&client.mounts("default/9/first").unwrap()),
        devices(&before)
    );
    // killed under a container
    snapshotter.host.kill_served_by_keeper();
    let big = std::fs::read(root.path().join("data/big")).unwrap();
    assert!(big == noise(3_000_000));
    let client = snapshotter.client();
    for file in ["etc/tag", "etc/upper", "srv/x"] {
        root.read(file);
    }
    // where there is a device mapper, the disks move below their devices
    assert_eq!(
        devices(&client.mounts("default/9/first").unwrap()),
        devices(&before)
    );
    drop(root);
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn extracted_layers_and_devices_are_stacked_in_any_order() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let plain = Image::push(
        &registry,
        "plain",
        vec![Layer::new().file("etc/plain", b"plain")],
        false,
    );
    let snapshotter = Snapshotter::start(&OPTIONS);
    let client = snapshotter.client();
    let (_, top) = image.pull(&snapshotter, "default");
    // containerd extracts to an overlay over devices
    let target = plain.chain[0].to_string();
    let label = [(socinbd::snapshotter::labels::TARGET, target.as_str())];
    let mounts = client.prepare("default/5/x", &top, &label).unwrap();
    assert_eq!(types(&mounts).last(), Some(&"format/overlay"));
    plain.extract(&snapshotter, 0, &mounts);
    client
        .commit("default/5/extracted", "default/5/x", "", &label)
        .unwrap();
    let container = Container::start(&snapshotter, "container", "default/5/extracted");
    assert_eq!(container.root.read("etc/plain"), "plain");
    assert_eq!(container.root.read("etc/tag"), "lower");
    container.end();
    client.remove_all();
    snapshotter.end();
}

#[test]
fn more_layers_than_containerd_manages_are_mounted_by_the_daemon() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&OPTIONS);
    let client = snapshotter.client();
    let (_, mut top) = image.pull(&snapshotter, "default");
    for number in 0..254 {
        let (key, name) = (format!("k/{number}"), format!("c/{number}"));
        client.prepare(&key, "", &[]).unwrap();
        client.commit(&name, &key, &top, &[]).unwrap();
        top = name;
    }
    let mounts = client.prepare("k/container", &top, &[]).unwrap();
    assert_eq!(types(&mounts), ["overlay"]);
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    client.remove("k/container").unwrap();
    for number in (0..254).rev() {
        client.remove(&format!("c/{number}")).unwrap();
    }
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

/// The same, and mapped owners, with the kernel's nbd.
#[test]
fn layers_are_handed_out_on_the_kernels_nbd() {
    if !is_vm() {
        run_tests(&[
            "snapshotter::devices::",
            "snapshotter::idmapped::",
            "--skip",
            "on_the_kernels_nbd",
            "--test-threads",
            "1",
        ]);
    }
}
