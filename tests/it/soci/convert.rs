//! Converting images to SOCI's version 2: AWS's digests, and what moves.

use std::fs;

use serde_json::{Value, json};
use socinbd::{
    engine::{
        make::{
            convert, create,
            options::{ConvertOptions, CreateOptions},
            report::ConvertReport,
        },
        open::{local_indexes::LocalIndexes, platforms::Platforms},
    },
    error::{Kind, Result},
    oci::Digest,
    source::{Access, Destination, Source},
};
use tempfile::TempDir;

use super::{
    golden::{AWS_TOOL, case, layout, no_local},
    make::{GZIP_LAYER, MadeLayout, PLAIN_LAYER, digest, tar_of},
    open, run,
};
use crate::{
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Fault, Kind as Asked, On, Referrers, Registry, Times},
    },
    vectors::{Vectors, list, text},
};

/// What `soci convert` was told, as ours takes it.
fn options(case: &Value) -> ConvertOptions {
    let mut options = ConvertOptions {
        create: CreateOptions {
            build_tool: AWS_TOOL.to_owned(),
            ..CreateOptions::default()
        },
        // these cases were made on amd64
        platforms: Platforms::These(vec!["linux/amd64".parse().unwrap()]),
        ..ConvertOptions::default()
    };
    let mut words = text(&case["command"]).split_whitespace();
    let mut platforms = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "--min-layer-size" => {
                options.create.min_layer_size = words.next().unwrap().parse().unwrap()
            }
            "--span-size" => options.create.span_size = words.next().unwrap().parse().unwrap(),
            "--optimizations" => {
                assert_eq!(words.next(), Some("xattr"));
                options.create.disable_xattrs = true;
            }
            "--prefetch-file" => options
                .create
                .prefetch_files
                .push(words.next().unwrap().to_owned()),
            "--prefetch-files-json" => {
                let (_, list) = text(&case["note"]).split_once(": ").unwrap();
                options.create.prefetch_files = serde_json::from_str(list).unwrap();
            }
            "--platform" => platforms.push(words.next().unwrap().parse().unwrap()),
            "--all-platforms" => options.platforms = Platforms::All,
            _ => {}
        }
    }
    if !platforms.is_empty() {
        options.platforms = Platforms::These(platforms);
    }
    options
}

async fn convert(
    from: &str,
    to: &str,
    options: &ConvertOptions,
    local: &LocalIndexes,
) -> Result<ConvertReport> {
    let source = open(from).await?;
    let destination = Destination::open(&to.parse()?, &Access::default()).await?;
    convert::convert(&source, &destination, options, local, &|_, _, _| {}).await
}

/// Converts all that there is, however small.
/// Converts with [`everything`], and no index from elsewhere.
async fn convert_all(from: &str, to: &str) -> Result<ConvertReport> {
    convert(from, to, &everything(), &no_local()).await
}

fn everything() -> ConvertOptions {
    ConvertOptions {
        create: CreateOptions {
            min_layer_size: 0,
            ..CreateOptions::default()
        },
        platforms: Platforms::All,
        ..ConvertOptions::default()
    }
}

async fn manifest(reference: &str, digest: &Digest) -> Value {
    let source = open(reference).await.unwrap();
    serde_json::from_slice(&source.manifest(digest).await.unwrap().bytes).unwrap()
}

