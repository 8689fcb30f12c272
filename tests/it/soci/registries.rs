//! The life of an image and its indexes, from a first push to the collection of what is left, in registries of several makers.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
};

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout, digest};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        registry::{Referrers, Registry},
        seeded_noise,
        tars::Layer,
        zot,
    },
};

const SMALL: [&str; 4] = ["--min-layer-size", "0", "--span-size", "65536"];

/// A layout with an image of two layers, a busybox and a file of its own, tagged; and the image's digest.
fn image(tag: &str, seed: u64) -> (MadeLayout, Digest) {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    let layers = [
        Layer::new().program("bin/busybox", &busybox).tar(),
        Layer::new()
            .file("etc/tag", tag.as_bytes())
            .file("data/big", &seeded_noise(900_000, seed))
            .tar(),
    ];
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &layers.map(|tar| (GZIP_LAYER, tar)));
    made.tag(&image, tag);
    let digest = digest(&image);
    (made, digest)
}

fn json_of(host: &Host, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    serde_json::from_str(&host.run(&arguments)).unwrap()
}

/// Removes a manifest, as a registry's own tools do.
fn delete(registry: &str, repository: &str, manifest: &Digest) {
    let mut stream = TcpStream::connect(registry).unwrap();
    write!(
        stream,
        "DELETE /v2/{repository}/manifests/{manifest} HTTP/1.1\r\nHost: {registry}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
}

#[test]
fn with_the_referrers_api() {
    let registry = Registry::start();
    live(&registry.host());
}

#[test]
fn without_the_referrers_api() {
    let registry = DockerRegistry::start();
    live(&registry.host);
}

/// One image of a multi-platform image is gone, and the rest of it has the tag of a list of referrers.
#[test]
fn an_image_that_has_the_tag_of_a_list_is_not_cleaned() {
    let registry = DockerRegistry::start();
    let host = Host::new();
    let mut made = MadeLayout::new();
    let images = ["amd64", "arm64"].map(|architecture| {
        let tar = Layer::new().file("etc/of", architecture.as_bytes()).tar();
        let mut entry = made.image(architecture, &[(GZIP_LAYER, tar)]);
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entry
    });
    let gone = digest(&images[1]);
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": images});
    let index = made.blob(INDEX, index.to_string().as_bytes());
    made.tag(&index, "v1");
    let repository = format!("{}/team/app", registry.host);
    let tag = format!("{repository}:sha256-{}", gone.hex());
    for to in [&format!("{repository}:v1"), &tag] {
        host.run(&["copy", &made.reference("v1"), to]);
    }
    delete(&registry.host, "team/app", &gone);
    let image = gone.to_string();
    let report = json_of(
        &host,
        &["index", "gc", "--remote", &repository, "--image", &image],
    );
    assert_eq!(report["removed"], json!([]), "{report}");
    for name in ["v1", &format!("sha256-{}", gone.hex())] {
        let found = json_of(&host, &["inspect", &format!("{repository}:{name}")]);
        assert_eq!(found["described"]["digest"], index["digest"], "{found}");
    }
}

/// What a list says of a manifest does not remove it.
#[test]
fn what_a_list_calls_an_index_and_is_none_is_not_cleaned() {
    let registry = Registry::start();
    registry.set_referrers(Referrers::Absent);
    let (made, image) = image("v1", 1);
    registry.add_layout("team/app", made.path()).unwrap();
    let gone = Digest::of(b"an image that is gone");
    let entry = json!({"mediaType": MANIFEST, "digest": image, "size": 7, "artifactType": "application/vnd.amazon.soci.index.v1+json"});
    let list = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    let tag = format!("sha256-{}", gone.hex());
    registry.add_manifest("team/app", Some(&tag), INDEX, list.to_string());
    let before = registry.tags("team/app");
    let repository = registry.reference("team/app");
    let report = json_of(&Host::new(), &["index", "gc", "--remote", &repository]);
    assert_eq!(report["removed"], json!([]), "{report}");
    assert_eq!(registry.tags("team/app"), before);
}

/// Needs zot, and is not one of the tests that may never be skipped: without it, it says so and returns.
#[test]
fn in_zot() {
    let Some(registry) = zot::start() else { return };
    live(&registry.host);
}

fn live(registry: &str) {
    let host = Host::new();
    let repository = format!("{registry}/team/app");
    let first = format!("{repository}:v1");
    let made: Vec<_> = [("v1", 1), ("v2", 2)]
        .into_iter()
        .map(|(tag, seed)| {
            let (made, digest) = image(tag, seed);
            host.run(&["copy", &made.reference(tag), &format!("{repository}:{tag}")]);
            (made, digest)
        })
        .collect();

    // version 1: made, pushed, listed, found
    let create = [&["index", "create", &first, "--compact"][..], &SMALL].concat();
    let created = json_of(&host, &create);
    let pushed = json_of(&host, &["index", "push", &first]);
    assert_eq!(pushed["images"][0]["outcome"], "pushed", "{pushed}");
    let again = json_of(&host, &["index", "push", &first]);
    assert_eq!(again["images"][0]["outcome"], "present", "{again}");
    let listed = json_of(&host, &["index", "list", &first]);
    assert_eq!(listed[0]["digest"], created["index"], "{listed}");
    let elsewhere = Host::new();
    let found = json_of(&elsewhere, &["inspect", &first]);
    assert_eq!(found["index"]["origin"], "referrer", "{found}");
    assert_eq!(found["index"]["digest"], created["index"]);
    assert_eq!(found["compact_index"]["digest"], created["compact_index"]);
    assert_eq!(elsewhere.run(&["cat", &first, "/etc/tag"]), "v1");

    // converted with what version 1 has; blobs that the registry has are not sent again
    let converted = format!("{registry}/lazy/one:v1");
    let convert = |from: &str, to: &str, options: &[&str]| {
        json_of(
            &host,
            &[&["convert", from, to][..], &SMALL, options].concat(),
        )
    };
    let report = convert(&first, &converted, &[]);
    let layers = report["images"][0]["layers"].as_array().unwrap();
    assert!(
        layers.iter().all(|layer| layer["reused"] == true),
        "{report}"
    );
    // zot finds them wherever they are, and needs no mount
    let blobs = |what: &str| report["blobs"][what].as_u64().unwrap();
    assert!(
        blobs("mounted") + blobs("present") >= 3 && blobs("uploaded") <= 3,
        "two layers and the configuration; two zTOCs and an empty configuration: {report}"
    );
    let found = json_of(&elsewhere, &["inspect", &converted]);
    assert_eq!(found["index"]["version"], 2, "{found}");
    let again = convert(&converted, &converted, &[]);
    assert_eq!(again["digest"], report["digest"], "twice is once");
    assert_eq!(again["blobs"]["uploaded"], 0, "{again}");
    let compact = format!("{registry}/lazy/one:v1-compact");
    let report = convert(&first, &compact, &["--compact"]);
    let found = json_of(&elsewhere, &["inspect", &compact]);
    assert_eq!(
        found["compact_index"]["digest"], report["images"][0]["compact_index"],
        "{found}"
    );

    // all start, lazily
    for image in [&first, &converted, &compact] {
        let mountpoint = elsewhere.mountpoint("mnt");
        elsewhere.attach(image, &mountpoint, &["--require-index"]);
        let spans = |n: usize| elsewhere.list()[0]["spans"][n].as_u64().unwrap();
        assert_eq!(fs::read(mountpoint.join("etc/tag")).unwrap(), b"v1");
        assert!(spans(0) < spans(1), "{} of {}", spans(0), spans(1));
        assert!(fs::read(mountpoint.join("data/big")).unwrap() == seeded_noise(900_000, 1));
        elsewhere.detach(&mountpoint);
        assert_eq!(elsewhere.left_over(), [""; 0]);
    }

    // a repository by its tags, and again for nothing
    let lazy = format!("{registry}/lazy/all");
    let all = [&["convert", &repository, &lazy, "--tags", "v?"][..], &SMALL].concat();
    for outcome in ["converted", "unchanged"] {
        let report = json_of(&host, &all);
        let outcomes: Vec<_> = report
            .as_array()
            .unwrap()
            .iter()
            .map(|one| &one["outcome"])
            .collect();
        assert_eq!(outcomes, [outcome; 2], "{report}");
    }
    assert_eq!(
        elsewhere.run(&["cat", &format!("{lazy}:v2"), "/etc/tag"]),
        "v2"
    );

    // moved with its indexes, within the registry and out of it
    let folder = tempfile::tempdir().unwrap();
    for (to, is_here) in [
        (format!("{registry}/copies/app:v1"), true),
        (format!("oci:{}:v1", folder.path().display()), false),
    ] {
        let report = json_of(&host, &["copy", &first, &to]);
        assert_eq!(report["digest"], json!(made[0].1), "{report}");
        assert_eq!(report["referrers"].as_array().unwrap().len(), 2, "{report}");
        if is_here {
            assert_eq!(report["blobs"]["uploaded"], 0, "{report}");
        }
        let found = json_of(&Host::new(), &["inspect", &to]);
        assert_eq!(found["index"]["digest"], created["index"], "{found}");
        assert_eq!(found["compact_index"]["digest"], created["compact_index"]);
    }

    // a recorded start is a newer index; and an image of its own
    let program = ["--", "/bin/busybox", "cmp", "/data/big", "/data/big"];
    let record = [&["record", &first, "--push"][..], &program].concat();
    let recorded = json_of(&host, &record);
    let found = json_of(&Host::new(), &["inspect", &first]);
    assert_eq!(
        found["index"]["digest"], recorded["index"],
        "the newest counts"
    );
    assert_eq!(
        json_of(&host, &["index", "list", &first])
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let fast = format!("{repository}:v1-fast");
    host.run(&[&["record", &first, "--to", &fast][..], &program].concat());
    let found = json_of(&Host::new(), &["inspect", &fast]);
    assert_eq!(found["index"]["version"], 2, "{found}");
    assert_eq!(host.left_over(), [""; 0]);

    // what is left of an image that is gone is collected
    let second = format!("{repository}:v2");
    let create = [&["index", "create", &second, "--push"][..], &SMALL].concat();
    let created = json_of(&host, &create);
    let gone = made[1].1;
    delete(registry, "team/app", &gone);
    let gone = gone.to_string();
    let collect = ["index", "gc", "--remote", &repository, "--image", &gone];
    let tried = json_of(&host, &[&collect[..], &["--dry-run"]].concat());
    assert_eq!(tried["removed"][0]["digest"], created["index"], "{tried}");
    assert_eq!(json_of(&host, &collect)["removed"], tried["removed"]);
    assert_eq!(json_of(&host, &collect)["removed"], json!([]));
    let index = created["index"].as_str().unwrap();
    host.fail(&["index", "info", index, "--at", &first], 3);
    assert_eq!(
        elsewhere.run(&["cat", &first, "/etc/tag"]),
        "v1",
        "the other is as it was"
    );
}
