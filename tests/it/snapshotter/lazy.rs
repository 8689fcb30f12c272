//! Images that start lazily.

use std::{
    fs::File,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use socinbd::{oci::Digest, snapshotter::labels};
use tonic::Code;

use super::{
    Snapshotter,
    image::{Container, Image, Pulled, layer_mounts},
};
use crate::{
    engine::hostile,
    soci::make::{gzip, tar_of},
    support::{
        noise,
        registry::{Fault, Kind, On, Registry, Times},
        succeeds,
        tars::Layer,
        vm::{is_vm, run_tests},
        wait,
        ztocs::with_entries,
    },
};

pub fn layers() -> Vec<Layer> {
    vec![
        Layer::new()
            .directory("etc", 0o750)
            .file("etc/tag", b"lower")
            .file("etc/removed", b"lower")
            .file("data/big", &noise(3_000_000)),
        Layer::new()
            .file("etc/upper", b"upper")
            .whiteout("etc/removed"),
        Layer::new()
            .directory("srv", 0o711)
            .file("srv/x", b"x")
            .whiteout("srv/never"),
    ]
}

#[test]
fn an_indexed_image_starts_before_its_layers_are_fetched_and_leaves_nothing() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    registry.reset_counters();
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy, Pulled::Lazy]);
    // devices are made when a container needs them
    assert_eq!(layer_mounts(&snapshotter.host).len(), 0);
    let first = Container::start(&snapshotter, "first", &top);
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    assert_eq!(first.root.read("etc/tag"), "lower");
    assert_eq!(first.root.read("etc/upper"), "upper");
    // a whiteout of a directory that one layer has is not seen
    let names = |folder: &str| {
        let list = std::fs::read_dir(first.root.path().join(folder)).unwrap();
        let mut names: Vec<_> = list
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("etc"), ["tag", "upper"]);
    assert_eq!(names("srv"), ["x"]);
    // a directory that the upper layer only implies has the attributes of the lower one
    let mode = |name: &str| {
        let metadata = std::fs::metadata(first.root.path().join(name)).unwrap();
        std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777
    };
    assert_eq!((mode("etc"), mode("srv")), (0o750, 0o711));
    first.root.write("etc/written", "written");
    let fetched = registry.counters().blob(&image.blobs[0]).bytes;
    assert!(fetched < 1_000_000, "{fetched} bytes");
    // a second container shares the layers, and not what was written
    let second = Container::start(&snapshotter, "second", &top);
    assert!(!second.root.path().join("etc/written").exists());
    let big = std::fs::read(second.root.path().join("data/big")).unwrap();
    assert!(big == noise(3_000_000));
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    // another namespace has the same snapshots
    let count = snapshotter.client().names(&[]).len();
    let (pulled, other) = image.pull(&snapshotter, "other");
    assert_eq!(
        (&pulled[..], &other),
        (&[Pulled::Lazy, Pulled::Lazy, Pulled::Lazy][..], &top)
    );
    assert_eq!(snapshotter.client().names(&[]).len(), count);
    first.end();
    second.end();
    snapshotter.client().remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn an_image_without_an_index_is_pulled_by_containerd() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), false);
    let snapshotter = Snapshotter::start(&[]);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(
        pulled,
        [Pulled::Extracted, Pulled::Extracted, Pulled::Extracted]
    );
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/upper"), "upper");
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_serves_its_layers() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    let first = Container::start(&snapshotter, "first", &top);
    snapshotter.host.kill_served_by_keeper();
    // the keeper starts the next daemon, and both the socket and the layers wait for it
    assert_eq!(first.root.read("etc/tag"), "lower");
    let second = Container::start(&snapshotter, "second", &top);
    assert_eq!(layer_mounts(&snapshotter.host).len(), 3);
    let big = std::fs::read(first.root.path().join("data/big")).unwrap();
    assert!(big == noise(3_000_000));
    first.end();
    second.end();
    snapshotter.client().remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

/// A mount of FUSE whose server never answers: who looks at its root waits until this is dropped.
struct HangingMount {
    path: PathBuf,
    _server: File,
}