#[test]
fn the_vectors_images_become_the_vectors_converted_images() {
    let vectors = Vectors::open();
    let mut compared = 0;
    for case in vectors.images() {
        let id = text(&case["id"]);
        if !text(&case["kind"]).starts_with("v2") {
            continue;
        }
        let source = layout(&vectors, self::case(&vectors, text(&case["source"])));
        let folder = TempDir::new().unwrap();
        let to = format!("oci:{}/out", folder.path().display());
        let from = format!("oci:{}", source.path().display());
        let converted = run(convert(&from, &to, &options(case), &no_local()));
        let expected: Digest = match (case.get("result_digest"), case.get("layout")) {
            (Some(digest), _) => text(digest).parse().unwrap(),
            (None, Some(_)) => {
                let theirs = layout(&vectors, case);
                let index = fs::read(theirs.path().join("index.json")).unwrap();
                let index: Value = serde_json::from_slice(&index).unwrap();
                text(&index["manifests"][0]["digest"]).parse().unwrap()
            }
            (None, None) if id == "v2-multi-then-arm64" => {
                // theirs stops with an error that has no reason in the image
                converted.unwrap();
                continue;
            }
            (None, None) => {
                let error = converted.expect_err(id);
                assert_eq!(error.kind(), Kind::Unsupported, "{id}: {}", error.report());
                assert!(
                    error.report().contains("no zTOC was made"),
                    "{}",
                    error.report()
                );
                compared += 1;
                continue;
            }
        };
        let report = converted.unwrap_or_else(|error| panic!("{id}: {}", error.report()));
        if id.starts_with("v2-attest") {
            // theirs drops the attestation's annotations
            let ours = run(manifest(&to, &report.digest));
            let theirs = layout(&vectors, case);
            let reference = format!("oci:{}", theirs.path().display());
            let theirs = run(manifest(&reference, &expected));
            let mut without = ours.clone();
            let attestation = without["manifests"][1].as_object_mut().unwrap();
            let annotations = attestation.remove("annotations").expect(id);
            assert_eq!(
                annotations["vnd.docker.reference.type"], "attestation-manifest",
                "{id}"
            );
            assert_eq!(without, theirs, "{id}");
        } else {
            assert_eq!(report.digest, expected, "{id}");
            // nothing is there that is not theirs (they keep the source's manifests as well)
            if let Some(blobs) = case.get("blobs") {
                let theirs: Vec<&str> = list(blobs).iter().map(text).collect();
                for file in fs::read_dir(folder.path().join("out/blobs/sha256")).unwrap() {
                    let name = file.unwrap().file_name();
                    let digest = format!("sha256:{}", name.to_str().unwrap());
                    assert!(theirs.contains(&digest.as_str()), "{id}: {digest}");
                }
            }
        }
        compared += 1;
    }
    assert!(compared >= 20, "{compared}");
}

