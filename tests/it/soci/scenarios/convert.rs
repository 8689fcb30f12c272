//! The `convert` suite.

use std::{collections::BTreeMap, fs};

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::{
    super::{
        commands::{SMALL, create, json_of, multi},
        make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout, digest, tar_of},
    },
    assert_reads, digest_of, entries, layers, manifest, root_of,
};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Kind, Referrers, Registry},
    },
};

const V2_CONFIG: &str = "application/vnd.amazon.soci.index.v2+json";
const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";

fn convert(host: &Host, from: &str, to: &str, options: &[&str]) -> Value {
    json_of(
        host,
        &[&["convert", from, to], &SMALL[..], options].concat(),
    )
}

/// Whether an image of this platform has its SOCI index in itself.
fn has_index(image: &str, platform: &str) -> bool {
    let found = json_of(&Host::new(), &["inspect", image, "--platform", platform]);
    match &found["index"] {
        Value::Null => false,
        index => {
            assert_eq!(index["version"], 2, "{image} {platform}");
            true
        }
    }
}

/// convert: "all/single platform".
#[test]
fn the_platforms_that_were_asked_for_have_an_index_and_no_other() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let before = entries(&image);
    let own = host.run(&["--json", "inspect", &image]);
    let own: Value = serde_json::from_str(&own).unwrap();
    let own = usize::from(own["manifest"] == json!(images[1])); // of this machine
    let expected = |which: usize| {
        if which == 0 {
            [true, false]
        } else {
            [false, true]
        }
    };
    for (options, converted) in [
        (&["--platform", "linux/amd64"][..], expected(0)),
        (&["--platform", "linux/arm64"], expected(1)),
        (&[], expected(own)),
        (&["-p", "linux/amd64", "-p", "linux/arm64"], [true, true]),
        (&["--all-platforms"], [true, true]),
    ] {
        let to = registry.reference("app:new");
        let report = convert(&host, &image, &to, options);
        let count = converted.iter().filter(|is| **is).count();
        assert_eq!(report["images"].as_array().unwrap().len(), count);
        let after = entries(&to);
        assert_eq!(after.len(), 2 + count, "{options:?}");
        let mut named: Vec<Digest> = Vec::new();
        for (at, converted) in converted.into_iter().enumerate() {
            assert_eq!(
                before[at] == after[at],
                !converted,
                "{options:?}, entry {at}"
            );
            assert_eq!(before[at]["platform"], after[at]["platform"], "{options:?}");
            let platform = ["linux/amd64", "linux/arm64"][at];
            assert_eq!(
                has_index(&to, platform),
                converted,
                "{options:?} {platform}"
            );
            if converted {
                let image = manifest(&to, &digest(&after[at]));
                named.push(
                    image["annotations"][INDEX_DIGEST]
                        .as_str()
                        .unwrap()
                        .parse()
                        .unwrap(),
                );
            }
        }
        let listed: Vec<Digest> = after[2..].iter().map(digest).collect();
        assert_eq!(listed, named, "{options:?}");
        for index in listed {
            assert_eq!(manifest(&to, &index)["config"]["mediaType"], V2_CONFIG);
        }
    }
    let to = registry.reference("app:none");
    let options = ["--platform", "linux/amd64", "--platform", "linux/s390x"];
    host.fail(&[&["convert", &image, &to][..], &options].concat(), 3);
    assert!(!registry.tags("app").contains_key("none"));
}

/// convert: "single manifest".
#[test]
fn a_single_manifest_becomes_an_index_of_it_and_its_soci_index() {
    let mut made = MadeLayout::new();
    let content = noise(200_000);
    let single = made.image("arm64", &[(GZIP_LAYER, tar_of(&[("f", &content)]))]);
    made.tag(&single, "1");
    let from = made.reference("1");
    let registry = Registry::start();
    let to = registry.reference("app:1");
    let host = Host::new();
    convert(&host, &from, &to, &[]);
    let index = root_of(&to);
    assert_eq!(index["mediaType"], INDEX);
    let listed = entries(&to);
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0]["mediaType"], MANIFEST);
    assert_eq!(
        listed[0]["platform"],
        json!({"os": "linux", "architecture": "arm64"})
    );
    let (before, after) = (
        manifest(&from, &digest(&single)),
        manifest(&to, &digest(&listed[0])),
    );
    assert_eq!(
        (&before["config"], &before["layers"]),
        (&after["config"], &after["layers"])
    );
    assert_eq!(
        after["annotations"],
        json!({INDEX_DIGEST: listed[1]["digest"]})
    );
    assert_reads(
        &to,
        "linux/arm64",
        &["--index-policy", "v2"],
        &[("f", &content)],
    );
    // that platform by its name gives the same image
    for options in [&["--platform", "linux/arm64"][..], &["--all-platforms"]] {
        convert(&host, &from, &registry.reference("app:2"), options);
        let again = entries(&registry.reference("app:2"));
        assert_eq!(digest(&again[0]), digest(&listed[0]), "{options:?}");
        assert_eq!(digest(&again[1]), digest(&listed[1]), "{options:?}");
    }
    let other = ["convert", &from, &to, "--platform", "linux/amd64"];
    let error = host.fail(&other, 3);
    assert!(
        error.contains("available platforms: linux/arm64"),
        "{error}"
    );
}