impl HangingMount {
    fn at(path: PathBuf) -> Self {
        use std::os::fd::AsRawFd as _;
        let server = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        // mount(8) passes it to the kernel
        rustix::io::fcntl_setfd(&server, rustix::io::FdFlags::empty()).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", &options, "hanging"]);
        succeeds(mount.arg(&path));
        rustix::io::fcntl_setfd(&server, rustix::io::FdFlags::CLOEXEC).unwrap();
        Self {
            path,
            _server: server,
        }
    }
}

impl Drop for HangingMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

#[test]
fn records_answer_while_the_devices_of_a_killed_daemon_are_taken_over() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    let first = Container::start(&snapshotter, "first", &top);
    let names = snapshotter.client().names(&[]);
    // the next daemon looks at this path when it takes the layer over
    let hanging = HangingMount::at(layer_mounts(&snapshotter.host).remove(0));
    snapshotter.host.kill_served_by_keeper();
    let client = snapshotter.client();
    assert_eq!(client.names(&[]), names);
    assert_eq!(client.stat(&top).unwrap().name, top);
    std::thread::scope(|scope| {
        let prepared = scope.spawn(|| snapshotter.client().prepare("default/9/second", &top, &[]));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!prepared.is_finished());
        assert_eq!(client.names(&[]), names);
        drop(hanging);
        prepared.join().unwrap().unwrap();
    });
    assert_eq!(first.root.read("etc/tag"), "lower");
    first.end();
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

/// Labels of the first layer, changed.
fn changed(image: &Image, name: &str, value: &str) -> Vec<(String, String)> {
    let mut labels = image.labels(0);
    labels.retain(|(label, _)| label != name);
    labels.push((name.to_owned(), value.to_owned()));
    labels
}

fn borrowed(labels: &[(String, String)]) -> Vec<(&str, &str)> {
    let labels = labels.iter();
    labels
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}

