//! The commands around indexes, as AWS's `create`, `push`, `index`, `ztoc`, `prefetch` and `convert` suites try theirs.

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::make::{GZIP_LAYER, MANIFEST, MadeLayout, digest, tar_of};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Fault, Kind, On, Referrers, Registry, Times},
        tars::Layer,
    },
};

/// An image of two platforms, the first of two layers, tagged `1`; and the amd64 and arm64 manifests' digests.
pub(super) fn multi() -> (MadeLayout, [Digest; 2]) {
    let mut made = MadeLayout::new();
    let shared = tar_of(&[("etc/shared", &noise(40_000))]);
    let entries: Vec<Value> = ["amd64", "arm64"]
        .iter()
        .map(|architecture| {
            let own = tar_of(&[
                ("etc/os-release", architecture.as_bytes()),
                ("data/big", &noise(900_000)),
            ]);
            let mut entry = made.image(
                architecture,
                &[(GZIP_LAYER, shared.clone()), (GZIP_LAYER, own)],
            );
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        })
        .collect();
    let digests = [digest(&entries[0]), digest(&entries[1])];
    let index = made.index(&entries);
    made.tag(&index, "1");
    (made, digests)
}

pub(super) fn json_of(host: &Host, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    serde_json::from_str(&host.run(&arguments)).unwrap()
}

pub(super) const SMALL: [&str; 4] = ["--min-layer-size", "0", "--span-size", "65536"];

pub(super) fn create(host: &Host, image: &str, options: &[&str]) -> Value {
    json_of(
        host,
        &[&["index", "create", image], &SMALL[..], options].concat(),
    )
}

/// push: "pull elsewhere equal content", "newest index", "existing-index warn/skip/allow counts".
#[test]
fn an_index_made_here_is_pushed_and_found_elsewhere() {
    let debian = DockerRegistry::start();
    let (with, without) = (Registry::start(), Registry::start());
    without.set_referrers(Referrers::Absent);
    for place in [with.host(), without.host(), debian.host.clone()] {
        let (made, images) = multi();
        let host = Host::new();
        let image = format!("{place}/team/app:1");
        // nothing to push yet
        let error = host.fail(&["index", "push", &made.reference("1"), &image], 3);
        assert!(error.contains("index create"), "{error}");
        // image and index in one command
        create(&host, &made.reference("1"), &["--all-platforms"]);
        let pushed = json_of(
            &host,
            &[
                "index",
                "push",
                &made.reference("1"),
                &image,
                "--all-platforms",
            ],
        );
        for (one, digest) in pushed["images"].as_array().unwrap().iter().zip(images) {
            assert_eq!(one["outcome"], "pushed");
            assert_eq!(
                one["image"],
                json!(digest),
                "the image's bytes are as they were"
            );
        }
        let again = host.run(&[
            "index",
            "push",
            &made.reference("1"),
            &image,
            "--all-platforms",
        ]);
        assert_eq!(again.matches(" present").count(), 2, "{again}");

        let elsewhere = Host::new();
        let found = json_of(
            &elsewhere,
            &["inspect", &image, "--platform", "linux/arm64"],
        );
        assert_eq!(found["index"]["version"], 1);
        assert_eq!(found["index"]["origin"], "referrer");
        assert_eq!(found["index"]["digest"], pushed["images"][1]["index"]);
        assert_eq!(
            elsewhere.run(&[
                "cat",
                &image,
                "/etc/os-release",
                "--platform",
                "linux/arm64"
            ]),
            "arm64"
        );

        // another index of the same image
        let second = Host::new();
        create(
            &second,
            &image,
            &[
                "--force",
                "--platform",
                "linux/amd64",
                "--optimizations",
                "xattr",
            ],
        );
        for (what, outcome) in [
            ("skip", "skipped"),
            ("warn", "pushed"),
            ("allow", "present"),
        ] {
            let report = json_of(
                &second,
                &[
                    "index",
                    "push",
                    &image,
                    "--platform",
                    "linux/amd64",
                    "--existing-index",
                    what,
                ],
            );
            assert_eq!(report["images"][0]["outcome"], outcome, "{what}");
            let warned = !report["warnings"].as_array().unwrap().is_empty();
            assert_eq!(warned, what == "warn");
        }
        let listed = json_of(
            &elsewhere,
            &["index", "list", &image, "--platform", "linux/amd64"],
        );
        assert_eq!(listed.as_array().unwrap().len(), 2);
        let found = json_of(
            &elsewhere,
            &["inspect", &image, "--platform", "linux/amd64"],
        );
        assert_eq!(
            found["index"]["digest"], listed[1]["digest"],
            "the newest counts"
        );
        assert_eq!(
            second.run(&[
                "index",
                "push",
                &image,
                "--platform",
                "linux/amd64",
                "--quiet"
            ]),
            ""
        );
    }
}