/// convert: "idempotent", "force".
#[test]
fn converting_again_moves_nothing_and_force_reads_the_layers_anew() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let sizes: BTreeMap<Digest, u64> = images
        .iter()
        .flat_map(|one| layers(&manifest(&image, one)))
        .collect();
    assert_eq!(sizes.len(), 3, "one is shared");
    let to = registry.reference("app:2");
    let all = ["--all-platforms"];
    let first = convert(&Host::new(), &image, &to, &all);
    for (from, to, options, reads) in [
        ("app:1", "app:2", &[][..], false),
        ("app:2", "app:2", &[], false),
        ("app:2", "app:3", &[], false),
        ("app:1", "app:2", &["--force"], true),
        ("app:2", "app:2", &["--force"], true),
    ] {
        registry.reset_counters();
        let (from, to) = (registry.reference(from), registry.reference(to));
        let again = convert(&Host::new(), &from, &to, &[&all, options].concat());
        assert_eq!(again["digest"], first["digest"], "{from} {to} {options:?}");
        let counters = registry.counters();
        for (layer, size) in &sizes {
            let expected = if reads { *size } else { 0 };
            assert_eq!(
                counters.blob(layer).bytes,
                expected,
                "{from} {to} {options:?}"
            );
        }
        assert_eq!(again["blobs"]["uploaded"], 0, "{from} {to} {options:?}");
        assert_eq!(counters.kind(Kind::Upload).requests, 0);
    }
}

/// convert: "convert-and-replace same name".
#[test]
fn an_image_is_replaced_by_its_conversion() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let old = digest_of(&made.reference("1"));
    let packed = made.packed("");
    let archive = format!("oci-archive:{}:1", packed.path().display());
    let host = Host::new();
    let mut digests = Vec::new();
    for image in [&registry.reference("app:1"), &archive, &made.reference("1")] {
        let report = convert(&host, image, image, &["--all-platforms"]);
        assert_eq!(report["source_digest"], json!(old), "{image}");
        let new = digest_of(image);
        assert_eq!(report["digest"], json!(new), "{image}");
        assert_ne!(new, old);
        for architecture in ["amd64", "arm64"] {
            let files: [(&str, &[u8]); 2] = [
                ("/etc/os-release", architecture.as_bytes()),
                ("/data/big", &noise(900_000)),
            ];
            let platform = format!("linux/{architecture}");
            assert_reads(image, &platform, &["--index-policy", "v2"], &files);
        }
        convert(&host, image, image, &["--all-platforms"]);
        assert_eq!(digest_of(image), new, "{image}");
        digests.push(new);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
    let tags = registry.tags("app");
    assert_eq!(tags.into_keys().collect::<Vec<_>>(), ["1"]);
    // who has the old digest still gets the old image
    let by_digest = registry.reference(&format!("app@{old}"));
    assert_eq!(digest_of(&by_digest), old);
    assert!(!has_index(&by_digest, "linux/amd64"));
}