#[test]
fn hostile_labels_get_ordinary_mounts_and_reach_no_other_host() {
    let (registry, internal) = (Registry::start(), Registry::start());
    let image = Image::push(&registry, "app", layers(), true);
    let other = Image::push(&registry, "other", vec![Layer::new().file("x", b"x")], true);
    let snapshotter = Snapshotter::start(&[]);
    let client = snapshotter.client();
    let index = image.index.unwrap().to_string();
    for (number, (name, value)) in [
        // of another layer, image, position
        (labels::LAYER, image.blobs[1].to_string()),
        (labels::LAYER, other.blobs[0].to_string()),
        (labels::MANIFEST, other.manifest.to_string()),
        (labels::MANIFEST, image.blobs[0].to_string()),
        (labels::TARGET, image.chain[1].to_string()),
        (labels::TARGET, other.chain[0].to_string()),
        (labels::INDEX, image.manifest.to_string()),
        (labels::IMAGE, "oci:/etc".to_owned()),
        (labels::IMAGE, registry.reference("absent:1")),
        // what is no reference, digest, or chain
        (labels::IMAGE, "registry.example/app:1\nx".to_owned()),
        (labels::LAYER, "x".to_owned()),
        (labels::TARGET, "../../x".to_owned()),
        // no registry answers there
        (labels::IMAGE, "127.0.0.1:1/app:1".to_owned()),
    ]
    .into_iter()
    .enumerate()
    {
        let labels = changed(&image, name, &value);
        let mounts = client.prepare(&format!("k/{number}/x"), "", &borrowed(&labels));
        let mounts = mounts.unwrap_or_else(|error| panic!("{name} {value}: {error:?}"));
        assert_eq!(mounts[0].options[0], "rw", "{name} {value}");
    }
    // another parent than the image has below
    let key = "k/98/x";
    client
        .prepare(key, "", &[(labels::TARGET, &other.chain[0].to_string())])
        .unwrap();
    let target = other.chain[0].to_string();
    client
        .commit("k/98/parent", key, "", &[(labels::TARGET, &target)])
        .unwrap();
    let second = image.labels(1);
    let mounts = client
        .prepare("k/99/x", "k/98/parent", &borrowed(&second))
        .unwrap();
    assert_eq!(mounts[0].r#type, "overlay");
    assert_eq!(internal.counters().total().requests, 0);
    // id maps of an extraction have no effect, and the index that the labels name is used
    let mut labels = changed(&image, labels::INDEX, &index);
    labels.push((
        "containerd.io/snapshot/uidmapping".to_owned(),
        "0:100000:65536".to_owned(),
    ));
    let answer = client.prepare("k/100/x", "", &borrowed(&labels));
    assert_eq!(answer.unwrap_err().0, Code::AlreadyExists);
    client.remove_all();
}

#[test]
fn two_claims_on_one_chain_id_are_not_mixed() {
    let registry = Registry::start();
    let honest = Image::push(&registry, "honest", layers(), true);
    let evil = || {
        vec![
            Layer::new()
                .file("etc/tag", b"evil")
                .file("data/big", &noise(500_000)),
            Layer::new().file("etc/upper", b"evil"),
            Layer::new().file("srv/x", b"evil"),
        ]
    };
    let liar = Image::push_liar(&registry, "liar", &honest, evil());
    assert_eq!(liar.chain, honest.chain);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (pulled, top) = liar.pull(&snapshotter, "evil");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy, Pulled::Lazy]);
    let container = Container::start(&snapshotter, "evil", &top);
    assert_eq!(container.root.read("etc/tag"), "evil");
    // in another namespace the honest image is asked for: containerd extracts, and compares
    let (pulled, top) = honest.pull(&snapshotter, "good");
    assert_eq!(pulled[0], Pulled::Extracted);
    let good = Container::start(&snapshotter, "good", &top);
    assert_eq!(
        (good.root.read("etc/tag"), good.root.read("srv/x")),
        ("lower".into(), "x".into())
    );
    let log = snapshotter.host.log();
    let line = log
        .lines()
        .find(|line| line.contains("one chain ID"))
        .expect(&log);
    assert!(
        line.contains("liar:liar") && line.contains("honest:1"),
        "{line}"
    );
    assert_eq!(metric(&snapshotter, "socinbd_conflicting_claims_total"), 1);
    let extracted = "socinbd_layers_extracted_total{reason=\"conflict\"}";
    assert_eq!(metric(&snapshotter, extracted), 1);
    // the first is compared, and the log names both again
    wait("the lie is found", || {
        snapshotter.host.log().contains("states a false diff ID")
    });
    let log = snapshotter.host.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("states a false diff ID"));
    let told: Vec<&str> = lines
        .filter(|line| line.contains("liar:liar") && line.contains("honest:1"))
        .collect();
    assert_eq!(told.len(), 1, "{log}");
    assert_eq!(metric(&snapshotter, "socinbd_false_diff_ids_total"), 1);
    container.end();
    good.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

/// The value of a metric without a label.
fn metric(snapshotter: &Snapshotter, name: &str) -> u64 {
    let socket = snapshotter.host.run_dir().join("socinbd.sock");
    let output = std::process::Command::new("curl")
        .args(["-sSf", "http://localhost/metrics", "--unix-socket"])
        .arg(socket)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.expect(&text).parse::<f64>().unwrap() as u64
}

#[test]
fn a_lie_in_one_namespace_is_told_with_both_images_and_gets_eio() {
    let registry = Registry::start();
    let lower = || {
        Layer::new()
            .file("etc/tag", b"lower")
            .file("data/big", &noise(500_000))
    };
    let base = Image::push(&registry, "base", vec![lower()], true);
    let upper = Layer::new().file("etc/upper", b"upper");
    let honest = Image::push(&registry, "honest", vec![lower(), upper], true);
    let evil = Layer::new()
        .file("etc/tag", b"evil!")
        .file("data/big", &noise(2_000_000));
    let liar = Image::push_liar(&registry, "liar", &base, vec![evil]);
    assert_eq!(liar.chain[0], honest.chain[0]);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    let (_, parent) = liar.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "evil", &parent);
    assert_eq!(container.root.read("etc/tag"), "evil!");
    // containerd has the chain ID, and asks for the layers on it only
    let (how, _) = honest.pull_layer(&snapshotter, &client, "default", 1, &parent);
    assert_eq!(how, Pulled::Lazy);
    let names_both = |text: &str| {
        let log = snapshotter.host.log();
        let mut lines = log.lines().filter(|line| line.contains(text));
        lines.any(|line| line.contains("liar:liar") && line.contains("honest:1"))
    };
    assert!(
        names_both("name one chain ID"),
        "{}",
        snapshotter.host.log()
    );
    // the layer is compared, although nobody has read it all
    wait("the lie is found", || names_both("states a false diff ID"));
    let read = std::fs::read(container.root.path().join("data/big"));
    assert_eq!(read.unwrap_err().raw_os_error(), Some(5));
    for (name, expected) in [
        ("socinbd_false_diff_ids_total", 1),
        ("socinbd_conflicting_claims_total", 1),
        ("socinbd_layers_degraded", 1),
    ] {
        assert_eq!(metric(&snapshotter, name), expected, "{name}");
    }
    container.end();
    client.remove_all();
    snapshotter.end();
}

