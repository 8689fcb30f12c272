//! The `create` suite, and what `prefetch` shows of it.

use std::fs;

use serde_json::{Value, json};
use socinbd::{oci::Digest, soci::index::PREFETCH_TYPE};

use super::{
    super::{
        commands::{SMALL, create, json_of, multi},
        make::{MadeLayout, digest},
    },
    digest_of, layers, manifest,
};
use crate::{
    engine::Host,
    support::{registry::Registry, seeded_noise, tars::Layer},
};

/// create: "parameter validation (negative, overflow)".
#[test]
fn numbers_that_make_no_sense_are_refused_and_nothing_is_asked_for() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let out = host.mountpoint("out");
    let to = format!("oci:{}/new:1", out.display());
    for command in [&["index", "create", &image][..], &["convert", &image, &to]] {
        for wrong in [
            "--span-size=0",
            "--span-size=-1",
            "--span-size=9223372036854775808", // 2^63
            "--span-size=18446744073709551616",
            "--span-size=4MiB",
            "--span-size=",
            "--min-layer-size=-1",
            "--min-layer-size=9223372036854775808",
            "--min-layer-size=18446744073709551616",
            "--min-layer-size=1.5",
            "--max-concurrent-uploads=0",
            "--max-concurrent-uploads=-1",
            "--max-concurrent-uploads=257",
            "--optimizations=speed",
            "--prefetch-files-json=/nonexistent",
            "--compact-span-size=0",
            "--compact-span-size=-1",
            "--compact-span-size=9223372036854775808",
        ] {
            let (flag, value) = wrong.split_once('=').unwrap();
            let error = host.fail(&[command, &["--compact", wrong]].concat(), 2);
            let named = match flag {
                "--prefetch-files-json" => value,
                flag => flag,
            };
            assert!(error.contains(named), "{command:?} {wrong}: {error}");
        }
    }
    assert_eq!(registry.counters().log.len(), 0, "nothing is asked for");
    assert!(!host.root().join("content").exists());
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);

    // what is just possible
    let most = i64::MAX.to_string();
    let options = ["--platform", "linux/amd64"];
    let error = host.fail(
        &[
            &["index", "create", &image, "--min-layer-size", &most][..],
            &options,
        ]
        .concat(),
        8,
    );
    assert!(error.contains("every layer was skipped"), "{error}");
    let whole = ["--min-layer-size", "0", "--span-size", &most];
    let report = json_of(
        &host,
        &[&["index", "create", &image][..], &whole, &options].concat(),
    );
    for layer in report["layers"].as_array().unwrap() {
        let ztoc = layer["ztoc"].as_str().unwrap();
        let info: Value = serde_json::from_str(&host.run(&["ztoc", "info", ztoc])).unwrap();
        assert_eq!(info["num_spans"], 1, "{info}");
        assert_eq!(info["span_size"], json!(i64::MAX));
    }
}

