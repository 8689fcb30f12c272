//! Images that are not whole where they are: some platforms only, foreign layers, small layers that are gone; and layers of no bytes.

use std::{fs, process::Output};

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::{
    commands::{SMALL, create, json_of},
    make::{GZIP_LAYER, MadeLayout, digest, gzip, tar_of},
    open, run,
};
use crate::{
    engine::Host,
    support::{docker_registry::DockerRegistry, noise, registry::Registry},
};

const FOREIGN_LAYER: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

fn image(made: &MadeLayout, architecture: &str) -> Value {
    let tar = tar_of(&[
        ("etc/arch", architecture.as_bytes()),
        ("big", &noise(200_000)),
    ]);
    let mut entry = made.image(architecture, &[(GZIP_LAYER, tar)]);
    entry["platform"] = json!({"os": "linux", "architecture": architecture});
    entry
}

fn attestation(made: &MadeLayout, image: &Value) -> Value {
    let statement = made.blob("application/vnd.in-toto+json", image.to_string().as_bytes());
    let mut entry = made.manifest(&made.blob(CONFIG, b"{ }"), &[statement]);
    entry["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    entry["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": image["digest"]});
    entry
}

fn lose(made: &MadeLayout, descriptor: &Value) {
    fs::remove_file(made.blob_path(&digest(descriptor))).unwrap();
}

fn document(made: &MadeLayout, descriptor: &Value) -> Value {
    let bytes = fs::read(made.blob_path(&digest(descriptor))).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn root(reference: &str) -> (Digest, Value) {
    let read = async { open(reference).await?.root_manifest().await };
    let found = run(read).unwrap();
    (found.digest, serde_json::from_slice(&found.bytes).unwrap())
}

fn is_there(reference: &str) -> bool {
    run(async { open(reference).await?.root_manifest().await }).is_ok()
}

fn succeeds(output: &Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    told
}

/// As `docker save` has it: an index of three platforms with their attestations, and the blobs of one platform.
struct Saved {
    made: MadeLayout,
    /// amd64, arm64, s390x.
    images: [Value; 3],
    attestations: [Value; 3],
}

fn saved() -> Saved {
    let mut made = MadeLayout::new();
    let images = ["amd64", "arm64", "s390x"].map(|architecture| image(&made, architecture));
    let attestations = [0, 1, 2].map(|at| attestation(&made, &images[at]));
    // attestations stand anywhere
    let listed = [
        attestations[1].clone(),
        images[0].clone(),
        images[1].clone(),
        images[2].clone(),
        attestations[0].clone(),
        attestations[2].clone(),
    ];
    let index = made.index(&listed);
    made.tag(&index, "1");
    Saved {
        made,
        images,
        attestations,
    }
}

#[test]
fn platforms_that_are_not_there_are_left_out_and_named() {
    let registry = DockerRegistry::start();
    let Saved {
        made,
        images,
        attestations,
    } = saved();
    // of arm64 the attestation is there, of amd64 it is not
    for gone in [&images[1], &images[2], &attestations[0], &attestations[2]] {
        lose(&made, gone);
    }
    let from = made.reference("1");
    let folder = tempfile::tempdir().unwrap();
    let (old, _) = root(&from);
    for (number, to) in [
        format!("{}/app:1", registry.host),
        format!("oci:{}/layout:1", folder.path().display()),
        format!("oci-archive:{}/file.tar:1", folder.path().display()),
    ]
    .iter()
    .enumerate()
    {
        for command in ["copy", "convert"] {
            let host = Host::new();
            let small = match command {
                "convert" => &SMALL[..],
                _ => &[],
            };
            let told = host.output(&[&[command, &from, to][..], small].concat());
            let told = succeeds(&told);
            for platform in ["linux/arm64", "linux/s390x"] {
                let text = format!("the image for {platform}");
                assert!(told.contains(&text), "{command} {to}: {told}");
            }
            let (there, index) = root(to);
            let listed = index["manifests"].as_array().unwrap();
            match command {
                "copy" => {
                    assert_eq!(listed.len(), 1, "{to}: {index}");
                    assert_eq!(listed[0], images[0]);
                    // it is another index, and says so
                    assert!(told.contains(&old.to_string()), "{told}");
                    assert!(told.contains(&there.to_string()), "{told}");
                }
                _ => assert_eq!(listed.len(), 2, "{to}: the image and its SOCI index"),
            }
            let read = ["cat", to, "/etc/arch", "--platform", "linux/amd64"];
            assert_eq!(host.run(&read), "amd64", "{number}");
        }
    }
    // the one that is wanted is not there: it is named, with those that are, and nothing is written
    let host = Host::new();
    let to = format!("oci:{}/none:1", folder.path().display());
    let wanted = ["--platform", "linux/s390x"];
    for command in [
        &["cat", &from, "/etc/arch"][..],
        &["index", "create", &from],
        &["convert", &from, &to],
    ] {
        let error = host.fail(&[command, &wanted].concat(), 3);
        let hex = digest(&images[2]).hex().to_string();
        for text in [
            "the image for linux/s390x",
            &hex,
            "available platforms: linux/amd64;",
        ] {
            assert!(error.contains(text), "{command:?}: {error}");
        }
    }
    assert!(!is_there(&to));
    // all that there are is one; the others are told
    let all = [&["index", "create", &from, "--all-platforms"][..], &SMALL].concat();
    let told = succeeds(&host.output(&all));
    assert!(told.contains("the image for linux/s390x"), "{told}");
}

#[test]
fn where_no_image_is_there_nothing_is_written() {
    let Saved { made, images, .. } = saved();
    images.iter().for_each(|image| lose(&made, image));
    let from = made.reference("1");
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new();
    let registry = Registry::start();
    for to in [
        registry.reference("app:1"),
        format!("oci:{}/layout:1", folder.path().display()),
        format!("oci-archive:{}/file.tar:1", folder.path().display()),
    ] {
        for command in [
            &["copy", &from, &to][..],
            &["convert", &from, &to, "--all-platforms"],
        ] {
            let error = host.fail(command, 3);
            assert!(error.contains("linux/amd64"), "{command:?}: {error}");
            assert!(!is_there(&to), "{command:?}");
        }
    }
    assert!(registry.tags("app").is_empty());
    let error = host.fail(&["index", "create", &from, "--all-platforms"], 3);
    assert!(error.contains("linux/amd64"), "{error}");
}

#[test]
fn an_image_that_is_there_in_part_is_an_error_that_names_what_is_not() {
    for part in ["config", "layer"] {
        let Saved { made, images, .. } = saved();
        let manifest = document(&made, &images[1]);
        let gone = match part {
            "config" => &manifest["config"],
            _ => &manifest["layers"][0],
        };
        lose(&made, gone);
        let from = made.reference("1");
        let registry = Registry::start();
        let to = registry.reference("app:1");
        let host = Host::new();
        let convert = ["convert", &from, &to, "--platform", "linux/amd64"];
        for command in [&["copy", &from, &to][..], &[&convert[..], &SMALL].concat()] {
            let error = host.fail(command, 3);
            let hex = digest(gone).hex().to_string();
            for text in ["the image for linux/arm64", &hex] {
                assert!(error.contains(text), "{part} {command:?}: {error}");
            }
        }
        assert!(registry.tags("app").is_empty(), "{part}");
    }
}

#[test]
fn what_only_the_destination_has_stays_listed() {
    let registry = DockerRegistry::start();
    let Saved {
        made,
        images,
        attestations,
    } = saved();
    let from = made.reference("1");
    let to = format!("{}/app:1", registry.host);
    let host = Host::new();
    host.run(&["copy", &from, &to]);
    let whole = root(&to).0;
    for gone in images[1..].iter().chain(&attestations[1..]) {
        lose(&made, gone);
    }
    let told = succeeds(&host.output(&["copy", &from, &to]));
    assert!(!told.contains("left out"), "{told}");
    assert_eq!(root(&to).0, whole);
    // a place that has them not: by its digest nothing else can be asked for
    let by_digest = format!("{}/other@{whole}", registry.host);
    let error = host.fail(&["copy", &from, &by_digest], 2);
    assert!(error.contains("left out"), "{error}");
}

/// An index in an index of which nothing is there goes with it.
#[test]
fn an_index_of_what_is_not_there_is_left_out_too() {
    let mut made = MadeLayout::new();
    let images = ["amd64", "arm64"].map(|architecture| image(&made, architecture));
    let [amd64, arm64] = images.clone().map(|image| made.index(&[image]));
    let mixed = made.index(&images);
    let outer = made.index(&[amd64.clone(), arm64, mixed]);
    made.tag(&outer, "1");
    lose(&made, &images[1]);
    let registry = DockerRegistry::start();
    let to = format!("{}/app:1", registry.host);
    let host = Host::new();
    succeeds(&host.output(&["copy", &made.reference("1"), &to]));
    let (_, index) = root(&to);
    let listed = index["manifests"].as_array().unwrap();
    assert_eq!(listed.len(), 2, "{index}");
    assert_eq!(listed[0], amd64);
    // the mixed one lists the same as the first now
    assert_eq!(listed[1], amd64);
}

/// A foreign layer and one of ordinary data, and the layout that has them.
fn with_foreign(media_type: &str, urls: bool) -> (MadeLayout, Value, Value) {
    let mut made = MadeLayout::new();
    let tars = [tar_of(&[("w", &noise(50_000))]), tar_of(&[("f", b"file")])];
    let mut layers: Vec<Value> = tars
        .iter()
        .zip([media_type, GZIP_LAYER])
        .map(|(tar, media_type)| made.blob(media_type, &gzip(tar)))
        .collect();
    if urls {
        layers[0]["urls"] = json!(["https://foreign.example/x"]);
    }
    let ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ids}});
    let config = made.blob(CONFIG, config.to_string().as_bytes());
    let image = made.manifest(&config, &layers);
    made.tag(&image, "1");
    (made, image, layers[0].clone())
}