/// create: "force re-create", "parameter validation", "empty-index error", "prefetch relative/absolute paths".
#[test]
fn create_takes_what_it_can_use_again_and_is_forced_not_to() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let first = create(&host, &image, &["--platform", "linux/amd64"]);
    registry.reset_counters();
    let again = create(&host, &image, &["--platform", "linux/amd64"]);
    assert_eq!(again["index"], first["index"]);
    assert!(
        again["layers"]
            .as_array()
            .unwrap()
            .iter()
            .all(|layer| layer["reused"] == true)
    );
    assert_eq!(
        registry.counters().blobs().bytes,
        config_bytes(&registry),
        "no layer moved"
    );
    // the other platform has one layer in common
    let other = create(&host, &image, &["--platform", "linux/arm64"]);
    assert_eq!(other["layers"][0]["reused"], true);
    assert_eq!(other["layers"][1]["reused"], false);
    let forced = create(&host, &image, &["--platform", "linux/amd64", "--force"]);
    assert_eq!(forced["index"], first["index"]);
    assert!(
        forced["layers"]
            .as_array()
            .unwrap()
            .iter()
            .all(|layer| layer["reused"] == false)
    );

    for wrong in [
        &["--span-size", "0"][..],
        &["--span-size", "-1"],
        &["--min-layer-size", "-1"],
        &["--span-size", "99999999999999999999"],
        &["--optimizations", "speed"],
        &["--platform", "linux/amd64", "--all-platforms"],
        &["--platform", "nonsense/"],
        &["--prefetch-files-json", "/nonexistent"],
    ] {
        host.fail(&[&["index", "create", &image][..], wrong].concat(), 2);
    }
    host.fail(&["index", "create", &image, "--platform", "linux/amd64"], 8); // all layers are small

    let list = host.root().join("list.json");
    std::fs::write(&list, r#"["/etc/./os-release", "data/big"]"#).unwrap();
    let report = create(
        &host,
        &image,
        &[
            "--platform",
            "linux/amd64",
            "--prefetch-file",
            "/etc/shared",
            "--prefetch-file",
            "no/such",
            "--prefetch-files-json",
            list.to_str().unwrap(),
        ],
    );
    assert_eq!(report["warnings"].as_array().unwrap().len(), 1);
    let prefetch = json_of(&host, &["prefetch", "list"]);
    assert_eq!(
        prefetch.as_array().unwrap().len(),
        2,
        "an artifact for each layer"
    );
    let artifact = prefetch[1]["digest"].as_str().unwrap();
    let info = json_of(&host, &["prefetch", "info", artifact]);
    assert_eq!(info["spans"][0]["start_span"], 0);
    assert!(
        info["spans"][0]["end_span"].as_u64().unwrap() >= 9,
        "{info}"
    );
    let text = host.run(&["prefetch", "info", artifact]);
    assert!(text.contains("FIRST SPAN"), "{text}");
    host.fail(&["prefetch", "info", &Digest::of(b"none").to_string()], 3);
}

/// Bytes of blobs that are not layers.
fn config_bytes(registry: &Registry) -> u64 {
    let log = registry.counters().log;
    log.iter()
        .filter(|entry| entry.kind == Kind::Blob && entry.bytes < 1000)
        .map(|entry| entry.bytes)
        .sum()
}