/// create: "sparse at 0, 1 MB, 10 MB".
#[test]
fn layers_of_the_smallest_size_and_more_have_a_ztoc() {
    let contents: Vec<Vec<u8>> = [300_000, 2_000_000, 11_000_000]
        .iter()
        .enumerate()
        .map(|(number, size)| seeded_noise(*size, number as u64))
        .collect();
    let made = MadeLayout::of(
        contents
            .iter()
            .enumerate()
            .map(|(number, content)| {
                Layer::new()
                    .file(&format!("large{number}"), content)
                    .file(&format!("small{number}"), &content[..1000])
            })
            .collect(),
    );
    let registry = Registry::start();
    let host = Host::new();
    let image = digest_of(&made.reference(""));
    let layers = layers(&manifest(&made.reference(""), &image));
    let middle = layers[1].1;
    for (least, has_ztoc) in [
        (0, [true, true, true]),
        (1 << 20, [false, true, true]),
        (10 << 20, [false, false, true]),
        (middle, [false, true, true]),
        (middle + 1, [false, false, true]),
    ] {
        let repository = format!("app{least}");
        registry.add_layout(&repository, made.path()).unwrap();
        let image = registry.reference(&repository);
        let least = least.to_string();
        let options = ["--min-layer-size", &least, "--span-size", "65536", "--push"];
        let report = json_of(
            &host,
            &[&["index", "create", &image][..], &options].concat(),
        );
        let index: Digest = report["index"].as_str().unwrap().parse().unwrap();
        let index = manifest(&image, &index);
        let indexed: Vec<Digest> = index["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|ztoc| {
                let layer = &ztoc["annotations"]["com.amazon.soci.image-layer-digest"];
                layer.as_str().unwrap().parse().unwrap()
            })
            .collect();
        let expected: Vec<Digest> = layers
            .iter()
            .zip(has_ztoc)
            .filter(|(_, has)| *has)
            .map(|((layer, _), _)| *layer)
            .collect();
        assert_eq!(indexed, expected, "at least {least}");
        // one that has a zTOC is read by a span, one that has none as a whole
        for (number, ((layer, size), has)) in layers.iter().zip(has_ztoc).enumerate() {
            registry.reset_counters();
            let output = Host::new().output(&["cat", &image, &format!("/small{number}")]);
            assert!(output.stdout == contents[number][..1000], "{least}");
            let sent = registry.counters().blob(layer).bytes;
            match has {
                true => assert!(sent < 200_000, "{least}: {sent} of layer {number}"),
                false => assert_eq!(sent, *size, "{least}: layer {number}"),
            }
        }
    }
}

/// create: "both stores and platforms".
#[test]
fn every_store_gets_the_same_index_of_each_platform() {
    let (made, images) = multi();
    let packed = made.packed("");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let remote = registry.reference("app:1");
    let archive = format!("oci-archive:{}:1", packed.path().display());
    let folder = made.reference("1");
    let mut expected = None;
    for (image, options, is_local) in [
        (&remote, &[][..], true),
        (&archive, &[], true),
        (&folder, &[], false),
        (&remote, &["--push"], false),
    ] {
        let host = Host::new();
        let platforms = ["--platform", "linux/arm64", "--platform", "linux/amd64"];
        let reports = create(&host, image, &[&platforms, options].concat());
        let reports = reports.as_array().unwrap();
        let made: Vec<&Value> = reports.iter().map(|report| &report["index"]).collect();
        for (report, (image, platform)) in reports
            .iter()
            .zip(images.iter().zip(["linux/amd64", "linux/arm64"]))
        {
            assert_eq!(report["image"], json!(image));
            assert_eq!(report["platform"], platform);
        }
        assert_ne!(made[0], made[1]);
        let expected = expected.get_or_insert_with(|| json!(made));
        assert_eq!(json!(made), *expected, "{image} {options:?}");
        // it is there, and nowhere else
        let here = json_of(&host, &["index", "list"]);
        let there = json_of(&host, &["index", "list", image]);
        let digests = |list: &Value| -> Vec<Value> {
            let list = list.as_array().unwrap().iter();
            list.map(|index| index["digest"].clone()).collect()
        };
        match is_local {
            true => assert_eq!((json!(digests(&here)), there), (json!(made), json!([]))),
            false => assert_eq!((here, json!(digests(&there))), (json!([]), json!(made))),
        }
    }
    // one alone
    let host = Host::new();
    let report = create(&host, &archive, &["--platform", "linux/arm64"]);
    assert_eq!(report["index"], expected.unwrap()[1]);
    let list = json_of(&host, &["index", "list"]);
    assert_eq!(list.as_array().unwrap().len(), 1);
    host.fail(
        &[
            &["index", "create", &archive, "--platform", "linux/s390x"][..],
            &SMALL,
        ]
        .concat(),
        3,
    );
}

