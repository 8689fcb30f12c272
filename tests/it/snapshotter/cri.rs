//! containerd with CRI: pods on images that start lazily.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use serde_json::json;

use super::{
    Snapshotter,
    containerd::{Programs, Setup, runc},
    image::{Image, layer_mounts},
    node::{Node, base, sandbox, tar_of},
};
use crate::support::{
    noise,
    registry::{Fault, Kind, On, Registry, Times},
    tars::Layer,
    wait,
};

/// The size of a file that no start reads.
const BIG: usize = 3_000_000;

fn layers() -> Vec<Layer> {
    vec![
        base()
            .file("etc/tag", b"lower")
            .file("etc/removed", b"lower")
            .directory("data", 0o711)
            .file("data/big", &noise(BIG))
            .symlink("data/link", "big")
            .hardlink("data/same", "data/big"),
        Layer::new()
            .directory("etc", 0o755)
            .file("etc/tag", b"upper")
            .whiteout("etc/removed"),
    ]
}

/// A registry with an image and the image of sandboxes.
struct Images {
    registry: Registry,
    app: Image,
    sandbox: Image,
}

impl Images {
    fn new() -> Self {
        let registry = Registry::start();
        Self {
            app: Image::push(&registry, "app", layers(), true),
            sandbox: sandbox(&registry),
            registry,
        }
    }

    fn node(&self, snapshotter: &Snapshotter) -> Node {
        Node::start(Some(snapshotter), &Programs::built(), "", &self.sandbox)
    }
}

/// Removes all pods and images; nothing is left of them, then ends the daemon.
fn end(node: Node, snapshotter: Snapshotter) {
    node.remove_all();
    wait("garbage collection removes the snapshots", || {
        snapshotter.client().names(&[]).is_empty()
    });
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    wait("mounts and processes are gone", || {
        node.left_over().is_empty()
    });
    drop(node);
    snapshotter.end();
}

/// Runs a pod with overlayfs and with the snapshotter, and compares the roots of both containers.
fn pod_with(programs: &Programs) {
    let images = Images::new();
    let reference = &images.app.reference;
    // with containerd's own snapshotter
    let node = Node::start(None, programs, "", &images.sandbox);
    node.run(&["pull", reference]);
    let container = node.container(&node.pod(), "app", reference, &json!([]));
    let expected = tar_of(&node.root_of(&container));
    node.remove_all();
    wait("mounts and processes are gone", || {
        node.left_over().is_empty()
    });
    drop(node);

    for capabilities in programs.capabilities() {
        let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
        let node = Node::start(Some(&snapshotter), programs, capabilities, &images.sandbox);
        images.registry.reset_counters();
        node.run(&["pull", reference]);
        assert_eq!(
            node.images().iter().filter(|it| *it == reference).count(),
            1
        );
        let fetched = images.registry.counters().blob(&images.app.blobs[0]).bytes;
        assert!(fetched < BIG as u64 / 2, "{fetched} bytes");
        let pod = node.pod();
        let container = node.container(&pod, "app", reference, &json!([]));
        assert_eq!(layer_mounts(&snapshotter.host).len(), 2);
        assert!(tar_of(&node.root_of(&container)) == expected);
        assert_eq!(node.exec(&container, &["cat", "/etc/tag"]), "upper");
        // what the kubelet asks for: the disk of the images, and statistics of containers
        let disk = node.json(&["imagefsinfo"]);
        if programs.shows_root() {
            let shown = &disk["status"]["imageFilesystems"][0]["fsId"]["mountpoint"];
            assert_eq!(shown, snapshotter.host.root().to_str().unwrap());
        }
        node.run(&["stats", &container]);
        end(node, snapshotter);
    }
}

#[test]
fn a_pod_runs_on_an_image_that_was_pulled_lazily_and_leaves_nothing() {
    pod_with(&Programs::built());
}

#[test]
fn a_pod_runs_with_the_containerd_of_the_system() {
    pod_with(&Programs::of_the_system());
}

#[test]
fn kill_under_pods() {
    let images = Images::new();
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let node = images.node(&snapshotter);
    let reference = &images.app.reference;
    node.run(&["pull", reference]);
    let pod = node.pod();
    let first = node.container(&pod, "first", reference, &json!([]));
    for round in 0..3 {
        snapshotter.host.kill_served_by_keeper();
        let read = node.exec(&first, &["wc", "-c", "/data/big"]);
        assert_eq!(read, format!("{BIG} /data/big"));
        let name = format!("next-{round}");
        let next = node.container(&pod, &name, reference, &json!([]));
        assert_eq!(node.exec(&next, &["cat", "/etc/tag"]), "upper");
    }
    end(node, snapshotter);
}