#[test]
fn a_lie_about_a_diff_id_is_found_soon_and_is_not_served() {
    let registry = Registry::start();
    let honest = Image::push(
        &registry,
        "honest",
        vec![Layer::new().file("tag", b"honest")],
        true,
    );
    let evil = vec![
        Layer::new()
            .file("tag", b"evil")
            .file("big", &noise(300_000)),
    ];
    let liar = Image::push_liar(&registry, "liar", &honest, evil);
    let snapshotter = Snapshotter::start(&[]);
    let (pulled, top) = liar.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy]);
    wait("the lie is found", || {
        snapshotter.host.log().contains("diff ID")
    });
    // a container that starts now is refused, or reads nothing
    let client = snapshotter.client();
    let refused = client.prepare("default/7/container", &top, &[]);
    let (_, message) = refused.unwrap_err();
    assert!(
        message.contains("false") || message.contains("diff ID"),
        "{message}"
    );
    client.remove_all();
    snapshotter.end();
}

#[test]
fn what_is_proven_answers_for_every_image_and_without_labels() {
    let registry = Registry::start();
    let image = Image::push(
        &registry,
        "app",
        vec![Layer::new().file("a", &noise(300_000))],
        true,
    );
    let snapshotter = Snapshotter::start(&[]);
    let client = snapshotter.client();
    let target = image.chain[0].to_string();
    let only_target = [(labels::TARGET, target.as_str())];
    image.pull(&snapshotter, "default");
    let mut asked = 0;
    wait("the layer is compared", || {
        asked += 1;
        let key = format!("other/{asked}/x");
        match client.prepare(&key, "", &only_target) {
            Err((Code::AlreadyExists, _)) => true,
            extracted => {
                extracted.unwrap();
                client.remove(&key).unwrap();
                false
            }
        }
    });
    // one that is not known is extracted
    let unknown = Digest::of(b"unknown").to_string();
    assert!(
        client
            .prepare("other/2/x", "", &[(labels::TARGET, &unknown)])
            .is_ok()
    );
    client.remove_all();
    snapshotter.end();
}

#[test]
fn a_rebased_layer_is_staged_and_gets_its_parent_when_it_is_committed() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let other = |name: &str| Layer::new().file(name, name.as_bytes());
    let plain = vec![other("a"), other("b"), other("c")];
    let plain = Image::push(&registry, "plain", plain, false);
    let snapshotter = Snapshotter::start(&[]);
    let client = snapshotter.client();
    for (number, image) in [&image, &plain].into_iter().enumerate() {
        let key = |layer: usize| format!("n{number}/{layer}/extract");
        // all are prepared without a parent before one is committed
        let mut names = Vec::new();
        for layer in [1, 2] {
            let labels = image.labels(layer);
            let mounts = client.prepare(&key(layer), "", &borrowed(&labels)).unwrap();
            match image.index {
                Some(_) => assert_eq!(mounts[0].options, ["ro", "rbind"]),
                // containerd writes whiteouts for an overlay only
                None => assert_eq!(mounts[0].r#type, "overlay"),
            }
        }
        let (_, mut parent) = image.pull_layer(&snapshotter, &client, &format!("n{number}"), 0, "");
        names.push(parent.clone());
        if image.index.is_none() {
            continue;
        }
        for layer in [1, 2] {
            let name = format!("n{number}/{layer}/{}", image.chain[layer]);
            let labels = image.labels(layer);
            client
                .commit(&name, &key(layer), &parent, &borrowed(&labels))
                .unwrap();
            assert_eq!(client.stat(&name).unwrap().parent, parent);
            parent = name;
        }
        let container = Container::start(&snapshotter, "container", &parent);
        assert_eq!(container.root.read("etc/upper"), "upper");
        assert_eq!(container.root.read("srv/x"), "x");
        container.end();
    }
    client.remove_all();
    snapshotter.end();
}