#[test]
fn a_foreign_layer_that_is_not_there_stays_a_descriptor() {
    for (media_type, urls) in [
        (FOREIGN_LAYER, true),
        (FOREIGN_LAYER, false),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            true,
        ),
        (GZIP_LAYER, true),
    ] {
        let (made, _, foreign) = with_foreign(media_type, urls);
        lose(&made, &foreign);
        let from = made.reference("1");
        let host = Host::new();
        let registry = Registry::start();
        for command in ["copy", "convert"] {
            let to = registry.reference(&format!("{command}:1"));
            let small = match command {
                "convert" => &SMALL[..],
                _ => &[],
            };
            let told = host.output(&[&[command, &from, &to][..], small].concat());
            let told = succeeds(&told);
            assert!(told.contains(&digest(&foreign).hex().to_string()), "{told}");
            let (_, mut there) = root(&to);
            if command == "convert" {
                let image = digest(&there["manifests"][0]);
                let read = async { open(&to).await?.manifest(&image).await };
                there = serde_json::from_slice(&run(read).unwrap().bytes).unwrap();
            }
            assert_eq!(there["layers"][0], foreign, "{command}");
            assert_eq!(host.run(&["cat", &to, "/f"]), "file");
        }
        let report = create(&host, &from, &[]);
        let skipped = report["layers"][0]["skipped"].as_str().unwrap();
        assert!(skipped.contains("foreign layer"), "{skipped}");
        // what needs it says what it is
        let error = host.fail(&["cat", &from, "/w"], 3);
        assert!(error.contains("a foreign layer"), "{error}");
    }
    // one that is there is a layer like others
    let (made, _, _) = with_foreign(FOREIGN_LAYER, true);
    let host = Host::new();
    let report = create(&host, &made.reference("1"), &[]);
    assert!(report["layers"][0]["ztoc"].is_string(), "{report}");
}

