//! Commands on whole images: copied, converted, described. A SOCI index goes with its image.

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::{
    commands::{SMALL, create, json_of, multi},
    make::{GZIP_LAYER, MANIFEST, MadeLayout, tar_of},
};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Fault, Kind, On, Referrers, Registry, Times},
        succeeds,
    },
};

/// A wrong name is told before anything is made for it.
#[test]
fn a_source_that_is_not_there_leaves_nothing() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
    let places = [
        format!("oci:{}/layout:1", folder.path().display()),
        format!("oci-archive:{}/file.tar:1", folder.path().display()),
    ];
    for from in [registry.reference("app:none"), made.reference("none")] {
        for to in &places {
            for command in ["copy", "convert"] {
                let error = host.fail(&[command, &from, to], 3);
                assert!(error.contains("none"), "{command}: {error}");
                let left = std::fs::read_dir(folder.path()).unwrap().count();
                assert_eq!(left, 0, "{command} {from} {to}");
            }
        }
    }
}

/// A signature of a manifest, in a registry.
fn sign(registry: &Registry, repository: &str, subject: Digest, size: usize) -> Digest {
    registry.add_blob(repository, &b"{}"[..]);
    let signature = json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.cncf.notary.signature",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}"), "size": 2}, "layers": [],
        "subject": {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": subject, "size": size}});
    registry.add_manifest(repository, None, MANIFEST, signature.to_string())
}

/// A signature by cosign's older form, under its tag.
fn cosign(registry: &Registry, subject: Digest, note: &str) -> (String, Digest) {
    registry.add_blob("app", &b"{}"[..]);
    let empty = json!({"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": Digest::of(b"{}"), "size": 2});
    let config = json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(b"{}"), "size": 2});
    let signature = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [empty], "annotations": {"note": note}});
    let tag = format!("sha256-{}.sig", subject.hex());
    let digest = registry.add_manifest("app", Some(&tag), MANIFEST, signature.to_string());
    (tag, digest)
}

/// Signatures of several people stand in one manifest, and the destination may have more of them than the source.
#[test]
fn signatures_that_the_destination_has_stay() {
    let (made, _) = multi();
    let (from, to) = (Registry::start(), Registry::start());
    for registry in [&from, &to] {
        registry.add_layout("app", made.path()).unwrap();
    }
    let root = from.tags("app")["1"];
    let host = Host::new();
    let arguments = ["--referrers", "*"];
    let (tag, ours) = cosign(&from, root, "ours");
    let copy = |to: &str| {
        json_of(
            &host,
            &[&["copy", &from.reference("app:1"), to][..], &arguments].concat(),
        )
    };
    let report = copy(&to.reference("app:1"));
    assert_eq!(report["referrers"][0]["digest"], json!(ours), "{report}");
    let (_, theirs) = cosign(&to, root, "theirs");
    let report = copy(&to.reference("app:1"));
    assert_eq!(report["left"][0]["digest"], json!(ours), "{report}");
    assert_eq!(to.tags("app")[&tag], theirs);
}

#[test]
fn an_image_moves_with_its_index_and_what_was_chosen() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let root = registry.tags("app")["1"];
    let signature = sign(&registry, "app", root, 500);
    let host = Host::new();
    let v1 = registry.reference("app:1");
    let v2 = registry.reference("soci/app:1");
    let made_v1 = create(&host, &v1, &["--platform", "linux/amd64", "--push"]);
    host.run(&[&["convert", &v1, &v2, "--all-platforms"][..], &SMALL].concat());
    let without = Registry::start();
    without.set_referrers(Referrers::Absent);
    let debian = DockerRegistry::start();
    let folder = tempfile::tempdir().unwrap();
    for (number, place) in [
        registry.reference("copies"),
        without.reference("copies"),
        format!("{}/copies", debian.host),
        format!("oci:{}/layout", folder.path().display()),
        format!("oci-archive:{}/file.tar", folder.path().display()),
    ]
    .iter()
    .enumerate()
    {
        let to = format!("{place}:one");
        let report = json_of(&host, &["copy", &v1, &to]);
        assert_eq!(report["digest"], json!(root), "{place}");
        assert_eq!(
            report["referrers"][0]["digest"], made_v1["index"],
            "{place}"
        );
        assert_eq!(report["left"][0]["digest"], json!(signature), "{place}");
        if number == 0 {
            assert!(
                report["blobs"]["mounted"].as_u64().unwrap() >= 5,
                "{report}"
            );
            // no layer, that is: an index's own small blobs are
            assert!(
                report["blobs"]["uploaded"].as_u64().unwrap() <= 3,
                "{report}"
            );
        }
        let found = json_of(&Host::new(), &["inspect", &to, "--platform", "linux/amd64"]);
        assert_eq!(found["index"]["digest"], made_v1["index"], "{place}");
        assert_eq!(
            Host::new().run(&["cat", &to, "etc/os-release", "--platform", "linux/amd64"]),
            "amd64"
        );
        let report = json_of(
            &host,
            &["copy", &v1, &to, "--referrers", "application/vnd.cncf.*"],
        );
        assert_eq!(report["referrers"].as_array().unwrap().len(), 2, "{place}");
        assert_eq!(report["left"], json!([]), "{place}");
        let found = json_of(&Host::new(), &["inspect", &to]);
        let referrers = found["described"]["referrers"].to_string();
        assert!(
            referrers.contains("a Notary Project signature"),
            "{place}: {referrers}"
        );

        let to = format!("{place}:two");
        host.run(&["copy", &v2, &to]);
        for platform in ["linux/amd64", "linux/arm64"] {
            let found = json_of(&Host::new(), &["inspect", &to, "--platform", platform]);
            assert_eq!(found["index"]["version"], 2, "{place}");
        }
    }
}