#[test]
fn lazy_and_extracted_layers_are_stacked_in_any_order() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    let without_labels = |layer: usize| {
        let target = image.chain[layer].to_string();
        vec![(labels::TARGET.to_owned(), target)]
    };
    for (number, extracted) in [[true, false, true], [false, true, false]]
        .into_iter()
        .enumerate()
    {
        let namespace = format!("n{number}");
        let mut parent = String::new();
        for (layer, is_extracted) in extracted.into_iter().enumerate() {
            if is_extracted {
                let labels = without_labels(layer);
                let key = format!("{namespace}/{layer}/x");
                let mounts = client.prepare(&key, &parent, &borrowed(&labels)).unwrap();
                image.extract(&snapshotter, layer, &mounts);
                parent = format!("{namespace}/{layer}/name");
                client
                    .commit(&parent, &key, "", &borrowed(&labels))
                    .unwrap();
            } else {
                let (how, name) =
                    image.pull_layer(&snapshotter, &client, &namespace, layer, &parent);
                assert_eq!(how, Pulled::Lazy);
                parent = name;
            }
        }
        let container = Container::start(&snapshotter, "container", &parent);
        let read = ["etc/tag", "etc/upper", "srv/x"].map(|name| container.root.read(name));
        assert_eq!(read, ["lower", "upper", "x"]);
        container.end();
        client.remove_all();
    }
    snapshotter.end();
}

#[test]
fn a_registry_that_hangs_holds_up_containerd_for_two_seconds_an_image() {
    // at its manifest, at the search for its index, and at its tables
    for (number, hanging) in [Kind::Manifest, Kind::Referrers, Kind::Blob]
        .into_iter()
        .enumerate()
    {
        let registry = Registry::start();
        let mut many = layers();
        many.extend((0..5).map(|number| Layer::new().file(&format!("layer{number}"), b"")));
        let image = Image::push(&registry, "app", many, true);
        registry.fail(On::Kind(hanging), Fault::Hang, Times::UntilHealed);
        let snapshotter = Snapshotter::start(&[]);
        let start = Instant::now();
        let (pulled, top) = image.pull(&snapshotter, "default");
        assert_eq!(pulled, [Pulled::Extracted; 8], "{hanging:?}");
        // two seconds a layer would be 16
        let took = start.elapsed();
        assert!((2..14).contains(&took.as_secs()), "{hanging:?}: {took:?}");
        if number == 0 {
            let container = Container::start(&snapshotter, "container", &top);
            assert_eq!(container.root.read("srv/x"), "x");
            container.end();
        }
        // what is opened ahead of its request is never listed, so nothing removes it
        let listed = snapshotter.client().names(&["kind==committed"]);
        assert_eq!(listed.len(), 8);
        snapshotter.client().remove_all();
    }
}