/// D: convert, "idempotent", "single manifest", "standalone: dir/tar in x dir/tar out".
#[test]
fn every_way_between_registries_folders_and_archives_gives_the_same_image() {
    let mut made = MadeLayout::new();
    let amd = made.image(
        "amd64",
        &[
            (GZIP_LAYER, tar_of(&[("a", &noise(50_000))])),
            (PLAIN_LAYER, tar_of(&[("b", b"2")])),
        ],
    );
    let arm = made.image("arm64", &[(GZIP_LAYER, tar_of(&[("c", b"3")]))]);
    let [amd, arm] = [(amd, "amd64"), (arm, "arm64")].map(|(mut entry, architecture)| {
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entry
    });
    let index = made.index(&[amd, arm]);
    made.tag(&index, "1");
    let packed = made.packed("");
    let registry = Registry::start();
    registry.add_layout("from/app", made.path()).unwrap();
    let debian = DockerRegistry::start();
    let folder = TempDir::new().unwrap();
    let mut digests = Vec::new();
    for (number, from) in [
        made.reference("1"),
        format!("oci-archive:{}:1", packed.path().display()),
        registry.reference("from/app:1"),
    ]
    .iter()
    .enumerate()
    {
        for to in [
            format!("oci:{}/{number}:2", folder.path().display()),
            format!("oci-archive:{}/{number}.tar:2", folder.path().display()),
            registry.reference(&format!("to/{number}:2")),
            format!("{}/to/{number}:2", debian.host),
        ] {
            let report = run(convert_all(from, &to))
                .unwrap_or_else(|error| panic!("{from} to {to}: {}", error.report()));
            digests.push(report.digest);
            // read back, with its indexes
            run(async {
                for platform in ["linux/amd64", "linux/arm64"] {
                    let image = socinbd::engine::Image::resolve(
                        &open(&to).await.unwrap(),
                        Some(&platform.parse().unwrap()),
                    )
                    .await
                    .unwrap();
                    let found = socinbd::engine::open::search::find(
                        &image,
                        &Default::default(),
                        &no_local(),
                    )
                    .await
                    .unwrap();
                    let index = found.index.expect("an index");
                    assert_eq!(index.version, 2);
                    for layer in &image.layers {
                        index.fetch_ztoc(&layer.digest).await.unwrap();
                        image
                            .source
                            .range(&layer.digest, 0..layer.size)
                            .await
                            .unwrap();
                    }
                }
            });
            // and converted again, it is the same
            if to.starts_with("oci:") || to.starts_with("127") {
                let again = run(convert_all(&to, &to)).unwrap();
                assert_eq!(again.digest, report.digest, "{to}");
                assert_eq!(again.blobs.uploaded, 0, "{to}: {:?}", again.blobs);
            }
        }
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[test]
fn a_layer_passes_once_or_not_at_all() {
    let mut made = MadeLayout::new();
    let image = made.image(
        "amd64",
        &[
            (GZIP_LAYER, tar_of(&[("a", &noise(3_000_000))])),
            (GZIP_LAYER, tar_of(&[("b", &noise(200_000))])),
        ],
    );
    made.tag(&image, "1");
    let layers: Vec<(Digest, u64)> = {
        let manifest = run(manifest(&made.reference("1"), &digest(&image)));
        let layers = manifest["layers"].as_array().unwrap().iter();
        layers
            .map(|layer| (digest(layer), layer["size"].as_u64().unwrap()))
            .collect()
    };
    let sent = |registry: &Registry| -> Vec<u64> {
        layers
            .iter()
            .map(|(layer, _)| registry.counters().blob(layer).bytes)
            .collect()
    };
    let sizes: Vec<u64> = layers.iter().map(|(_, size)| *size).collect();
    let (one, other) = (Registry::start(), Registry::start());
    one.add_layout("app", made.path()).unwrap();

    // to another registry: indexed and sent in one pass
    let report = run(convert_all(
        &one.reference("app:1"),
        &other.reference("new/app:1"),
    ))
    .unwrap();
    assert_eq!(sent(&one), sizes);
    assert_eq!(report.blobs.mounted, 0);

    // within a registry: mounted, and read once for its index
    one.reset_counters();
    let report = run(convert_all(
        &one.reference("app:1"),
        &one.reference("new/app:1"),
    ))
    .unwrap();
    assert_eq!(sent(&one), sizes);
    assert_eq!(report.blobs.mounted, 3, "two layers and the configuration");
    assert_eq!(
        report.blobs.uploaded, 3,
        "two zTOCs and an empty configuration"
    );

    // with a v1 index in the registry: no layer byte at all, wherever it goes within
    let local = TempDir::new().unwrap();
    run(async {
        let source = open(&one.reference("app:1")).await.unwrap();
        let image = socinbd::engine::Image::resolve(&source, None)
            .await
            .unwrap();
        let to = Destination::open(&one.reference("app:1").parse().unwrap(), &Access::default())
            .await
            .unwrap();
        let local = LocalIndexes::open(local.path()).unwrap();
        create::create_at(&image, &everything().create, &local, &to, 3, &|_, _, _| {})
            .await
            .unwrap();
    });
    one.reset_counters();
    let v1 = run(convert_all(
        &one.reference("app:1"),
        &one.reference("third/app:1"),
    ))
    .unwrap();
    assert_eq!(sent(&one), [0, 0]);
    assert_eq!(v1.digest, report.digest);
}

#[test]
fn what_is_broken_off_is_not_named_and_is_gone_on_with() {
    let mut made = MadeLayout::new();
    let image = made.image(
        "amd64",
        &[
            (GZIP_LAYER, tar_of(&[("a", &noise(500_000))])),
            (GZIP_LAYER, tar_of(&[("b", &noise(300_000))])),
        ],
    );
    made.tag(&image, "1");
    let registry = Registry::start();
    let to = registry.reference("app:1");
    // manifests are refused: all blobs are there by then
    registry.fail(
        On::Kind(Asked::Manifest),
        Fault::status(404),
        Times::Next(1),
    ); // what is there now
    registry.fail(
        On::Kind(Asked::Manifest),
        Fault::status(403),
        Times::Next(1),
    );
    let error = run(convert_all(&made.reference("1"), &to)).unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthorized, "{}", error.report());
    assert!(registry.tags("app").is_empty());
    let report = run(convert_all(&made.reference("1"), &to)).unwrap();
    assert_eq!(report.blobs.uploaded, 0, "{:?}", report.blobs);
    assert_eq!(registry.tags("app")["1"], report.digest);
}

#[test]
fn platforms_that_are_not_there_and_what_is_no_image_are_named_errors() {
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", b"1")]))]);
    made.tag(&image, "single");
    let mut listed = image.clone();
    listed["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let absent = json!({"mediaType": super::make::MANIFEST, "digest": Digest::of(b"absent"), "size": 5,
        "platform": {"os": "linux", "architecture": "arm64"}});
    let index = made.index(&[listed.clone(), absent]);
    made.tag(&index, "sparse");
    let chart = made.blob("application/vnd.cncf.helm.config.v1+json", b"{}");
    let chart = made.manifest(&chart, &[]);
    made.tag(&chart, "chart");
    let folder = TempDir::new().unwrap();
    let to = format!("oci:{}/out:1", folder.path().display());
    let with = |platform: &str| ConvertOptions {
        platforms: Platforms::These(vec![platform.parse().unwrap()]),
        ..everything()
    };
    for (tag, options, kind, text) in [
        (
            "single",
            with("linux/s390x"),
            Kind::NotFound,
            "no image for linux/s390x; available platforms: linux/amd64",
        ),
        (
            "sparse",
            with("linux/s390x"),
            Kind::NotFound,
            "available platforms: linux/amd64, linux/arm64",
        ),
        (
            "sparse",
            with("linux/arm64"),
            Kind::NotFound,
            "the image for linux/arm64",
        ),
        ("chart", everything(), Kind::Unsupported, "a Helm chart"),
    ] {
        let error = run(convert(&made.reference(tag), &to, &options, &no_local())).unwrap_err();
        assert_eq!(error.kind(), kind, "{}", error.report());
        assert!(error.report().contains(text), "{}", error.report());
    }
    // all that are there: the other entry is left out
    let report = run(convert_all(&made.reference("sparse"), &to)).unwrap();
    assert!(
        report.warnings[0].contains("linux/arm64"),
        "{:?}",
        report.warnings
    );
    let converted = run(manifest(&to, &report.digest));
    let entries = converted["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 2, "the image and its SOCI index");
}

/// One platform of a converted image again, with another span size: the other platform's entries, manifests and indexes are as they
/// were, and so are attestations and what nobody knows.
#[test]
fn others_stay_byte_for_byte() {
    let mut made = MadeLayout::new();
    let mut images: Vec<Value> = ["amd64", "arm64"]
        .iter()
        .map(|architecture| {
            let mut entry = made.image(
                architecture,
                &[(GZIP_LAYER, tar_of(&[("a", architecture.as_bytes())]))],
            );
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        })
        .collect();
    let statement = made.blob("application/vnd.in-toto+json", b"{\"a\":1}");
    let config = made.blob("application/vnd.oci.image.config.v1+json", b"{ }");
    let mut attestation = made.manifest(&config, &[statement]);
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": images[0]["digest"]});
    let mut unknown = made.manifest(&made.blob("application/x-thing", b"thing"), &[]);
    unknown["artifactType"] = json!("application/x-thing");
    unknown["x-future"] = json!({"z": 1, "a": [2]});
    images.extend([attestation.clone(), unknown.clone()]);
    let index = made.index(&images);
    made.tag(&index, "1");
    let registry = Registry::start();
    let to = registry.reference("app:1");
    let first = run(convert_all(&made.reference("1"), &to)).unwrap();
    let before = run(manifest(&to, &first.digest));
    let entries = before["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 6);
    assert_eq!(entries[2].to_string(), attestation.to_string());
    assert_eq!(entries[3].to_string(), unknown.to_string());

    let mut options = everything();
    options.platforms = Platforms::These(vec!["linux/arm64".parse().unwrap()]);
    options.create.span_size = 16384;
    let again = run(convert(
        &to,
        &registry.reference("app:2"),
        &options,
        &no_local(),
    ))
    .unwrap();
    let after = run(manifest(&to, &again.digest));
    let after = after["manifests"].as_array().unwrap();
    for (at, (was, is)) in entries.iter().zip(after).enumerate() {
        assert_eq!(was == is, !matches!(at, 1 | 5), "entry {at}");
    }
    // each entry leads to something, the attestation's statement too
    run(async {
        let source = open(&to).await.unwrap();
        for entry in after {
            source.manifest(&digest(entry)).await.unwrap();
        }
        source.range(&Digest::of(b"{\"a\":1}"), 0..7).await.unwrap();
        source.range(&Digest::of(b"thing"), 0..5).await.unwrap();
    });
}

#[test]
fn it_says_which_signatures_still_cover_what() {
    let mut made = MadeLayout::new();
    let mut entries: Vec<Value> = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let mut entry = made.image(
            architecture,
            &[(GZIP_LAYER, tar_of(&[("a", architecture.as_bytes())]))],
        );
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entries.push(entry);
    }
    let index = made.index(&entries);
    made.tag(&index, "1");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    registry.set_referrers(Referrers::Present {
        per_answer: 1,
        filters: false,
    });
    let mut signatures = Vec::new();
    for subject in [&index, &entries[0], &entries[1]] {
        let signature = json!({"schemaVersion": 2, "mediaType": super::make::MANIFEST, "artifactType": "application/vnd.cncf.notary.signature",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}"), "size": 2}, "layers": [],
            "subject": {"mediaType": subject["mediaType"], "digest": subject["digest"], "size": subject["size"]}});
        signatures.push(registry.add_manifest(
            "app",
            None,
            super::make::MANIFEST,
            signature.to_string(),
        ));
    }
    let cosign = json!({"schemaVersion": 2, "mediaType": super::make::MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(b"{}"), "size": 2},
        "layers": [{"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": Digest::of(b"{}"), "size": 2}]});
    let tag = format!("sha256-{}.sig", digest(&index).hex());
    let cosign =
        registry.add_manifest("app", Some(&tag), super::make::MANIFEST, cosign.to_string());
    let mut options = everything();
    options.platforms = Platforms::These(vec!["linux/amd64".parse().unwrap()]);
    let report = run(convert(
        &registry.reference("app:1"),
        &registry.reference("app:2"),
        &options,
        &no_local(),
    ))
    .unwrap();
    let mut covers: Vec<(Digest, bool)> = report
        .vouchers
        .iter()
        .map(|one| (one.companion.digest, one.covers))
        .collect();
    covers.sort();
    let mut expected = vec![
        (signatures[0], false),
        (signatures[1], false),
        (signatures[2], true),
        (cosign, false),
    ];
    expected.sort();
    assert_eq!(covers, expected, "{report}");
    let text = report.to_string();
    assert!(
        text.contains("a Notary Project signature") && text.contains("sign the new image"),
        "{text}"
    );
}

