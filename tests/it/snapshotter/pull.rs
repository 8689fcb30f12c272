//! Layers that are pulled into disks, and the rules and the label that choose it.

use std::{fs, time::Duration};

use socinbd::snapshotter::{PULL_LABEL, labels};
use tonic::Code;

use super::{
    Snapshotter,
    image::{Container, Image, Pulled, layer_mounts},
};
use crate::support::{
    noise,
    registry::{Auth, Fault, Kind, Link, On, Registry, Times, base64},
    tars::Layer,
    wait,
};

/// Two layers, of which the first has several parts.
fn layers() -> Vec<Layer> {
    vec![
        Layer::new()
            .directory("etc", 0o750)
            .file("etc/tag", b"lower")
            .file("data/big", &noise(10_000_000)),
        Layer::new().file("etc/upper", b"upper"),
    ]
}

/// The rules under which layers without a table are pulled into disks.
const DISKS: [&str; 4] = ["--rule", "lazy", "--rule", "disks"];

/// The directories of disks that are being made.
fn drafts(snapshotter: &Snapshotter) -> usize {
    let new = snapshotter.host.root().join("layers/new");
    fs::read_dir(new).map_or(0, Iterator::count)
}

fn end(snapshotter: Snapshotter) {
    snapshotter.client().remove_all();
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    snapshotter.end();
}

#[test]
fn an_image_without_an_index_is_pulled_into_disks_by_a_rule() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), false);
    let snapshotter = Snapshotter::start(&DISKS);
    registry.reset_counters();
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let ranges = registry.counters().ranges(&image.blobs[0]);
    assert!(ranges.len() >= 3, "by parts: {ranges:?}");
    // all of it is here and proven: it answers for every image, and needs no registry
    drop(registry);
    let client = snapshotter.client();
    let target = image.chain[0].to_string();
    let answer = client.prepare("other/1/x", "", &[(labels::TARGET, &target)]);
    assert_eq!(answer.unwrap_err().0, Code::AlreadyExists);
    let container = Container::start(&snapshotter, "container", &top);
    let big = fs::read(container.root.path().join("data/big")).unwrap();
    assert!(big == noise(10_000_000));
    assert_eq!(container.root.read("etc/upper"), "upper");
    assert_eq!(layer_mounts(&snapshotter.host).len(), 2);
    assert_eq!(drafts(&snapshotter), 0);
    container.end();
    end(snapshotter);
}

#[test]
fn a_layer_that_a_rule_wants_on_a_disk_is_waited_for() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), false);
    // it takes eleven seconds, and other layers are waited for for ten
    registry.set_link(Link {
        round_trip: Duration::from_millis(20),
        bytes_per_second: 900_000,
    });
    let snapshotter = Snapshotter::start(&DISKS);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/tag"), "lower");
    container.end();
    end(snapshotter);
}

#[test]
fn a_small_image_with_an_index_is_pulled_into_disks_by_default() {
    let registry = Registry::start();
    let small = Image::push(&registry, "small", layers(), true);
    let large = vec![Layer::new().file("big", &noise(17 << 20))];
    let large = Image::push(&registry, "large", large, true);
    let plain = vec![Layer::new().file("etc/plain", b"plain")];
    let plain = Image::push(&registry, "plain", plain, false);
    let snapshotter = Snapshotter::start_by_default(&["--unproven", "lazy"]);
    for (image, answered, basis) in [
        (&small, vec![Pulled::Lazy; 2], "no rule: the image is small"),
        (&large, vec![Pulled::Lazy], "no rule: it has a table"),
        (&plain, vec![Pulled::Extracted], "no rule: it has no table"),
    ] {
        let (pulled, top) = image.pull(&snapshotter, "default");
        assert_eq!(pulled, answered, "{basis}");
        let why = snapshotter.host.run(&["why", &top]);
        assert!(
            why.contains(basis) || pulled[0] == Pulled::Extracted,
            "{basis}: {why}"
        );
    }
    // what is proven needs no labels
    let client = snapshotter.client();
    let target = |image: &Image| image.chain[0].to_string();
    for (image, is_proven) in [(&small, true), (&large, false)] {
        let answer = client.prepare("other/1/x", "", &[(labels::TARGET, &target(image))]);
        assert_eq!(answer.is_err(), is_proven);
    }
    end(snapshotter);
}