#[test]
fn daemon_away_at_start() {
    let images = Images::new();
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let mut node = images.node(&snapshotter);
    let reference = &images.app.reference;
    node.run(&["pull", reference]);
    let pod = node.pod();
    let first = node.container(&pod, "first", reference, &json!([]));
    // containerd starts while no daemon runs: its requests wait for the next daemon, because it asks once
    for _ in 0..3 {
        node.containerd.stop();
        snapshotter.host.kill_served_by_keeper();
        node.containerd.start_again();
        node.wait();
        assert!(node.images().contains(reference));
        assert_eq!(node.exec(&first, &["cat", "/etc/tag"]), "upper");
    }
    let second = node.container(&pod, "second", reference, &json!([]));
    assert_eq!(node.exec(&second, &["cat", "/etc/tag"]), "upper");
    end(node, snapshotter);
}

#[test]
fn image_volume() {
    if !Programs::built().has_image_volumes() {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let images = Images::new();
    let model = vec![
        Layer::new().file("model/weights", &noise(BIG)),
        Layer::new().file("model/card", b"card"),
    ];
    let model = Image::push(&images.registry, "model", model, true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let node = images.node(&snapshotter);
    node.run(&["pull", &images.app.reference]);
    node.run(&["pull", &model.reference]);
    let pod = node.pod();
    let volume = json!([{
        "container_path": "/volume",
        "image": {"image": &model.reference},
        "readonly": true,
    }]);
    let container = node.container(&pod, "app", &images.app.reference, &volume);
    assert_eq!(
        node.exec(&container, &["cat", "/volume/model/card"]),
        "card"
    );
    // and the volume itself
    assert_eq!(layer_mounts(&snapshotter.host).len(), 4);
    let read = node.exec(&container, &["wc", "-c", "/volume/model/weights"]);
    assert_eq!(read, format!("{BIG} /volume/model/weights"));
    end(node, snapshotter);
}

/// Pods with `hostUsers: false` and one with `hostUsers: true` on one image: each sees the owners of the image, and nothing is copied.
#[test]
fn mixed_host_users() {
    let programs = Programs::built();
    if !programs.runs_user_namespaces_on_the_network_of_the_node() {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let images = Images::new();
    let reference = &images.app.reference;
    let runc = runc();
    for mounter in ["daemon", "containerd"] {
        let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--layer-mounts", mounter]);
        let setup = Setup {
            capabilities: programs.mapping(),
            runc: Some(&runc),
            ..Setup::default()
        };
        let node = Node::start_as(Some(&snapshotter), &programs, setup, &images.sandbox);
        node.run(&["pull", reference]);
        let all = [None, Some(100_000), Some(300_000)].map(|users| {
            let pod = node.pod_of(users);
            let name = users.map_or("app".to_owned(), |first| format!("app-{first}"));
            let container = node.container_of(users, &pod, &name, reference, &json!([]));
            (users.unwrap_or(0), container)
        });
        for (root, container) in &all {
            let map = node.exec(container, &["cat", "/proc/self/uid_map"]);
            let map: Vec<&str> = map.split_whitespace().collect();
            assert_eq!(map[..2], ["0", &root.to_string()]);
            let stat = |file: &str| node.exec(container, &["stat", "-c", "%u %g", file]);
            assert_eq!(stat("/etc/tag"), "1000 2000", "{mounter}, {root}");
            assert_eq!(stat("/data"), "1000 2000", "{mounter}, {root}");
            node.exec(container, &["touch", "/new"]);
            let new = fs::metadata(node.root_of(container).join("new")).unwrap();
            assert_eq!((new.uid(), new.gid()), (*root, *root), "{mounter}");
        }
        // those of the layers: containerd has made no copy to change its owners
        let client = snapshotter.client();
        let committed = client.names(&["kind==committed"]);
        assert_eq!(committed.len(), 3, "{committed:?}");
        snapshotter.host.kill_served_by_keeper();
        for (_, container) in &all {
            let read = node.exec(container, &["wc", "-c", "/data/big"]);
            assert_eq!(read, format!("{BIG} /data/big"));
        }
        end(node, snapshotter);
    }
}

#[test]
fn gc_under_slow_prepare() {
    let images = Images::new();
    let slow = vec![base(), Layer::new().file("slow", b"slow")];
    let slow = Image::push(&images.registry, "slow", slow, true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let node = images.node(&snapshotter);
    let reference = &images.app.reference;
    node.run(&["pull", reference]);
    let pod = node.pod();
    // The registry answers containerd's own requests, and then those of the snapshotter too late: a request waits for two seconds, in which
    // containerd does not collect garbage.
    images
        .registry
        .fail(On::Kind(Kind::Referrers), Fault::Hang, Times::UntilHealed);
    std::thread::scope(|scope| {
        let pulling = scope.spawn(|| node.run(&["pull", &slow.reference]));
        while !pulling.is_finished() {
            node.run(&["rmi", reference]);
            node.run(&["pull", reference]);
        }
        pulling.join().unwrap();
    });
    images.registry.heal();
    for (name, reference) in [("slow", &slow.reference), ("app", reference)] {
        let container = node.container(&pod, name, reference, &json!([]));
        node.exec(&container, &["true"]);
    }
    end(node, snapshotter);
}

/// `ctr` on the snapshots of CRI.
const SNAPSHOTS: [&str; 5] = [
    "--namespace",
    "k8s.io",
    "snapshots",
    "--snapshotter",
    "soci",
];

#[test]
fn lost_snapshot() {
    let images = Images::new();
    let mut snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let node = images.node(&snapshotter);
    let (reference, chain) = (&images.app.reference, &images.app.chain);
    node.run(&["pull", reference]);
    let pod = node.pod();
    // containerd has lost the snapshots, and not the image: it unpacks it again, and all layers are lazy again
    for chain in chain.iter().rev() {
        // its garbage collection may come first to what the topmost one has left
        let remove = ["remove", &chain.to_string()];
        node.containerd.ctr(&[&SNAPSHOTS[..], &remove].concat());
        wait("it is lost", || {
            let list = node.containerd.run(&[&SNAPSHOTS[..], &["list"]].concat());
            !list.contains(&chain.to_string())
        });
    }
    let has_labels = Programs::built().unpacks_again_with_labels();
    let reason = if has_labels {
        "already exists"
    } else {
        "not found"
    };
    if !has_labels {
        // without labels only a layer that is proven is there, and containerd has no blob
        let error = node.fail_to_create(&pod, "first", reference);
        assert!(error.contains(reason), "{error}");
        node.run(&["rmi", reference]);
        node.run(&["pull", reference]);
    }
    let container = node.container(&pod, "first", reference, &json!([]));
    assert_eq!(node.exec(&container, &["cat", "/etc/tag"]), "upper");
    assert_eq!(layer_mounts(&snapshotter.host).len(), 2);
    node.run(&["rm", "--force", &container]);

    // A record is damaged while no daemon runs: it is made again from its copy, and nobody notices.
    let snapshots = snapshotter.host.root().join("snapshots/snapshotter");
    let top = chain[1].to_string();
    let is_top = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        text.contains(&top) && text.contains("\"committed\"")
    };
    let mut records = fs::read_dir(&snapshots)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("record.json"));
    let record = records.find(is_top).unwrap();
    snapshotter.host.kill_daemon();
    fs::write(&record, "damaged").unwrap();
    snapshotter.start_again();
    let mut created = None;
    wait(
        "containerd connects again, and the container is created",
        || {
            created = node.try_create(&pod, "second", reference).ok();
            created.is_some()
        },
    );
    let container = created.unwrap();
    node.run(&["start", &container]);
    assert_eq!(node.exec(&container, &["cat", "/etc/tag"]), "upper");
    node.run(&["rm", "--force", &container]);

    // The copy is damaged too: the snapshotter has lost the snapshot. containerd relies on its own record, so the image is to be removed and
    // pulled again.
    snapshotter.host.kill_daemon();
    for name in ["record.json", "record.copy.json"] {
        fs::write(record.with_file_name(name), "damaged").unwrap();
    }
    snapshotter.start_again();
    // containerd connects again
    wait("the container is refused for this reason", || {
        let error = node.fail_to_create(&pod, "third", reference);
        error.contains(reason)
    });
    node.run(&["rmi", reference]);
    node.run(&["pull", reference]);
    let container = node.container(&pod, "third", reference, &json!([]));
    assert_eq!(node.exec(&container, &["cat", "/etc/tag"]), "upper");
    end(node, snapshotter);
}