/// index: "info on zTOC digest is an error", "list filters", "rm by digest/ref", "orphan zTOC collection", "shared layers survive".
#[test]
fn indexes_are_listed_shown_and_removed() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    registry.add_layout("other", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    assert_eq!(json_of(&host, &["index", "list"]), json!([]));
    create(&host, &image, &["--all-platforms"]);
    let all = json_of(&host, &["index", "list"]);
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 2);
    for (index, (manifest, platform)) in all
        .iter()
        .zip(images.iter().zip(["linux/amd64", "linux/arm64"]))
    {
        assert_eq!(index["image"], json!(manifest));
        assert_eq!(index["platform"], platform);
        assert_eq!(index["reference"], image.as_str());
        assert_eq!(index["version"], 1);
        assert_eq!(index["ztocs"], 2);
        assert!(index["created"].as_str().unwrap().ends_with('Z'));
    }
    let one = json_of(&host, &["index", "ls", "--platform", "linux/arm64"]);
    assert_eq!(one.as_array().unwrap(), &all[1..]);
    assert_eq!(
        json_of(
            &host,
            &["index", "list", "--ref", &registry.reference("other:1")]
        ),
        json!([])
    );
    assert_eq!(
        json_of(&host, &["index", "list", "--ref", &image]),
        json!(all)
    );
    let quiet = host.run(&["index", "list", "--quiet"]);
    assert_eq!(quiet.lines().count(), 2);
    let table = host.run(&["index", "list"]);
    assert!(
        table.starts_with("DIGEST") && table.contains("linux/arm64"),
        "{table}"
    );

    let digests: Vec<&str> = all
        .iter()
        .map(|index| index["digest"].as_str().unwrap())
        .collect();
    let info: Value = serde_json::from_str(&host.run(&["index", "info", digests[0]])).unwrap();
    assert_eq!(info["subject"]["digest"], json!(images[0]));
    let ztocs = json_of(&host, &["ztoc", "list"]);
    let ztoc = ztocs[0]["digest"].as_str().unwrap();
    host.fail(&["index", "info", ztoc], 2);
    host.fail(&["index", "info", &Digest::of(b"none").to_string()], 3);

    // the shared layer's zTOC stays with the other index
    host.run(&["index", "rm", digests[0]]);
    host.fail(&["index", "rm", digests[0]], 3);
    let left = json_of(&host, &["ztoc", "list"]);
    assert_eq!(left.as_array().unwrap(), &ztocs.as_array().unwrap()[2..]);
    host.fail(&["index", "rm", "--ref", &registry.reference("other:1")], 3);
    host.run(&["index", "rm", "--ref", &image]);
    assert_eq!(json_of(&host, &["ztoc", "list"]), json!([]));
    let blobs = std::fs::read_dir(host.root().join("content/blobs/sha256")).unwrap();
    assert_eq!(blobs.count(), 0, "nothing is left over");

    // the same in a registry
    let pushed = create(&host, &image, &["--platform", "linux/amd64", "--push"]);
    let digest = pushed["index"].as_str().unwrap();
    host.run(&["index", "info", digest, "--at", &image]);
    host.run(&["index", "rm", digest, "--at", &image]);
    assert_eq!(json_of(&host, &["index", "list", &image]), json!([]));
}