/// An index needs no layer that it says nothing of. A layout may stay as incomplete as it was; what a registry has is there for others.
#[test]
fn small_layers_that_are_not_there_hinder_no_index() {
    let mut made = MadeLayout::new();
    let tars = [tar_of(&[("s", b"small")]), tar_of(&[("f", &noise(50_000))])];
    let image = made.image("amd64", &tars.map(|tar| (GZIP_LAYER, tar)));
    made.tag(&image, "1");
    let small = document(&made, &image)["layers"][0].clone();
    lose(&made, &small);
    let hex = digest(&small).hex().to_string();
    let from = made.reference("1");
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let host = Host::new();
    let least = ["--min-layer-size", "10000"];
    host.run(&[&["index", "create", &from][..], &least].concat());
    for to in ["layout", "file.tar"] {
        let kind = match to {
            "layout" => "oci",
            _ => "oci-archive",
        };
        let to = format!("{kind}:{}/{to}:1", folder.path().display());
        let told = succeeds(&host.output(&[&["convert", &from, &to][..], &least].concat()));
        assert!(told.contains(&hex), "{told}");
        assert!(is_there(&to));
    }
    let to = registry.reference("app:1");
    let error = host.fail(&[&["convert", &from, &to][..], &least].concat(), 3);
    assert!(error.contains(&hex), "{error}");
    assert!(registry.tags("app").is_empty());
}

