//! Indexes in indexes: every command takes the same image, and a conversion changes what it must and no more.

use std::fs;

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::{
    commands::{SMALL, create, json_of},
    make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout, digest, gzip, tar_of},
    open, run,
};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Kind, Registry},
    },
};

fn named(entry: &Value, architecture: &str) -> Value {
    let mut entry = entry.clone();
    entry["platform"] = json!({"os": "linux", "architecture": architecture});
    entry
}

fn image(made: &MadeLayout, architecture: &str) -> Value {
    let tar = tar_of(&[
        ("etc/arch", architecture.as_bytes()),
        ("big", &noise(200_000)),
    ]);
    made.image(architecture, &[(GZIP_LAYER, tar)])
}

/// As BuildKit lists it beside the image.
fn attestation(made: &MadeLayout, image: &Value) -> Value {
    let statement = made.blob("application/vnd.in-toto+json", image.to_string().as_bytes());
    let config = made.blob("application/vnd.oci.image.config.v1+json", b"{ }");
    let mut entry = made.manifest(&config, &[statement]);
    entry["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    entry["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": image["digest"]});
    entry
}

fn document(reference: &str, digest: &Digest) -> Value {
    let read = async { open(reference).await?.manifest(digest).await };
    serde_json::from_slice(&run(read).unwrap().bytes).unwrap()
}

fn root(reference: &str) -> (Digest, Value) {
    let read = async { open(reference).await?.root_manifest().await };
    let found = run(read).unwrap();
    (found.digest, serde_json::from_slice(&found.bytes).unwrap())
}

/// An index of an index a platform, as some builders make it: with platforms everywhere, in the inner indexes only, on the inner indexes only,
/// and three levels deep.
fn layouts() -> Vec<(&'static str, MadeLayout, [Value; 2])> {
    let mut all = Vec::new();
    for kind in ["everywhere", "inside", "outside", "deep"] {
        let mut made = MadeLayout::new();
        let images = ["amd64", "arm64"].map(|architecture| image(&made, architecture));
        let inner: Vec<Value> = ["amd64", "arm64"]
            .iter()
            .zip(&images)
            .map(|(architecture, image)| {
                let entry = match kind {
                    "outside" => image.clone(),
                    _ => named(image, architecture),
                };
                let mut index = made.index(&[attestation(&made, image), entry]);
                if kind == "deep" {
                    index = made.index(&[index]);
                }
                match kind {
                    "everywhere" | "outside" => named(&index, architecture),
                    _ => index,
                }
            })
            .collect();
        let outer = made.index(&inner);
        made.tag(&outer, "1");
        all.push((kind, made, images));
    }
    all
}

#[test]
fn every_command_takes_the_same_image_of_an_index_in_an_index() {
    for (kind, made, images) in layouts() {
        let from = made.reference("1");
        for (architecture, image) in ["amd64", "arm64"].iter().zip(&images) {
            let platform = format!("linux/{architecture}");
            let host = Host::new();
            let only = ["--platform", &platform];
            let read = host.run(&[&["cat", &from, "/etc/arch"][..], &only].concat());
            assert_eq!(read, **architecture, "{kind}");
            let inspected = json_of(&host, &["inspect", &from, "--platform", &platform]);
            assert_eq!(inspected["manifest"], image["digest"], "{kind}");
            let report = create(&host, &from, &only);
            assert_eq!(report["image"], image["digest"], "{kind}");
            let inspected = json_of(&host, &["inspect", &from, "--platform", &platform]);
            assert_eq!(inspected["index"]["digest"], report["index"], "{kind}");
        }
        let host = Host::new();
        let both = create(&host, &from, &["--all-platforms", "--force"]);
        let made_for: Vec<&Value> = both
            .as_array()
            .unwrap()
            .iter()
            .map(|one| &one["image"])
            .collect();
        assert_eq!(made_for, [&images[0]["digest"], &images[1]["digest"]]);
        let error = host.fail(&["cat", &from, "/etc/arch", "--platform", "linux/s390x"], 3);
        let offered = "no image for linux/s390x; available platforms: linux/amd64, linux/arm64";
        assert!(error.contains(offered), "{kind}: {error}");
    }
}

/// The SOCI index stands beside its image, and the indexes above name what they lead to now. The other platform's index, attestations and
/// unknown fields are as they were; a registry that checks what an index lists takes it.
#[test]
fn a_conversion_in_an_index_in_an_index_changes_no_more_than_it_must() {
    let registry = DockerRegistry::start();
    for (kind, made, images) in layouts() {
        let from = made.reference("1");
        let to = format!("{}/{kind}:1", registry.host);
        let host = Host::new();
        let arguments = ["convert", &from, &to, "--platform", "linux/arm64"];
        let report = json_of(&host, &[&arguments[..], &SMALL].concat());
        let (digest_there, there) = root(&to);
        assert_eq!(report["digest"], json!(digest_there), "{kind}");
        let (_, before) = root(&from);
        assert_eq!(there["manifests"][0], before["manifests"][0], "{kind}");
        // all of the entry but what it leads to
        let (mut old, mut new) = (
            before["manifests"][1].clone(),
            there["manifests"][1].clone(),
        );
        for entry in [&mut old, &mut new] {
            entry["digest"] = Value::Null;
            entry["size"] = Value::Null;
        }
        assert_eq!(old.to_string(), new.to_string(), "{kind}");
        let mut inner = document(&to, &digest(&there["manifests"][1]));
        let mut inner_before = document(&from, &digest(&before["manifests"][1]));
        if kind == "deep" {
            inner = document(&to, &digest(&inner["manifests"][0]));
            inner_before = document(&from, &digest(&inner_before["manifests"][0]));
        }
        let entries = inner["manifests"].as_array().unwrap();
        assert_eq!(entries.len(), 3, "{kind}: {inner}");
        assert_eq!(
            entries[0].to_string(),
            inner_before["manifests"][0].to_string()
        );
        let converted = &report["images"][0];
        assert_eq!(converted["old"], images[1]["digest"]);
        assert_eq!(entries[1]["digest"], converted["manifest"]);
        assert_eq!(entries[2]["digest"], converted["index"]);
        // it is read lazily, and is known for what it is
        let other = Host::new();
        let platform = ["--platform", "linux/arm64", "--index-policy", "v2"];
        let read = other.run(&[&["cat", &to, "/etc/arch"][..], &platform].concat());
        assert_eq!(read, "arm64");
        let tags = format!("{}/{kind}", registry.host);
        let again = [&tags, &tags, "--tags", "1", "--platform", "linux/arm64"];
        let again = json_of(&host, &[&["convert"], &again[..], &SMALL].concat());
        assert_eq!(again[0]["outcome"], "converted", "{kind}: {again}");
        let again = [&tags, &tags, "--tags", "1", "--platform", "linux/arm64"];
        let again = json_of(&host, &[&["convert"], &again[..], &SMALL].concat());
        assert_eq!(again[0]["outcome"], "unchanged", "{kind}: {again}");
    }
}

#[test]
fn an_image_that_is_listed_twice_is_converted_once() {
    let mut made = MadeLayout::new();
    let amd64 = named(&image(&made, "amd64"), "amd64");
    let inner = made.index(std::slice::from_ref(&amd64));
    let outer = made.index(&[amd64.clone(), inner, amd64.clone()]);
    made.tag(&outer, "1");
    let folder = tempfile::tempdir().unwrap();
    let to = format!("oci:{}:1", folder.path().display());
    let host = Host::new();
    let arguments = ["convert", &made.reference("1"), &to, "--all-platforms"];
    let report = json_of(&host, &[&arguments[..], &SMALL].concat());
    let images = report["images"].as_array().unwrap();
    assert_eq!(images.len(), 1, "{report}");
    let (_, there) = root(&to);
    let inner = document(&to, &digest(&there["manifests"][1]));
    for entry in [
        &there["manifests"][0],
        &there["manifests"][2],
        &inner["manifests"][0],
    ] {
        assert_eq!(entry["digest"], images[0]["manifest"]);
    }
}

/// Of equal entries the first that is there; an image may have an artifact type of its own, and what else has one is no image.
#[test]
fn odd_entries_beside_the_image_do_not_hide_it() {
    let mut made = MadeLayout::new();
    let amd64 = image(&made, "amd64");
    let path = made.blob_path(&digest(&amd64));
    let mut typed: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    typed["artifactType"] = json!("application/vnd.example.app");
    let mut typed = made.blob(MANIFEST, typed.to_string().as_bytes());
    typed["artifactType"] = json!("application/vnd.example.app");
    let config = made.blob("application/vnd.oci.empty.v1+json", b"{}");
    let mut thing = made.manifest(&config, &[made.blob("application/x-thing", b"thing")]);
    thing["artifactType"] = json!("application/x-thing");
    let absent = json!({"mediaType": MANIFEST, "digest": Digest::of(b"absent"), "size": 5});
    let empty = made.index(&[]);
    let odd = [
        named(&thing, "amd64"),
        named(&absent, "amd64"),
        named(&empty, "amd64"),
        empty,
        absent,
    ];
    let all = [&odd[..], &[named(&typed, "amd64")]].concat();
    let with_typed = made.index(&all);
    made.tag(&with_typed, "typed");
    let all = [&odd[..], &[named(&amd64, "amd64")]].concat();
    let with_plain = made.index(&all);
    made.tag(&with_plain, "plain");
    made.tag(&typed, "single");
    // what an entry does not say is read, and told of where it can be neither an image nor an index
    let both = json!({"schemaVersion": 2, "manifests": [], "layers": []});
    let both = made.blob(MANIFEST, both.to_string().as_bytes());
    let with_both = made.index(&[both, amd64.clone()]);
    made.tag(&with_both, "both");
    let host = Host::new();
    let cat = |tag: &str| {
        let image = made.reference(tag);
        host.run(&["cat", &image, "/etc/arch", "--platform", "linux/amd64"])
    };
    assert_eq!(cat("plain"), "amd64");
    assert_eq!(cat("single"), "amd64");
    assert_eq!(cat("typed"), "amd64");
    let read = host.output(&["cat", &made.reference("both"), "/etc/arch"]);
    assert_eq!(read.stdout, b"amd64");
    let told = String::from_utf8(read.stderr).unwrap();
    assert!(told.contains("skipped"), "{told}");
}

/// Of equals the first counts, also where it is in an index. An entry that does not state a platform has that of the index that it is in.
#[test]
fn an_image_in_an_index_has_its_place_and_platform() {
    let mut made = MadeLayout::new();
    let silent = |content: &str, platform: Value| {
        let tar = tar_of(&[("etc/arch", content.as_bytes())]);
        let blob = gzip(&tar);
        let mut config = json!({"rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar)]}});
        for (key, value) in platform.as_object().unwrap() {
            config[key] = value.clone();
        }
        let config = config.to_string();
        let config = made.blob(
            "application/vnd.oci.image.config.v1+json",
            config.as_bytes(),
        );
        made.manifest(&config, &[made.blob(GZIP_LAYER, &blob)])
    };
    let amd64 = json!({"os": "linux", "architecture": "amd64"});
    let [first, second] = ["first", "second"].map(|name| silent(name, amd64.clone()));
    let inner = made.index(&[first]);
    let ordered = made.index(&[inner, second]);
    let unknown = silent("unknown", json!({}));
    let inner = made.index(&[unknown]);
    let stated = made.index(&[
        named(&image(&made, "amd64"), "amd64"),
        named(&inner, "arm64"),
    ]);
    made.tag(&ordered, "ordered");
    made.tag(&stated, "stated");
    let host = Host::new();
    let cat = |tag: &str, platform: &str| {
        let image = made.reference(tag);
        host.run(&["cat", &image, "/etc/arch", "--platform", platform])
    };
    assert_eq!(cat("ordered", "linux/amd64"), "first");
    assert_eq!(cat("stated", "linux/arm64"), "unknown");
}

#[test]
fn entries_that_cannot_be_read_do_not_hide_the_image() {
    let mut made = MadeLayout::new();
    let amd64 = named(&image(&made, "amd64"), "amd64");
    let other = image(&made, "arm64");
    let changed = |field: &str, value: Value| {
        let mut entry = named(&other, "arm64");
        entry[field] = value;
        entry
    };
    let odd = [
        changed("size", Value::Null),
        changed("size", json!(-1)),
        changed("digest", json!("sha256:ab")),
        changed("annotations", json!(7)),
        changed("annotations", json!({"a": null})),
        Value::Null,
        json!({}),
        json!("text"),
    ];
    let inner = made.index(&[&odd[..], std::slice::from_ref(&amd64)].concat());
    let nested = made.index(&[&odd[..], &[inner]].concat());
    made.tag(&nested, "nested");
    let flat = made.index(&[&odd[..], &[amd64]].concat());
    made.tag(&flat, "flat");
    let host = Host::new();
    let small = ["--min-layer-size", "0", "--platform", "linux/amd64"];
    for tag in ["flat", "nested"] {
        let image = made.reference(tag);
        let cat = |image: &str| host.run(&["cat", image, "/etc/arch", "--platform", "linux/amd64"]);
        assert_eq!(cat(&image), "amd64", "{tag}");
        let told = host.output(&["cat", &image, "/etc/arch", "--platform", "linux/amd64"]);
        let told = String::from_utf8(told.stderr).unwrap();
        assert!(
            told.contains("invalid entry in the image index: entry 0"),
            "{told}"
        );
        let target = |name: &str| format!("oci:{}:{tag}", host.mountpoint(name).display());
        host.run(&[&["index", "create", image.as_str()][..], &small].concat());
        let converted = target("converted");
        host.run(&[&["convert", image.as_str(), converted.as_str()][..], &small].concat());
        assert_eq!(cat(&converted), "amd64", "{tag}");
        let copied = target("copied");
        host.run(&["copy", &image, &copied]);
        assert_eq!(cat(&copied), "amd64", "{tag}");
    }
}

#[test]
fn nests_are_bounded() {
    let mut made = MadeLayout::new();
    let mut nest = image(&made, "amd64");
    for depth in 1..=9 {
        nest = made.index(&[nest]);
        made.tag(&nest, &depth.to_string());
    }
    let host = Host::new();
    let read =
        |made: &MadeLayout, depth: &str| host.output(&["cat", &made.reference(depth), "/etc/arch"]);
    assert!(read(&made, "8").status.success());
    assert_eq!(read(&made, "9").status.code(), Some(8));
    let folder = tempfile::tempdir().unwrap();
    let to = format!("oci:{}:1", folder.path().display());
    host.run(&["copy", &made.reference("8"), &to]);
    for command in ["copy", "convert"] {
        let error = host.output(&[command, &made.reference("9"), &to]);
        let error = String::from_utf8(error.stderr).unwrap();
        assert!(
            error.contains("more than 8 levels of nested indexes"),
            "{error}"
        );
    }

    // one that lists the next one twice leads to 2^8 images, and is read once
    let mut doubled = image(&made, "amd64");
    let mut thrice = Value::Null;
    for level in 0..7 {
        let mut other = doubled.clone();
        other["annotations"] = json!({"level": level.to_string()});
        doubled = made.index(&[doubled, other]);
        if level == 2 {
            thrice = doubled.clone();
        }
    }
    made.tag(&doubled, "doubled");
    made.tag(&thrice, "thrice");
    assert_eq!(read(&made, "doubled").stdout, b"amd64");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let from = registry.reference("app:thrice");
    // one that it has not: all is looked into
    host.fail(&["cat", &from, "/etc/arch", "--platform", "linux/s390x"], 3);
    let log = registry.counters().log;
    let mut documents: Vec<&Digest> = log
        .iter()
        .filter(|asked| asked.kind == Kind::Manifest)
        .filter_map(|asked| asked.digest.as_ref())
        .collect();
    let all = documents.len();
    documents.sort();
    documents.dedup();
    assert_eq!((documents.len(), all), (3, 3), "two indexes and the image");
    host.run(&["copy", &made.reference("doubled"), &to]);

    // so many that do not say what they are are not read; where one says that it is what is wanted, none is
    let silent = |number: u32| {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [], "annotations": {"n": number.to_string()}});
        made.blob(INDEX, index.to_string().as_bytes())
    };
    let mut many: Vec<Value> = (0..257).map(silent).collect();
    let unnamed = made.index(&many);
    many.push(named(&image(&made, "amd64"), "amd64"));
    let with_named = made.index(&many);
    made.tag(&unnamed, "unnamed");
    made.tag(&with_named, "named");
    assert_eq!(read(&made, "named").stdout, b"amd64");
    let error = String::from_utf8(read(&made, "unnamed").stderr).unwrap();
    assert!(error.contains("more than 256 manifests"), "{error}");

    // an index that calls itself a manifest
    let mut lies = made.index(&[]);
    lies["mediaType"] = json!(MANIFEST);
    let listed = made.index(&[named(&lies, "amd64")]);
    made.tag(&listed, "lies");
    let error = host.output(&["cat", &made.reference("lies"), "/x"]);
    let error = String::from_utf8(error.stderr).unwrap();
    assert!(error.contains("is an image index, but"), "{error}");
}