/// ztoc: "list filters", "info ok/error", "get-file to stdout, -o, errors".
#[test]
fn ztocs_are_listed_shown_and_read_through() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    create(&host, &image, &["--platform", "linux/amd64"]);
    let list = json_of(&host, &["ztoc", "list"]);
    let digest = list[1]["digest"].as_str().unwrap().to_owned();
    assert_eq!(list[1]["span_size"], 65536);
    for (filter, count) in [
        (vec!["--ztoc-digest", &digest], 1),
        (vec!["--image-ref", &image], 2),
        (vec!["--image-ref", "other:1"], 0),
        (vec!["--at", &image], 2),
    ] {
        let found = json_of(&host, &[&["ztoc", "list"][..], &filter].concat());
        assert_eq!(found.as_array().unwrap().len(), count, "{filter:?}");
    }
    assert_eq!(host.run(&["ztoc", "ls", "--quiet"]).lines().count(), 2);
    let info: Value = serde_json::from_str(&host.run(&["ztoc", "info", &digest])).unwrap();
    assert_eq!(info["num_files"], 2);
    assert_eq!(info["num_multi_span_files"], 1);
    assert_eq!(info["files"][0]["filename"], "etc/os-release");
    assert_eq!(
        (
            &info["files"][0]["start_span"],
            &info["files"][0]["end_span"]
        ),
        (&json!(0), &json!(0))
    );
    let index = json_of(&host, &["index", "list"])[0]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    host.fail(&["ztoc", "info", &index], 3);
    host.fail(&["ztoc", "info", "/nonexistent"], 3);
    host.fail(&["ztoc", "info", "sha256:12"], 2);

    registry.reset_counters();
    assert_eq!(
        host.run(&["ztoc", "get-file", &digest, "etc/os-release"]),
        "amd64"
    );
    let layer: Digest = list[1]["layer"].as_str().unwrap().parse().unwrap();
    assert_eq!(registry.counters().ranges(&layer).len(), 1, "one span");
    let out = host.root().join("out");
    host.run(&[
        "ztoc",
        "get-file",
        &digest,
        "/data/big",
        "-o",
        out.to_str().unwrap(),
    ]);
    assert!(std::fs::read(&out).unwrap() == noise(900_000));
    host.fail(&["ztoc", "get-file", &digest, "no/such"], 3);
    host.fail(
        &[
            "ztoc",
            "get-file",
            &Digest::of(b"x").to_string(),
            "etc/os-release",
        ],
        3,
    );
}

#[test]
fn what_is_left_of_images_that_are_gone_is_collected() {
    let (made, images) = multi();
    let registry = Registry::start();
    registry.set_referrers(Referrers::Absent);
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let reports = create(&host, &image, &["--all-platforms", "--push"]);
    let remote = ["index", "gc", "--remote", &registry.reference("app")].map(str::to_owned);
    let remote: Vec<&str> = remote.iter().map(String::as_str).collect();
    assert_eq!(json_of(&host, &remote)["removed"], json!([]));

    registry.remove("app", &images[1]); // the image
    let tried = json_of(&host, &[&remote[..], &["--dry-run"]].concat());
    assert_eq!(tried["removed"][0]["digest"], reports[1]["index"]);
    assert_eq!(tried["removed"][0]["what"], "index");
    assert_eq!(
        json_of(&host, &remote)["removed"],
        tried["removed"],
        "a dry run removes nothing"
    );
    assert_eq!(json_of(&host, &remote)["removed"], json!([]));
    host.fail(
        &[
            "index",
            "info",
            reports[1]["index"].as_str().unwrap(),
            "--at",
            &image,
        ],
        3,
    );
    host.run(&[
        "index",
        "info",
        reports[0]["index"].as_str().unwrap(),
        "--at",
        &image,
    ]);

    // an entry of the list whose index is gone, of an image that is there
    let index: Digest = reports[0]["index"].as_str().unwrap().parse().unwrap();
    registry.remove("app", &index);
    let removed = json_of(&host, &remote)["removed"].clone();
    assert_eq!(
        (&removed[0]["digest"], &removed[0]["what"]),
        (&json!(index), &json!("entry"))
    );
    assert_eq!(
        json_of(
            &host,
            &["index", "list", &image, "--platform", "linux/amd64"]
        ),
        json!([])
    );

    // with the referrers API nothing lists the subjects: they are named
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let report = create(
        &host,
        &registry.reference("app:1"),
        &["--platform", "linux/amd64", "--push"],
    );
    registry.remove("app", &images[0]);
    let remote = registry.reference("app");
    let collected = json_of(
        &host,
        &[
            "index",
            "gc",
            "--remote",
            &remote,
            "--image",
            &images[0].to_string(),
        ],
    );
    assert_eq!(collected["removed"][0]["digest"], report["index"]);
}

