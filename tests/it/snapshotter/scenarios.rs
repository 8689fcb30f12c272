//! Scenarios of the suites that AWS's snapshotter is tested by (`pull_test.go`, `run_test.go`), asked over the snapshots API.

use std::{fs, os::unix::fs::MetadataExt as _, process::Command};

use socinbd::{oci::Digest, snapshotter::labels};

use super::{
    Snapshotter,
    image::{Container, Image, Pulled, layer_mounts},
};
use crate::{
    engine::hostile,
    soci::make::{gzip, tar_of},
    support::{noise, registry::Registry, tars::Layer, wait},
};

#[test]
fn a_sparse_index_has_some_layers_and_the_others_are_local() {
    let registry = Registry::start();
    let layers = vec![
        Layer::new().file("data/big", &noise(3_000_000)),
        Layer::new().file("data/small", b"small"),
    ];
    let image = Image::push_with_smallest_layer(&registry, "app", layers, 1_000_000);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    registry.reset_counters();
    let (pulled, top) = image.pull(&snapshotter, "default");
    // a small layer of an image with an index is streamed, which takes no longer
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("data/small"), "small");
    let fetched = registry.counters().blob(&image.blobs[0]).bytes;
    assert!(fetched < 1_000_000, "{fetched} bytes");
    let why = snapshotter.host.run(&["why", "container"]);
    assert_eq!(why.matches("lazy, with zTOC").count(), 1, "{why}");
    assert_eq!(why.matches("downloaded whole").count(), 1, "{why}");
    assert!(fs::read(container.root.path().join("data/big")).unwrap() == noise(3_000_000));
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn one_read_of_a_layer_with_one_span_fetches_all_of_it() {
    let registry = Registry::start();
    let layer = Layer::new()
        .file("first", &noise(300_000))
        .file("last", b"last");
    let longest = i64::MAX as u64;
    let image = Image::push_with_span_size(&registry, "app", vec![layer], longest);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy]);
    let container = Container::start(&snapshotter, "container", &top);
    let spans = || {
        let why = snapshotter.host.run(&["--json", "why", "container"]);
        let why: serde_json::Value = serde_json::from_str(&why).unwrap();
        why[0][1]["layer"]["mounted"]["spans"].clone()
    };
    assert_eq!(spans(), serde_json::json!([0, 1]));
    assert_eq!(container.root.read("last"), "last");
    assert_eq!(spans(), serde_json::json!([1, 1]));
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn a_wrong_index_digest_is_no_index() {
    let registry = Registry::start();
    let layers = vec![Layer::new().file("a", b"a"), Layer::new().file("b", b"b")];
    let mut image = Image::push(&registry, "app", layers, true);
    image.index = Some(Digest::of(b"absent"));
    image.names_index = true;
    let snapshotter = Snapshotter::start(&[]);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Extracted, Pulled::Extracted]);
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(
        (&*container.root.read("a"), &*container.root.read("b")),
        ("a", "b")
    );
    assert_eq!(layer_mounts(&snapshotter.host).len(), 0);
    let digest = image
        .labels(0)
        .into_iter()
        .find(|(name, _)| name == labels::INDEX);
    let why = snapshotter.host.run(&["why", "container"]);
    assert!(why.contains(&digest.unwrap().1), "{why}");
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn a_ztoc_that_is_none_gives_the_right_content() {
    let tag = hostile::text("tag", 100_000);
    let tar = tar_of(&[("etc/tag", &tag)]);
    let made = hostile::layout(&tar, b"no zTOC");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let listed = fs::read(made.path().join("index.json")).unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    let reference = registry.reference("app:latest");
    let image = Image::of(&made, &listed["manifests"][0], reference, vec![tar.clone()]);
    assert_eq!(image.blobs[0], Digest::of(&gzip(&tar)));
    let snapshotter = Snapshotter::start(&[]);
    let (_, top) = image.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "container", &top);
    assert!(container.root.read("etc/tag").as_bytes() == tag);
    let why = snapshotter.host.run(&["why", "container"]);
    assert!(!why.contains("lazy, with zTOC"), "{why}");
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn images_share_layers_and_any_user_can_list_the_root() {
    let registry = Registry::start();
    let base = || Layer::new().file("base", &noise(300_000));
    let one = vec![base(), Layer::new().file("one", b"one")];
    let two = vec![base(), Layer::new().file("two", b"two")];
    let one = Image::push(&registry, "one", one, true);
    let two = Image::push(&registry, "two", two, true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top_of_one) = one.pull(&snapshotter, "default");
    let (pulled, top_of_two) = two.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let first = Container::start(&snapshotter, "first", &top_of_one);
    let second = Container::start(&snapshotter, "second", &top_of_two);
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    first.root.write("written", "first");
    assert_eq!(second.root.read("two"), "two");
    assert!(!second.root.path().join("written").exists());
    for container in [&first, &second] {
        let mode = fs::metadata(container.root.path()).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }
    // one of them is made again
    first.end();
    let first = Container::start(&snapshotter, "first", &top_of_one);
    assert!(!first.root.path().join("written").exists());
    assert_eq!(first.root.read("one"), "one");
    first.end();
    second.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn containers_start_again_after_a_restart_in_order() {
    let registry = Registry::start();
    let image = Image::push(
        &registry,
        "app",
        vec![Layer::new().file("a", b"a"), Layer::new().file("b", b"b")],
        true,
    );
    let mut snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "first", &top);
    container.end();
    let daemon = snapshotter.host.daemon().unwrap().to_string();
    Command::new("kill")
        .args(["-INT", &daemon])
        .status()
        .unwrap();
    wait("the keeper is gone", || snapshotter.host.keeper().is_none());
    snapshotter.start_again();
    let container = Container::start(&snapshotter, "second", &top);
    assert_eq!(
        (&*container.root.read("a"), &*container.root.read("b")),
        ("a", "b")
    );
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}
