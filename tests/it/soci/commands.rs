//! The commands around indexes, as AWS's `create`, `push`, `index`, `ztoc`, `prefetch` and `convert` suites try theirs.

use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::make::{GZIP_LAYER, MadeLayout, digest, tar_of};
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

/// The tool that each zTOC of an image names.
fn build_tools(host: &Host, image: &str) -> Vec<Value> {
    let list = json_of(host, &["ztoc", "list", "--at", image, "-p", "linux/amd64"]);
    let digests = list.as_array().unwrap().iter();
    digests
        .map(|table| {
            let digest = table["digest"].as_str().unwrap();
            json_of(
                host,
                &["ztoc", "info", digest, "--at", image, "-p", "linux/amd64"],
            )["build_tool"]
                .take()
        })
        .collect()
}

#[test]
fn a_build_tool_is_named_in_each_ztoc() {
    let (made, _) = multi();
    let host = Host::new();
    let image = made.reference("1");
    let reused = |report: &Value| -> Vec<Value> {
        let layers = report["layers"].as_array().unwrap().iter();
        layers.map(|layer| layer["reused"].clone()).collect()
    };
    let named = ["-p", "linux/amd64", "--build-tool", "our builder 7"];
    create(&host, &image, &named[..2]);
    let first = create(&host, &image, &named);
    assert_eq!(reused(&first), [false, false], "those of another tool");
    assert_eq!(build_tools(&host, &image), ["our builder 7"; 2]);
    let index = first["index"].as_str().unwrap();
    let index = json_of(&host, &["index", "info", index, "--at", &image]);
    assert_eq!(
        index["annotations"]["com.amazon.soci.build-tool-identifier"],
        "our builder 7"
    );
    assert_eq!(reused(&create(&host, &image, &named)), [true, true]);
    let converted = format!("oci:{}:1", host.mountpoint("converted").display());
    let to_convert = ["convert", &image, &converted, "--build-tool", "another"];
    json_of(&host, &[&to_convert[..], &named[..2], &SMALL[..]].concat());
    assert_eq!(build_tools(&host, &converted), ["another"; 2]);
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
            ("/top/x", 3, "is not a directory"),
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