#[test]
fn rules_choose_by_image_and_size_and_the_label_is_above_them() {
    let registry = Registry::start();
    let image = Image::push(&registry, "team/app", layers(), true);
    let other = Image::push(&registry, "other/app", layers(), true);
    let host = registry.host();
    let of_team = format!("disks,image={host}/team/*,max-layer-size=1M");
    let large = format!("containerd,image={host}/team/*");
    let small = "containerd,max-image-size=1M";
    let snapshotter = Snapshotter::start(&["--rule", &of_team, "--rule", &large, "--rule", small]);
    // the first layer is too large for the first rule
    let (pulled, top) = image.pull(&snapshotter, "team");
    assert_eq!(pulled, [Pulled::Extracted, Pulled::Lazy]);
    let why = snapshotter.host.run(&["why", &top]);
    for rule in ["rule 1 (disks,image=", "rule 2 (containerd,image="] {
        assert!(why.contains(rule), "{why}");
    }
    // no rule is for this image
    let (pulled, top) = other.pull(&snapshotter, "other");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    registry.reset_counters();
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/tag"), "lower");
    container.end();
    snapshotter.client().remove_all();
    let client = snapshotter.client();
    for (number, (name, answer)) in [
        ("lazy", Some(Code::AlreadyExists)),
        ("disks", Some(Code::AlreadyExists)),
        ("containerd", None),
        ("everything", None),
    ]
    .into_iter()
    .enumerate()
    {
        let mut labels = image.labels(0);
        labels.push((PULL_LABEL.to_owned(), name.to_owned()));
        let labels: Vec<(&str, &str)> = labels
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let found = client.prepare(&format!("label/{number}/x"), "", &labels);
        assert_eq!(found.err().map(|(code, _)| code), answer, "{name}");
        client.remove_all();
    }
    let log = snapshotter.host.log();
    assert!(
        log.contains("rule 2 (containerd,image=") && log.contains("leaves it to containerd"),
        "{log}"
    );
    assert!(
        log.contains("one of lazy, disks and containerd is wanted"),
        "{log}"
    );
    end(snapshotter);
}

#[test]
fn why_names_the_rule_or_the_label_that_made_a_layer_lazy() {
    let registry = Registry::start();
    let image = Image::push(&registry, "team/app", layers(), true);
    let rule = format!("lazy,image={}/team/*", registry.host());
    let mut snapshotter = Snapshotter::start_by_default(&["--unproven", "lazy", "--rule", &rule]);
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let chosen = |snapshotter: &Snapshotter, top: &str| {
        let why = snapshotter.host.run(&["why", top]);
        let lines = why
            .lines()
            .filter_map(|line| line.strip_prefix("  chosen: "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let by_rule = format!("rule 1 ({rule})");
    assert_eq!(chosen(&snapshotter, &top), [&*by_rule, &by_rule]);
    // also without a daemon, from the record
    snapshotter.host.kill_daemon();
    assert_eq!(chosen(&snapshotter, &top), [&*by_rule, &by_rule]);
    snapshotter.start_again();
    snapshotter.client().remove_all();

    let client = snapshotter.client();
    let mut labels = image.labels(0);
    labels.push((PULL_LABEL.to_owned(), "lazy".to_owned()));
    let labels: Vec<(&str, &str)> = labels
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    client.prepare("default/1/x", "", &labels).unwrap_err();
    let [lazy] = &client.names(&["kind==committed"])[..] else {
        panic!("one lazy layer");
    };
    let by_label = format!("the label {PULL_LABEL}");
    assert_eq!(chosen(&snapshotter, lazy), [by_label]);
    end(snapshotter);
}

#[test]
fn containerd_pulls_what_cannot_be_pulled_into_a_disk() {
    let registry = Registry::start();
    let honest = Image::push(&registry, "honest", layers(), false);
    let evil = || {
        vec![
            Layer::new().file("etc/tag", b"evil"),
            Layer::new().file("etc/upper", b"evil"),
        ]
    };
    let liar = Image::push_liar(&registry, "liar", &honest, evil());
    let snapshotter = Snapshotter::start(&["--rule", "disks"]);
    // a false diff ID: containerd compares it, too
    let (pulled, _) = liar.pull(&snapshotter, "evil");
    assert_eq!(pulled, [Pulled::Extracted, Pulled::Extracted]);
    assert!(snapshotter.host.log().contains("its diff ID is"));
    snapshotter.client().remove_all();
    // a registry that refuses a layer
    registry.fail(
        On::DataOf(honest.blobs[0]),
        Fault::status(403),
        Times::UntilHealed,
    );
    let (pulled, top) = honest.pull(&snapshotter, "good");
    assert_eq!(pulled[0], Pulled::Extracted);
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/upper"), "upper");
    container.end();
    wait("nothing is left of what was not completed", || {
        drafts(&snapshotter) == 0
    });
    // soon it is tried again
    registry.heal();
    snapshotter.client().remove_all();
    let mut number = 0;
    wait("the image is pulled into disks", || {
        number += 1;
        let (pulled, _) = honest.pull(&snapshotter, &format!("again{number}"));
        snapshotter.client().remove_all();
        pulled == [Pulled::Lazy, Pulled::Lazy]
    });
    end(snapshotter);
}

#[test]
fn a_daemon_killed_in_a_pull_leaves_nothing_half() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), false);
    registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 1_000_000,
    });
    let snapshotter = Snapshotter::start(&DISKS);
    let (client, labels) = (snapshotter.client(), image.labels(0));
    let pulling = std::thread::spawn(move || {
        let labels: Vec<(&str, &str)> = labels
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        client.prepare("killed/1/x", "", &labels)
    });
    wait("the disk is being made", || drafts(&snapshotter) > 0);
    snapshotter.host.kill_served_by_keeper();
    // containerd reports the failure of its pull
    let (code, _) = pulling.join().unwrap().unwrap_err();
    assert_ne!(code, Code::AlreadyExists);
    registry.set_link(Link::default());
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    assert_eq!(drafts(&snapshotter), 0);
    let container = Container::start(&snapshotter, "container", &top);
    let big = fs::read(container.root.path().join("data/big")).unwrap();
    assert!(big == noise(10_000_000));
    container.end();
    end(snapshotter);
}