#[test]
fn a_layer_of_no_bytes_is_an_empty_layer() {
    let tar = tar_of(&[("f", b"file")]);
    let tars = [gzip(&tar), Vec::new(), gzip(b"")];
    let ids = [Digest::of(&tar), Digest::of(b""), Digest::of(b"")];
    let registry = DockerRegistry::start();
    for (number, media_type) in [
        GZIP_LAYER,
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+zstd",
    ]
    .into_iter()
    .enumerate()
    {
        let mut made = MadeLayout::new();
        let mut layers: Vec<Value> = tars
            .iter()
            .map(|blob| made.blob(GZIP_LAYER, blob))
            .collect();
        layers[1]["mediaType"] = json!(media_type);
        let config = json!({"architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = made.blob(CONFIG, config.to_string().as_bytes());
        let image = made.manifest(&config, &layers);
        made.tag(&image, "1");
        let folder = tempfile::tempdir().unwrap();
        let host = Host::new();
        for to in [
            format!("{}/app:{number}", registry.host),
            format!("oci:{}/layout:1", folder.path().display()),
            format!("oci-archive:{}/file.tar:1", folder.path().display()),
        ] {
            for command in ["copy", "convert"] {
                let make = ["--compact", "--min-layer-size", "0"];
                let make = match command {
                    "convert" => &make[..],
                    _ => &[],
                };
                let told = host.output(&[&[command, &made.reference("1"), &to][..], make].concat());
                let told = succeeds(&told);
                assert!(!told.contains("WARN"), "{command} {to}: {told}");
                assert_eq!(host.run(&["cat", &to, "/f"]), "file", "{command} {to}");
            }
        }
        let report = create(&Host::new(), &made.reference("1"), &["--force"]);
        assert_eq!(report["layers"][1]["skipped"], "empty layer", "{report}");
    }
    // one that is only said to be empty
    let mut made = MadeLayout::new();
    let mut layer = made.blob(GZIP_LAYER, &tars[0]);
    layer["size"] = json!(0);
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar)]}});
    let config = made.blob(CONFIG, config.to_string().as_bytes());
    let image = made.manifest(&config, &[layer]);
    made.tag(&image, "1");
    let create = ["index", "create", &made.reference("1")];
    let error = Host::new().fail(&[&create[..], &SMALL].concat(), 7);
    assert!(error.contains("its size is 0"), "{error}");
}

#[test]
fn a_diff_id_that_the_layer_does_not_have_is_told() {
    let tar = tar_of(&[("f", b"file")]);
    let mut made = MadeLayout::new();
    let layers = [made.blob(GZIP_LAYER, &gzip(&tar))];
    let other = Digest::of(b"another layer");
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [other]}});
    let config = made.blob(CONFIG, config.to_string().as_bytes());
    let image = made.manifest(&config, &layers);
    made.tag(&image, "1");
    let folder = tempfile::tempdir().unwrap();
    let to = format!("oci:{}:1", folder.path().display());
    let from = made.reference("1");
    let host = Host::new();
    for command in [
        &["index", "create", &from][..],
        &["convert", &from, &to, "--force"],
    ] {
        let told = succeeds(&host.output(&[command, &SMALL].concat()));
        for digest in [other, Digest::of(&tar), digest(&layers[0])] {
            assert!(
                told.contains(digest.hex().to_string().as_str()),
                "{command:?}: {told}"
            );
        }
    }
    // one that is right is nothing to tell
    let right = made.image("amd64", &[(GZIP_LAYER, tar)]);
    made.tag(&right, "right");
    let right = made.reference("right");
    let told = host.output(&[&["index", "create", &right, "--force"][..], &SMALL].concat());
    assert!(!succeeds(&told).contains("diff ID"));
    let report = json_of(&host, &[&["index", "create", &right][..], &SMALL].concat());
    assert_eq!(report["warnings"], json!([]));
}
