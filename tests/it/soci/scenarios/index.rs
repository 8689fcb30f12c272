//! The `index` and `ztoc` suites.

use std::{fs, os::unix::fs::PermissionsExt as _};

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::super::{
    commands::{SMALL, create, json_of},
    make::{GZIP_LAYER, MadeLayout, digest, tar_of},
};
use crate::{
    engine::Host,
    support::{registry::Registry, seeded_noise, tars::Layer},
    vectors::{Vectors, list, sha256, text},
};

/// Two images that have their lower layer in common, `one:1` and `two:1`.
fn two(registry: &Registry) -> [String; 2] {
    let shared = tar_of(&[("shared", &seeded_noise(200_000, 1))]);
    [("one", 2), ("two", 3)].map(|(name, seed)| {
        let mut made = MadeLayout::new();
        let own = tar_of(&[(name, &seeded_noise(100_000, seed))]);
        let image = made.image("amd64", &[(GZIP_LAYER, shared.clone()), (GZIP_LAYER, own)]);
        made.tag(&image, "1");
        registry.add_layout(name, made.path()).unwrap();
        registry.reference(&format!("{name}:1"))
    })
}

fn blobs(host: &Host) -> usize {
    let blobs = fs::read_dir(host.root().join("content/blobs/sha256"));
    blobs.unwrap().count()
}

/// index: "list filters", "rm by digest/ref", "orphan zTOC collection", "shared layers survive"; ztoc: "list filters".
#[test]
fn the_indexes_of_two_images_are_told_apart_and_removed_apart() {
    let registry = Registry::start();
    let images = two(&registry);
    let [one, two] = &images;
    let host = Host::new();
    let reports = images.clone().map(|image| create(&host, &image, &[]));
    let index = |at: usize| reports[at]["index"].as_str().unwrap();
    let ztoc = |at: usize, layer: usize| reports[at]["layers"][layer]["ztoc"].as_str().unwrap();
    assert_eq!(ztoc(0, 0), ztoc(1, 0), "the shared layer's");
    assert_ne!(ztoc(0, 1), ztoc(1, 1));
    let stored = blobs(&host);
    assert_eq!(
        stored, 6,
        "two indexes, three zTOCs and the empty configuration"
    );

    let listed = |command: &[&str]| -> Vec<String> {
        let text = host.run(&[command, &["--quiet"]].concat());
        text.lines().map(str::to_owned).collect()
    };
    let indexes = |filter: &[&str]| listed(&[&["index", "list"], filter].concat());
    assert_eq!(indexes(&[]), [index(0), index(1)]);
    assert_eq!(indexes(&["--ref", one]), [index(0)]);
    assert_eq!(
        indexes(&["--ref", two, "--platform", "linux/amd64"]),
        [index(1)]
    );
    assert_eq!(indexes(&["--ref", two, "-p", "linux/arm64"]), [""; 0]);
    assert_eq!(
        indexes(&["-p", "linux/arm64", "-p", "linux/amd64"]),
        [index(0), index(1)]
    );
    assert_eq!(indexes(&["--ref", &registry.reference("one:2")]), [""; 0]);
    host.fail(&["index", "list", "--ref", "UPPER"], 2);
    host.fail(&["index", "list", "--platform", "/"], 2);
    let ztocs = |filter: &[&str]| listed(&[&["ztoc", "list"], filter].concat());
    let sorted = |mut digests: Vec<&str>| -> Vec<String> {
        digests.sort_unstable();
        digests.into_iter().map(str::to_owned).collect()
    };
    assert_eq!(ztocs(&[]), sorted(vec![ztoc(0, 0), ztoc(0, 1), ztoc(1, 1)]));
    assert_eq!(
        ztocs(&["--image-ref", two]),
        sorted(vec![ztoc(1, 0), ztoc(1, 1)])
    );
    assert_eq!(ztocs(&["--ztoc-digest", ztoc(0, 1)]), [ztoc(0, 1)]);
    assert_eq!(
        ztocs(&["--ztoc-digest", ztoc(0, 0), "--image-ref", two]),
        [ztoc(0, 0)]
    );
    assert_eq!(
        ztocs(&["--ztoc-digest", ztoc(0, 1), "--image-ref", two]),
        [""; 0]
    );
    assert_eq!(ztocs(&["--ztoc-digest", index(0)]), [""; 0]);
    host.fail(&["ztoc", "list", "--ztoc-digest", "sha256:12"], 2);

    // what makes no sense removes nothing
    let nobody = Digest::of(b"nobody").to_string();
    host.fail(&["index", "rm"], 2);
    host.fail(&["index", "rm", index(0), "--ref", one], 2);
    host.fail(&["index", "rm", "sha256:12"], 2);
    host.fail(&["index", "rm", &nobody], 3);
    host.fail(&["index", "rm", ztoc(0, 1)], 3);
    host.fail(&["index", "rm", "--ref", &registry.reference("one:2")], 3);
    assert_eq!(indexes(&[]), [index(0), index(1)]);
    assert_eq!(blobs(&host), stored);

    host.run(&["index", "rm", index(0)]);
    assert_eq!(indexes(&[]), [index(1)]);
    assert_eq!(ztocs(&[]), sorted(vec![ztoc(1, 0), ztoc(1, 1)]));
    assert_eq!(blobs(&host), stored - 2, "its own zTOC is gone with it");
    host.fail(&["index", "info", index(0)], 3);
    host.fail(&["ztoc", "info", ztoc(0, 1)], 3);
    host.run(&["index", "info", index(1)]);
    let output = host.output(&["ztoc", "get-file", ztoc(1, 0), "shared"]);
    assert!(output.stdout == seeded_noise(200_000, 1));
    let output = host.output(&["cat", two, "/shared", "--require-index"]);
    assert!(output.stdout == seeded_noise(200_000, 1));
    host.fail(&["cat", one, "/shared", "--require-index"], 3);

    // both, one by its digest and the other by its image
    create(&host, one, &[]);
    host.run(&["index", "remove", "--ref", two]);
    assert_eq!(indexes(&[]), [index(0)]);
    create(&host, two, &[]);
    host.run(&["index", "rm", index(0), index(1)]);
    assert_eq!((indexes(&[]), ztocs(&[])), (vec![], vec![]));
    assert_eq!(blobs(&host), 0);
}