#[test]
fn a_pull_into_disks_uses_mirrors_and_credentials() {
    let (registry, mirror) = (Registry::start(), Registry::start());
    let image = Image::push(&registry, "app", layers(), false);
    Image::push(&mirror, "app", layers(), false);
    registry.set_auth(Auth::Basic {
        user: "somebody".to_owned(),
        password: "secret".to_owned(),
    });
    // a mirror that breaks off
    mirror.fail(On::Data, Fault::Cut { after: 100_000 }, Times::UntilHealed);
    let folder = tempfile::tempdir().unwrap();
    let host = registry.host();
    let (hosts, auth) = (folder.path().join("certs.d"), folder.path().join("auth"));
    let of_registry = hosts.join(&host);
    fs::create_dir_all(&of_registry).unwrap();
    let text = format!(
        "server = \"http://{host}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        mirror.host()
    );
    fs::write(of_registry.join("hosts.toml"), text).unwrap();
    let login = base64(b"somebody:secret");
    let logins = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{login}\"}}}}}}");
    fs::write(&auth, logins).unwrap();
    let options = [
        &DISKS[..],
        &[
            "--hosts-dir",
            hosts.to_str().unwrap(),
            "--auth-file",
            auth.to_str().unwrap(),
        ],
    ];
    let snapshotter = Snapshotter::start(&options.concat());
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    assert!(mirror.counters().blobs().requests > 0);
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/tag"), "lower");
    container.end();
    end(snapshotter);
}

#[test]
fn a_failed_search_for_an_index_is_forgotten_soon() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    // not an outage, which is an error in any case: the registry refuses the list
    registry.fail(
        On::Kind(Kind::Referrers),
        Fault::status(403),
        Times::UntilHealed,
    );
    let (pulled, _) = image.pull(&snapshotter, "before");
    assert_eq!(pulled[0], Pulled::Extracted);
    registry.heal();
    snapshotter.client().remove_all();
    let mut number = 0;
    wait("the index is found", || {
        number += 1;
        let (pulled, _) = image.pull(&snapshotter, &format!("after{number}"));
        snapshotter.client().remove_all();
        pulled == [Pulled::Lazy, Pulled::Lazy]
    });
    end(snapshotter);
}