#[test]
fn a_conversion_is_known_when_it_is_seen() {
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", b"1")]))]);
    let other = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", b"2")]))]);
    made.tag(&image, "1");
    made.tag(&other, "2");
    let registry = Registry::start();
    let to = registry.reference("app:1");
    run(convert_all(&made.reference("1"), &to)).unwrap();
    run(async {
        let there: Source = open(&to).await.unwrap();
        let found = there.root_manifest().await.unwrap();
        for (tag, expected) in [("1", true), ("2", false)] {
            let source = open(&made.reference(tag)).await.unwrap();
            let is = convert::is_converted(&source, &there, &found, &Platforms::Host)
                .await
                .unwrap();
            assert_eq!(is, expected, "{tag}");
        }
    });
}

#[test]
fn a_tag_that_is_kept_and_a_name_that_cannot_be_read_are_not_replaced() {
    let mut made = MadeLayout::new();
    for tag in ["1", "2"] {
        let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", tag.as_bytes())]))]);
        made.tag(&image, tag);
    }
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    registry.keep_tags();
    let to = registry.reference("app:new");
    let first = run(convert_all(&made.reference("1"), &to)).unwrap();
    let error = run(convert_all(&made.reference("2"), &to)).unwrap_err();
    assert_eq!(error.kind(), Kind::Immutable, "{error:?}");
    assert!(error.report().contains("give another tag"), "{error:?}");
    assert_eq!(registry.tags("app")["new"], first.digest);
    // once more the same
    run(convert_all(&made.reference("1"), &to)).unwrap();

    let host = crate::engine::Host::new();
    let from = made.reference("2");
    let error = host.fail(&["convert", &from, &to, "--min-layer-size", "0"], 9);
    assert!(error.contains("the tag new of"), "{error}");
    host.run(&["index", "create", &from, "--min-layer-size", "0"]);
    let error = host.fail(&["index", "push", &from, &registry.reference("app:1")], 9);
    assert!(error.contains("the tag 1 of"), "{error}");
    let error = host.fail(&["copy", &from, &registry.reference("app:1")], 9);
    assert!(error.contains("the tag 1 of"), "{error}");

    // of many tags, those whose new names lead to what nobody can read stay
    let other = Registry::start();
    other.add_layout("app", made.path()).unwrap();
    other.add_manifest("app", Some("1-soci"), "text/plain", "no manifest");
    let odd = other.tags("app")["1-soci"];
    let app = other.reference("app");
    let all = [
        "convert",
        &app,
        &app,
        "--tags",
        "?",
        "--min-layer-size",
        "0",
    ];
    let error = host.fail(&all, 1);
    assert_eq!(other.tags("app")["1-soci"], odd, "{error}");
    assert!(other.tags("app").contains_key("2-soci"));
    host.run(&[&all[..], &["--force"]].concat());
    assert_ne!(other.tags("app")["1-soci"], odd);
}