/// convert: "convert+push matrix".
#[test]
fn what_was_converted_and_pushed_is_lazy_elsewhere() {
    let debian = DockerRegistry::start();
    let (with, without) = (Registry::start(), Registry::start());
    without.set_referrers(Referrers::Absent);
    let (made, _) = multi();
    let big = noise(900_000);
    let from = made.reference("1");
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new();
    for (name, options, is_converted) in [
        ("one", &["--platform", "linux/arm64"][..], [false, true]),
        ("all", &["--all-platforms"], [true, true]),
    ] {
        for (way, first) in [
            (
                "folder",
                Some(format!("oci:{}/{name}:1", folder.path().display())),
            ),
            (
                "tar",
                Some(format!(
                    "oci-archive:{}/{name}.tar:1",
                    folder.path().display()
                )),
            ),
            ("direct", None),
        ] {
            for place in [with.host(), without.host(), debian.host.clone()] {
                let image = format!("{place}/{way}/{name}:1");
                let made = match &first {
                    Some(first) => {
                        let report = convert(&host, &from, first, options);
                        let copied = json_of(&host, &["copy", first, &image]);
                        assert_eq!(copied["digest"], report["digest"], "{image}");
                        report
                    }
                    None => convert(&host, &from, &image, options),
                };
                assert_eq!(made["digest"], json!(digest_of(&image)), "{image}");
                for (architecture, is_converted) in ["amd64", "arm64"].iter().zip(is_converted) {
                    let platform = format!("linux/{architecture}");
                    assert_eq!(
                        has_index(&image, &platform),
                        is_converted,
                        "{image} {platform}"
                    );
                    if is_converted {
                        let files: [(&str, &[u8]); 2] = [
                            ("/etc/os-release", architecture.as_bytes()),
                            ("/data/big", &big),
                        ];
                        assert_reads(&image, &platform, &[], &files);
                    }
                }
            }
        }
    }
}

/// convert: "deleted manifest/index -> push fails"; push: the same of version 1.
#[test]
fn what_lacks_a_part_is_not_pushed_and_has_no_name_there() {
    let (made, _) = multi();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("converted");
    let from = format!("oci:{}:1", path.display());
    let host = Host::new();
    let report = convert(&host, &made.reference("1"), &from, &["--all-platforms"]);
    let listed = entries(&from);
    let image = manifest(&from, &digest(&listed[0]));
    let index = manifest(&from, &digest(&listed[2]));
    assert_eq!(index["config"]["mediaType"], V2_CONFIG);
    for (what, part) in [
        ("SOCI index", &listed[2]),
        ("configuration", &image["config"]),
        ("layer", &image["layers"][1]),
        ("zTOC", &index["layers"][0]),
    ] {
        let part = digest(part);
        let blob = path.join("blobs/sha256").join(part.hex());
        let bytes = fs::read(&blob).unwrap();
        fs::remove_file(&blob).unwrap();
        let registry = Registry::start();
        let to = registry.reference("app:1");
        let error = host.fail(&["copy", &from, &to], 3);
        assert!(error.contains(&part.hex()), "{what}: {error}");
        assert!(registry.tags("app").is_empty(), "{what}");
        fs::write(&blob, bytes).unwrap();
    }
    let registry = Registry::start();
    // what can be made of the rest is made: the SOCI index and its zTOC, the same as before
    for part in [&listed[2], &index["layers"][0]] {
        fs::remove_file(path.join("blobs/sha256").join(digest(part).hex())).unwrap();
        let to = registry.reference("made:1");
        let again = convert(&host, &from, &to, &["--all-platforms"]);
        assert_eq!(again["digest"], report["digest"]);
        assert_reads(
            &to,
            "linux/amd64",
            &["--index-policy", "v2"],
            &[("/etc/os-release", b"amd64")],
        );
    }
    // the image's manifest is not
    fs::remove_file(path.join("blobs/sha256").join(digest(&listed[0]).hex())).unwrap();
    let to = registry.reference("lost:1");
    let options = ["--platform", "linux/amd64"];
    let error = host.fail(
        &[&["convert", &from, &to][..], &SMALL, &options].concat(),
        3,
    );
    assert!(error.contains("the image for linux/amd64"), "{error}");
    assert!(registry.tags("lost").is_empty());

    // version 1: a zTOC, or the index, that the state directory has lost is made again
    for lost in ["ztoc", "index"] {
        let registry = Registry::start();
        registry.add_layout("app", made.path()).unwrap();
        let image = registry.reference("app:1");
        let report = create(&host, &image, &options);
        let push = [&["index", "push", &image][..], &options].concat();
        let (part, words) = match lost {
            "ztoc" => (&report["layers"][0]["ztoc"], "sha256:"),
            _ => (&report["index"], "no index to push"),
        };
        let part: Digest = part.as_str().unwrap().parse().unwrap();
        let blob = host.root().join("content/blobs/sha256").join(part.hex());
        fs::remove_file(&blob).unwrap();
        let error = host.fail(&push, 3);
        assert!(error.contains(words), "{lost}: {error}");
        assert!(lost == "index" || error.contains(&part.hex()), "{error}");
        let list = [&["index", "list", &image][..], &options].concat();
        assert_eq!(json_of(&Host::new(), &list), json!([]), "{lost}");
        let again = create(&host, &image, &options);
        assert_eq!(again["index"], report["index"], "{lost}");
        assert_eq!(json_of(&host, &push)["images"][0]["outcome"], "pushed");
    }
}