/// What copies that know nothing of SOCI make: skopeo with all platforms keeps a v2 index, and loses a v1.
#[test]
fn what_skopeo_copied_is_lazy_or_is_told() {
    let (made, _) = multi();
    let (from, to) = (DockerRegistry::start(), DockerRegistry::start());
    let host = Host::new();
    let image = format!("{}/app:1", from.host);
    host.run(
        &[
            &["convert", &made.reference("1"), &image, "--all-platforms"][..],
            &SMALL,
        ]
        .concat(),
    );
    let copied = format!("{}/app:1", to.host);
    let policy = host.mountpoint("policy").join("policy.json");
    std::fs::write(
        &policy,
        r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
    )
    .unwrap();
    let skopeo = |arguments: &[&str]| {
        succeeds(
            std::process::Command::new("skopeo")
                .arg("--policy")
                .arg(&policy)
                .arg("copy")
                .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
                .args(arguments)
                .args([format!("docker://{image}"), format!("docker://{copied}")]),
        );
    };
    skopeo(&["--all"]);
    let found = json_of(
        &Host::new(),
        &["inspect", &copied, "--platform", "linux/amd64"],
    );
    assert_eq!(found["index"]["version"], 2);
    assert_eq!(found["described"]["warnings"], json!([]));
    // one platform alone: the image manifest names an index that stayed behind
    let to = DockerRegistry::start();
    let copied = format!("{}/app:1", to.host);
    let output = std::process::Command::new("skopeo")
        .arg("--policy")
        .arg(&policy)
        .args([
            "copy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            "--override-arch",
            "amd64",
        ])
        .args([format!("docker://{image}"), format!("docker://{copied}")])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let found = json_of(&Host::new(), &["inspect", &copied]);
    assert_eq!(found["index"], Value::Null);
    let warnings = found["warnings"].to_string();
    assert!(warnings.contains("which is missing here"), "{warnings}");
    let error = Host::new().fail(&["cat", &copied, "etc/os-release", "--require-index"], 3);
    assert!(error.contains("a SOCI index is required"), "{error}");
    assert_eq!(
        Host::new().run(&["cat", &copied, "etc/os-release"]),
        "amd64"
    );
}

#[test]
fn any_reference_is_described() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let root = registry.tags("app")["1"];
    let signature = sign(&registry, "app", root, 500);
    let host = Host::new();
    let index = create(
        &host,
        &registry.reference("app:1"),
        &["--platform", "linux/amd64", "--push"],
    );
    let chart = json!({"schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": Digest::of(b"{}"), "size": 2}, "layers": []});
    registry.add_manifest("app", Some("chart"), MANIFEST, chart.to_string());

    let described = json_of(&host, &["inspect", &registry.reference("app:1")])["described"].clone();
    assert_eq!(described["what"], "an image index");
    assert_eq!(described["entries"][1]["platform"], "linux/arm64");
    let referrers = described["referrers"].as_array().unwrap();
    let by_type: Vec<&str> = referrers
        .iter()
        .map(|one| one["artifact_type"].as_str().unwrap())
        .collect();
    assert!(by_type.is_sorted(), "{by_type:?}");
    assert_eq!(referrers.len(), 2);
    for (reference, what, words) in [
        (
            format!("app@{signature}"),
            "a Notary Project signature",
            root.to_string(),
        ),
        (
            format!("app@{}", index["index"].as_str().unwrap()),
            "a SOCI index (v1)",
            images[0].to_string(),
        ),
        (
            "app:chart".to_owned(),
            "a Helm chart",
            "application/vnd.cncf.helm.config.v1+json".to_owned(),
        ),
    ] {
        let reference = registry.reference(&reference);
        let text = host.run(&["inspect", &reference]);
        assert!(text.contains(what) && text.contains(&words), "{text}");
        // and is not attached
        let error = host.fail(&["cat", &reference, "/x"], 8);
        assert!(error.contains(what), "{error}");
    }
}