/// ztoc: "get-file to stdout, -o, errors".
#[test]
fn a_file_of_a_layer_comes_out_whole_or_the_reason_is_said() {
    let big = seeded_noise(700_000, 4);
    let made = MadeLayout::of(vec![
        Layer::new()
            .directory("dir", 0o755)
            .file("dir/big", &big)
            .file("empty", b"")
            .file("implied/small", b"small")
            .hardlink("hard", "dir/big")
            .symlink("soft", "dir/big"),
    ]);
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app");
    let host = Host::new();
    let report = create(&host, &image, &[]);
    let ztoc = report["layers"][0]["ztoc"].as_str().unwrap();
    let folder = host.mountpoint("out");
    let out = folder.join("file");
    let out = out.to_str().unwrap();
    for (path, content) in [
        ("dir/big", &big[..]),
        ("/dir/../dir//big", &big),
        ("hard", &big),
        ("empty", b""),
        ("./implied/small", b"small"),
    ] {
        let output = host.output(&["ztoc", "get-file", ztoc, path]);
        assert!(
            output.status.success() && output.stdout == content,
            "{path}"
        );
        // what is there already is replaced
        host.run(&["ztoc", "get-file", ztoc, path, "-o", out]);
        assert!(fs::read(out).unwrap() == content, "{path}");
        host.run(&["ztoc", "get-file", ztoc, path, "-o", out, "--at", &image]);
    }
    assert_eq!(fs::metadata(out).unwrap().permissions().mode() & 0o111, 0);

    fs::write(out, "as it was").unwrap();
    for (path, status, words) in [
        ("dir", 2, "/dir is a directory"),
        ("implied", 2, "/implied is a directory"),
        ("soft", 2, "/soft is a symbolic link"),
        ("dir/no", 3, "has no dir/no"),
        ("dir/big/no", 3, "has no"),
        ("", 3, "has no"),
    ] {
        let error = host.fail(&["ztoc", "get-file", ztoc, path, "-o", out], status);
        assert!(error.contains(words), "{path}: {error}");
    }
    let nowhere = folder.join("no/file");
    let to_nowhere = ["-o", nowhere.to_str().unwrap()];
    let get = ["ztoc", "get-file", ztoc, "empty"];
    let error = host.fail(&[&get[..], &to_nowhere].concat(), 1);
    assert!(error.contains("writing the file"), "{error}");
    // a zTOC that is none, or of nobody
    host.fail(
        &[
            "ztoc",
            "get-file",
            report["index"].as_str().unwrap(),
            "empty",
        ],
        3,
    );
    host.fail(&["ztoc", "get-file", "sha256:12", "empty"], 2);
    // the layer is gone
    let layer: Digest = report["layers"][0]["layer"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    registry.remove("app", &layer);
    let error = host.fail(&["ztoc", "get-file", ztoc, "dir/big", "-o", out], 3);
    assert!(error.contains(&layer.hex()), "{error}");
    assert_eq!(fs::read_to_string(out).unwrap(), "as it was");
}

/// ztoc: "eStargz layers".
#[test]
fn files_of_an_estargz_layer_come_out_by_its_ztoc() {
    let vectors = Vectors::open();
    let vector = vectors.layer("gz-estargz-like");
    let mut made = MadeLayout::new();
    let layer = made.blob(GZIP_LAYER, &vector.blob());
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [vector.case["diff_id"]]}});
    let config = made.blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let image = made.manifest(&config, std::slice::from_ref(&layer));
    made.tag(&image, "1");
    let host = Host::new();
    let from = made.reference("1");
    let arguments = [&["index", "create", &from], &SMALL[..]].concat();
    let report = json_of(&host, &arguments);
    let ztoc = report["layers"][0]["ztoc"].as_str().unwrap();
    assert_eq!(report["layers"][0]["layer"], json!(digest(&layer)));
    let info: Value =
        serde_json::from_str(&host.run(&["ztoc", "info", ztoc, "--at", &from])).unwrap();
    let expected = vector.expected().unwrap();
    let expected = list(&expected["entries"]);
    assert_eq!(info["num_files"], expected.len());
    let mut read = 0;
    for entry in expected {
        let Some(digest) = entry["sha256"].as_str() else {
            continue;
        };
        let name = text(&entry["name"]);
        let output = host.output(&["ztoc", "get-file", ztoc, name, "--at", &from]);
        assert_eq!(sha256(&output.stdout), digest, "{name}");
        read += 1;
    }
    assert!(read >= 3, "{read} files with content");
}