#[test]
fn a_slow_registry_is_waited_for_as_long_as_it_answers() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let delay = Fault::Delay(Duration::from_millis(800));
    registry.fail(On::Any, delay, Times::UntilHealed);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let start = Instant::now();
    let (pulled, _) = image.pull(&snapshotter, "default");
    let took = start.elapsed();
    assert_eq!(pulled, [Pulled::Lazy; 3], "{took:?}");
    assert!(
        took > Duration::from_secs(2),
        "{took:?}: not a slow registry"
    );
    registry.heal();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn an_image_of_130_layers() {
    let registry = Registry::start();
    let layers = |count: usize| {
        let layer =
            |number: usize| Layer::new().file(&format!("l{number}"), number.to_string().as_bytes());
        (0..count).map(layer).collect::<Vec<_>>()
    };
    let image = Image::push(&registry, "deep", layers(130), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let client = snapshotter.client();
    // the first request opens all layers, however long that takes this machine; one has one span
    image.pull_layer(&snapshotter, &client, "other", 0, "");
    wait("all layers are open", || {
        metric(&snapshotter, "socinbd_spans") >= 130
    });
    let (pulled, top) = image.pull(&snapshotter, "default");
    let lazy = pulled.iter().filter(|how| **how == Pulled::Lazy).count();
    assert!(lazy > 100, "{lazy} of 130");
    let mounts = client.prepare("default/9/container", &top, &[]).unwrap();
    let lowers = mounts[0]
        .options
        .iter()
        .find_map(|it| it.strip_prefix("lowerdir="))
        .unwrap();
    let lowers: Vec<&str> = lowers.split(':').collect();
    // where a layer was late and is extracted, what corrects the overlay is one more
    let corrections = lowers.len() - 130;
    assert!(corrections <= usize::from(lazy < 130), "{lazy}");
    // containerd leaves out what all paths begin with; what is left fits into a page
    let common = snapshotter
        .host
        .root()
        .canonicalize()
        .unwrap()
        .join("snapshots/snapshotter");
    let short = lowers.iter().map(|lower| {
        let short = std::path::Path::new(lower).strip_prefix(&common).unwrap();
        short.as_os_str().len() + 1
    });
    let length: usize = short.sum();
    assert!(length < 3000, "{length}");
    client.remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn two_containerds_have_snapshots_of_their_own_and_share_layers() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let mut snapshotter =
        Snapshotter::start(&["--unproven", "lazy", "--address", second.to_str().unwrap()]);
    // an --address replaces the default
    assert!(!snapshotter.host.run_dir().join("snapshotter.sock").exists());
    snapshotter.end_now();
    let first = snapshotter.host.run_dir().join("snapshotter.sock");
    snapshotter
        .options
        .extend(["--address".to_owned(), first.to_str().unwrap().to_owned()]);
    snapshotter.start_again();
    let (_, top) = image.pull(&snapshotter, "k8s.io");
    let other = super::client::Client::connect(&second).unwrap();
    assert_eq!(
        other.names(&[]).len(),
        0,
        "garbage collection of one does not see those of the other"
    );
    // the same keys
    let labels = image.labels(0);
    let key = format!("k8s.io/0/extract-1-a {}", image.chain[0]);
    assert_eq!(
        other.prepare(&key, "", &borrowed(&labels)).unwrap_err().0,
        Code::AlreadyExists
    );
    let name = other.names(&[]).remove(0);
    let container = Container::start(&snapshotter, "container", &top);
    let mounts = other.view("view", &name).unwrap();
    {
        let view = super::client::Mounted::at(snapshotter.host.mountpoint("view"), &mounts);
        assert_eq!(view.read("etc/tag"), "lower");
    }
    other.remove_all();
    assert_eq!(container.root.read("etc/tag"), "lower");
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn mirrors_of_the_node_serve_lazy_layers() {
    /// A registry that nobody can reach.
    const REGISTRY: &str = "registry.test:5000";
    let mirrors = [Registry::start(), Registry::start()];
    let files = || {
        vec![
            Layer::new()
                .file("etc/tag", b"lower")
                .file("data/first", &noise(1_000_000))
                .file("data/second", &noise(1_000_000)),
        ]
    };
    let images = mirrors
        .each_ref()
        .map(|mirror| Image::push(mirror, "app", files(), true));
    let [mut image, other] = images;
    assert_eq!((image.manifest, image.index), (other.manifest, other.index));
    image.reference = format!("{REGISTRY}/app:1");
    image.names_index = true;
    let certs = tempfile::tempdir().unwrap();
    let hosts = mirrors.each_ref().map(|mirror| {
        let host = mirror.host();
        let allowed = "capabilities = [\"pull\", \"resolve\", \"referrers\"]";
        format!("[host.\"http://{host}\"]\n{allowed}\n")
    });
    let directory = certs.path().join(REGISTRY);
    std::fs::create_dir_all(&directory).unwrap();
    let text = format!("server = \"http://127.0.0.1:1\"\n{}", hosts.concat());
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let certs = certs.path().to_str().unwrap();
    let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--hosts-dir", certs]);
    for mirror in &mirrors {
        mirror.reset_counters();
    }
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy]);
    let container = Container::start(&snapshotter, "container", &top);
    let read = |name: &str| std::fs::read(container.root.path().join(name)).unwrap();
    assert!(read("data/first") == noise(1_000_000));
    let asked = |mirror: &Registry| mirror.counters().blob(&image.blobs[0]).requests;
    assert!(asked(&mirrors[0]) > 0);
    assert_eq!(asked(&mirrors[1]), 0);
    // the first one goes away
    mirrors[0].fail(On::Any, Fault::Close, Times::UntilHealed);
    assert!(read("data/second") == noise(1_000_000));
    assert!(asked(&mirrors[1]) > 0);
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn a_disk_that_a_snapshot_needs_is_not_pruned() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    snapshotter.host.run(&["prune", "--all"]);
    drop(registry);
    let container = Container::start(&snapshotter, "container", &top);
    assert!(container.root.path().join("etc/tag").exists());
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn a_false_table_is_replaced_for_the_next_container() {
    let (tag, big) = (hostile::text("tag", 100_000), hostile::text("big", 400_000));
    let tar = tar_of(&[("etc/tag", &tag), ("data/big", &big)]);
    let lying = with_entries(&hostile::ztoc(&gzip(&tar)), |entries| {
        entries[0].name = b"etc/other".to_vec();
    });
    let made = hostile::layout(&tar, &lying);
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let listed = std::fs::read(made.path().join("index.json")).unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    let reference = registry.reference("app:latest");
    let image = Image::of(&made, &listed["manifests"][0], reference, vec![tar.clone()]);
    let snapshotter = Snapshotter::start(&[]);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy]);
    wait("the table is shown to be false", || {
        snapshotter
            .host
            .log()
            .contains("has another name than the zTOC")
    });
    let container = Container::start(&snapshotter, "container", &top);
    assert!(container.root.read("etc/tag").as_bytes() == tag);
    assert!(!container.root.path().join("etc/other").exists());
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