/// convert: "convert+push matrix", a whole repository, resumed.
#[test]
fn a_repository_is_converted_tag_by_tag_and_again_for_nothing() {
    let registry = Registry::start();
    for (tag, content) in [("v1", "one"), ("v2", "two"), ("latest", "two")] {
        let mut made = MadeLayout::new();
        let image = made.image(
            "amd64",
            &[(
                GZIP_LAYER,
                tar_of(&[("f", content.as_bytes()), ("g", &noise(50_000))]),
            )],
        );
        made.tag(&image, tag);
        registry.add_layout("app", made.path()).unwrap();
    }
    let host = Host::new();
    let from = registry.reference("app");
    let arguments = [
        &["convert", &from, &from, "--tags", "v*"][..],
        &SMALL,
        &["--platform", "linux/amd64"],
    ]
    .concat();
    // broken off after the first
    registry.fail(
        On::Kind(Kind::Upload),
        Fault::Delay(std::time::Duration::ZERO),
        Times::Next(4),
    );
    registry.fail(On::Kind(Kind::Upload), Fault::status(403), Times::Next(1));
    let output = host.output(&[&["--json"], &arguments[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report[0]["outcome"], "converted", "{report}");
    assert_eq!(report[1]["outcome"], "failed", "{report}");
    let report = json_of(&host, &arguments);
    assert_eq!(
        (&report[0]["outcome"], &report[1]["outcome"]),
        (&json!("unchanged"), &json!("converted"))
    );
    let tags: Vec<String> = registry.tags("app").into_keys().collect();
    assert_eq!(tags, ["latest", "v1", "v1-soci", "v2", "v2-soci"]);
    registry.reset_counters();
    let report = json_of(&host, &arguments);
    assert!(
        report
            .as_array()
            .unwrap()
            .iter()
            .all(|one| one["outcome"] == "unchanged")
    );
    assert_eq!(registry.counters().kind(Kind::Upload).requests, 0);
    host.fail(&["convert", &from, &from, "--tags", "*", "--suffix", ""], 2);
    host.fail(
        &["convert", &from, &format!("{from}@{}", Digest::of(b"x"))],
        2,
    );
    // to another repository the tags stay
    let other = registry.reference("lazy/app");
    host.run(&[&["convert", &from, &other, "--tags", "v?"][..], &SMALL].concat());
    assert_eq!(
        registry.tags("lazy/app").into_keys().collect::<Vec<_>>(),
        ["v1", "v2"]
    );
}

/// Two hosts that use one v2 reference while its v1 index is deleted, replaced or pushed again get the same index.
#[test]
fn what_happens_to_a_v1_index_changes_nothing_for_v2() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let converted = registry.reference("app:1-soci");
    let options = ["--platform", "linux/amd64"];
    let host = Host::new();
    let v1 = create(&host, &image, &[&options[..], &["--push"]].concat());
    host.run(&[&["convert", &image, &converted][..], &SMALL, &options].concat());
    let index_of = || {
        let found = json_of(
            &Host::new(),
            &[&["inspect", &converted][..], &options].concat(),
        );
        assert_eq!(found["index"]["version"], 2);
        found["index"]["digest"].clone()
    };
    let first = index_of();
    let v1: Digest = v1["index"].as_str().unwrap().parse().unwrap();
    registry.remove("app", &v1);
    assert_eq!(index_of(), first);
    create(
        &Host::new(),
        &image,
        &[&options[..], &["--push", "--optimizations", "xattr"]].concat(),
    );
    assert_eq!(index_of(), first);
    // one that claims to belong to the converted image itself
    let found = json_of(&host, &[&["inspect", &converted][..], &options].concat());
    let manifest: Digest = found["manifest"].as_str().unwrap().parse().unwrap();
    assert_ne!(manifest, images[0]);
    let by_digest = registry.reference(&format!("app@{manifest}"));
    let error = host.fail(&["index", "push", &by_digest], 3);
    assert!(error.contains("(v2)"), "{error}");
    create(&host, &by_digest, &["--push", "--force"]);
    assert_eq!(index_of(), first);
}