/// A signature of a manifest, in a registry.
fn sign(registry: &Registry, repository: &str, subject: Digest, size: usize) -> Digest {
    registry.add_blob(repository, &b"{}"[..]);
    let signature = json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.cncf.notary.signature",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}"), "size": 2}, "layers": [],
        "subject": {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": subject, "size": size}});
    registry.add_manifest(repository, None, MANIFEST, signature.to_string())
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
        let output = std::process::Command::new("skopeo")
            .arg("--policy")
            .arg(&policy)
            .arg("copy")
            .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
            .args(arguments)
            .args([format!("docker://{image}"), format!("docker://{copied}")])
            .output()
            .expect("this test needs skopeo (apt-get install skopeo)");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
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
    assert!(warnings.contains("a copy has lost it"), "{warnings}");
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

#[test]
fn a_required_index_is_there_or_nothing_starts() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let cat = |options: &[&str], status| {
        host.fail(
            &[
                &["cat", &image, "etc/os-release", "--platform", "linux/amd64"][..],
                options,
            ]
            .concat(),
            status,
        )
    };
    let error = cat(&["--require-index"], 3);
    assert!(error.contains("a SOCI index is required"), "{error}");
    let index = create(&host, &image, &["--platform", "linux/amd64", "--push"]);
    let index = index["index"].as_str().unwrap();
    for options in [
        vec!["--require-index".to_owned()],
        vec![format!("--require-index={index}")],
    ] {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        host.run(
            &[
                &["cat", &image, "etc/os-release", "--platform", "linux/amd64"][..],
                &options,
            ]
            .concat(),
        );
    }
    cat(&[&format!("--require-index={}", Digest::of(b"other"))], 3);
    cat(&["--require-index", "--index-policy", "none"], 3);
    registry.fail(
        On::Kind(Kind::Referrers),
        Fault::status(403),
        Times::UntilHealed,
    );
    cat(
        &[
            "--require-index",
            "--root",
            host.mountpoint("empty").to_str().unwrap(),
        ],
        3,
    );
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

/// cat: layers, whiteouts, links; and what it costs.
#[test]
fn a_file_is_printed_as_the_mounted_image_would_have_it() {
    let big = noise(2_000_000);
    let layers = [
        Layer::new()
            .directory("usr", 0o755)
            .file("usr/original", b"original")
            .hardlink("usr/linked", "usr/original")
            .file("usr/hidden", b"hidden")
            .file("opaque/below", b"below")
            .file("gone/below", b"below")
            .file("big", &big)
            .file("behind", b"behind")
            .symlink("bin", "usr"),
        Layer::new()
            .whiteout("usr/hidden")
            .opaque("opaque")
            .file("opaque/above", b"above")
            .whiteout("gone")
            .symlink("usr/up", "../big")
            .symlink("absolute", "/bin/../bin/original")
            .symlink("loop", "loop")
            .file("./usr/./dotted", b"dotted"),
        Layer::new()
            .file("usr/original", b"replaced")
            .file("top", b"top"),
    ];
    let mut made = MadeLayout::new();
    let layers: Vec<_> = layers
        .into_iter()
        .map(|layer| (GZIP_LAYER, layer.tar()))
        .collect();
    let image = made.image("amd64", &layers);
    made.tag(&image, "1");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let plain = registry.reference("app:1");
    let indexed = registry.reference("soci/app:1");
    let host = Host::new();
    host.run(&[&["convert", &plain, &indexed][..], &SMALL].concat());
    let compact = registry.reference("compact/app:1");
    let options = ["--compact", "--compact-span-size", "65536"];
    host.run(&[&["convert", &plain, &compact][..], &SMALL, &options].concat());
    for image in [&plain, &indexed, &compact, &made.reference("1")] {
        for (path, content) in [
            ("/usr/original", "replaced"),
            ("usr/linked", "original"),
            ("/bin/linked", "original"),
            ("/absolute", "replaced"),
            ("/opaque/above", "above"),
            ("/usr/dotted", "dotted"),
            ("/usr/../top", "top"),
            ("//./top", "top"),
        ] {
            assert_eq!(host.run(&["cat", image, path]), content, "{image} {path}");
        }
        for (path, status, words) in [
            ("/usr/hidden", 3, "there is no /usr/hidden"),
            ("/opaque/below", 3, "no /opaque/below"),
            ("/gone/below", 3, "no /gone"),
            ("/top/x", 3, "is no directory"),
            ("/usr", 2, "a directory"),
            ("/", 2, "a directory"),
            ("/loop", 2, "too many symbolic links"),
        ] {
            let error = host.fail(&["cat", image, path], status);
            assert!(error.contains(words), "{image} {path}: {error}");
        }
        let output = host.output(&["cat", image, "/usr/up"]);
        assert!(output.stdout == big, "{image}");
    }
    a_compact_index_costs_its_table_and_the_spans_of_the_file(&registry, &host, &compact);

    // the topmost layer alone is looked at, and one span fetched
    registry.reset_counters();
    host.run(&["cat", &indexed, "/top"]);
    let manifest = json_of(&host, &["inspect", &indexed]);
    let digest = |number: usize| -> Digest {
        manifest["layers"][number]["digest"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    };
    let counters = registry.counters();
    assert_eq!(counters.ranges(&digest(2)).len(), 1);
    assert_eq!(
        counters.blob(&digest(0)).bytes + counters.blob(&digest(1)).bytes,
        0
    );
}

/// As `cat` says it: of the layers that are looked at the tables, and of the one that has the file its spans.
fn a_compact_index_costs_its_table_and_the_spans_of_the_file(
    registry: &Registry,
    host: &Host,
    image: &str,
) {
    let manifest = |digest: &str| -> Value {
        let digest: Digest = digest.parse().unwrap();
        let reference = registry.reference(&format!("compact/app@{digest}"));
        let found = super::run(async {
            let source = super::open(&reference).await.unwrap();
            source.manifest(&digest).await.unwrap()
        });
        serde_json::from_slice(&found.bytes).unwrap()
    };
    let inspected = json_of(host, &["inspect", image]);
    let index = manifest(inspected["compact_index"]["digest"].as_str().unwrap());
    let layers = inspected["layers"].as_array().unwrap();
    for (path, content, least_requests) in
        [("/usr/linked", "original", 1), ("/behind", "behind", 1)]
    {
        registry.reset_counters();
        assert_eq!(host.run(&["cat", image, path]), content);
        let counters = registry.counters();
        for (number, part) in index["layers"].as_array().unwrap().iter().enumerate() {
            let table: u64 = part["annotations"]["vnd.socinbd.table-size"]
                .as_str()
                .unwrap()
                .parse()
                .unwrap();
            let fetched = counters.blob(&crate::soci::make::digest(part));
            let layer = crate::soci::make::digest(&layers[number]);
            let spans = counters.blob(&layer);
            if number == 0 {
                // the table, and a window at most
                assert!((1..=2).contains(&fetched.requests), "{path}: {fetched:?}");
                assert!(
                    (table..table + 40_000).contains(&fetched.bytes),
                    "{path}: {fetched:?}"
                );
                assert_eq!(spans.requests, least_requests, "{path}: {spans:?}");
                assert!(spans.bytes < 200_000, "{path}: {spans:?}");
            } else {
                assert_eq!((fetched.requests, fetched.bytes), (1, table), "{path}");
                assert_eq!(spans.requests, 0, "{path}: {spans:?}");
            }
        }
        let ztocs = layers.iter().filter_map(|layer| layer["ztoc"].as_str());
        for ztoc in ztocs {
            assert_eq!(counters.blob(&ztoc.parse().unwrap()).requests, 0, "{path}");
        }
    }
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