/// The same with the kernel's nbd: the tests in which the device of a layer counts.
#[test]
fn lazy_images_on_the_kernels_nbd() {
    if !is_vm() {
        run_tests(&[
            "snapshotter::lazy::an_indexed_image_starts",
            "snapshotter::lazy::a_killed_daemon_is_followed",
            "snapshotter::lazy::records_answer_while",
            "snapshotter::lazy::a_lie_in_one_namespace",
            "snapshotter::lazy::lazy_and_extracted_layers",
            "snapshotter::lazy::an_image_of_130_layers",
            "snapshotter::lazy::a_false_table",
            "--test-threads",
            "1",
        ]);
    }
}

#[test]
fn headers_of_labels_reach_the_registry_if_they_are_allowed() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--label-header", "X-Team"]);
    registry.reset_counters();
    let labels = image.labels(0).into_iter().chain(
        [
            ("x-team", "blue"),
            ("x-other", "1"),
            ("authorization", "Basic AAAA"),
        ]
        .map(|(name, value)| (format!("{}{name}", labels::HEADER), value.to_owned())),
    );
    let labels: Vec<_> = labels.collect();
    let labels: Vec<_> = labels
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let answer = snapshotter
        .client()
        .prepare("default/1/extract", "", &labels);
    assert!(
        matches!(answer, Err((Code::AlreadyExists, _))),
        "{answer:?}"
    );
    let log = registry.counters().log;
    assert!(!log.is_empty());
    for request in log {
        let sent = |name: &str| request.headers.get(name).map(String::as_str);
        assert_eq!(sent("x-team"), Some("blue"), "{request:?}");
        assert_eq!(
            sent("x-other").or(sent("authorization")),
            None,
            "{request:?}"
        );
    }
    snapshotter.end();
}