/// create: "prefetch relative/absolute paths"; prefetch: "list", "info".
#[test]
fn however_a_file_to_prefetch_is_named_its_spans_are_listed() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let amd64 = ["--platform", "linux/amd64"];
    let make = |options: &[&str]| create(&host, &image, &[&amd64, options].concat());
    let plain = make(&[]);
    assert_eq!(json_of(&host, &["prefetch", "list"]), json!([]));
    let ztoc = plain["layers"][1]["ztoc"].as_str().unwrap();
    let info: Value = serde_json::from_str(&host.run(&["ztoc", "info", ztoc])).unwrap();
    let span = |file: usize, end: &str| info["files"][file][end].as_u64().unwrap();
    assert_eq!(info["files"][1]["filename"], "data/big");
    let (first, last) = (span(1, "start_span"), span(1, "end_span"));
    assert!(last > first + 9, "{info}");

    let listed = make(&["--prefetch-file", "/data/big"])["index"].clone();
    assert_ne!(listed, plain["index"]);
    for name in [
        "data/big",
        "./data/big",
        "//data/./big",
        "etc/../data/big",
        "../data/big",
    ] {
        assert_eq!(make(&["--prefetch-file", name])["index"], listed, "{name}");
    }
    // the same by a list, whose own path is absolute or not
    let folder = host.mountpoint("lists");
    fs::write(folder.join("list.json"), r#"["data/big"]"#).unwrap();
    let absolute = folder.join("list.json");
    for list in [absolute.to_str().unwrap(), "list.json", "./list.json"] {
        let output = host
            .command(&["--json", "index", "create", &image])
            .args(SMALL)
            .args(amd64)
            .args(["--prefetch-files-json", list])
            .current_dir(&folder)
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        assert_eq!(report["index"], listed, "{list}");
    }
    for wrong in [r#"{"a": 1}"#, r#"["a", 1]"#, "data/big", ""] {
        fs::write(&absolute, wrong).unwrap();
        let list = ["--prefetch-files-json", absolute.to_str().unwrap()];
        let error = host.fail(&[&["index", "create", &image][..], &list].concat(), 2);
        assert!(error.contains("a JSON array of paths"), "{wrong}: {error}");
    }

    let artifacts = json_of(&host, &["prefetch", "list"]);
    let artifacts = artifacts.as_array().unwrap();
    assert_eq!(artifacts.len(), 1, "equal ones are stored once");
    assert_eq!(artifacts[0]["layer"], plain["layers"][1]["layer"]);
    assert_eq!(artifacts[0]["index"], listed);
    let artifact = artifacts[0]["digest"].as_str().unwrap();
    let shown = json_of(&host, &["prefetch", "info", artifact]);
    assert_eq!(
        shown["spans"],
        json!([{"start_span": first, "end_span": last}])
    );
    assert_eq!(shown["layer"], artifacts[0]["layer"]);
    assert_eq!(
        host.run(&["prefetch", "ls", "--quiet"]),
        format!("{artifact}\n")
    );
    host.fail(&["prefetch", "info", ztoc], 3);

    // files side by side are one run; what is a directory has no spans, and what is nowhere is told
    let report = make(&[
        "--prefetch-file",
        "data/big",
        "--prefetch-file",
        "etc/os-release",
        "--prefetch-file",
        "/no/such",
    ]);
    assert_eq!(report["warnings"].as_array().unwrap().len(), 1, "{report}");
    assert!(report["warnings"][0].as_str().unwrap().contains("/no/such"));
    let index = manifest_in(&host, &report["index"]);
    let artifacts: Vec<&Value> = index["layers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|blob| blob["mediaType"] == PREFETCH_TYPE)
        .collect();
    assert_eq!(artifacts.len(), 1, "{index}");
    let shown = json_of(
        &host,
        &["prefetch", "info", &digest(artifacts[0]).to_string()],
    );
    assert_eq!(shown["spans"], json!([{"start_span": 0, "end_span": last}]));
}

fn manifest_in(host: &Host, index: &Value) -> Value {
    let index = index.as_str().unwrap();
    serde_json::from_str(&host.run(&["index", "info", index])).unwrap()
}
