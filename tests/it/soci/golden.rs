//! Indexes, prefetch artifacts and images that AWS's tool made, read and made again.

use std::{collections::BTreeMap, fs};

use serde_json::{Value, json};
use socinbd::{
    engine::{
        Image,
        make::{
            create,
            options::{self, CreateOptions},
            report::{CreateReport, LayerOutcome},
        },
        open::{
            local_indexes::LocalIndexes,
            policy::{IndexChoice, IndexOrigin},
            search,
        },
    },
    error::{Kind, Result},
    oci::{Digest, artifact::what_is, manifest},
    soci::{
        index::{IndexManifest, Version},
        prefetch::Prefetch,
    },
    ztoc::Ztoc,
};
use tempfile::TempDir;

use super::{open, run};
use crate::vectors::{Vectors, list, number, text};

pub(super) const AWS_TOOL: &str = "AWS SOCI CLI v0.2";
const PLATFORMS: [&str; 2] = ["linux/amd64", "linux/arm64"];

/// A case's layout, with the blobs that it should have.
pub(super) fn layout(vectors: &Vectors, case: &Value) -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["oci-layout", "index.json"] {
        let path = json!(format!("{}/{name}", text(&case["layout"])));
        fs::write(folder.path().join(name), vectors.read(&path)).unwrap();
    }
    let blobs = folder.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    for digest in list(&case["blobs"]) {
        let hex = text(digest).strip_prefix("sha256:").unwrap();
        let path = json!(format!("images/blobs/sha256/{hex}"));
        fs::copy(vectors.path(&path), blobs.join(hex)).unwrap();
    }
    folder
}

pub(super) fn case<'a>(vectors: &'a Vectors, id: &str) -> &'a Value {
    vectors
        .images()
        .iter()
        .find(|case| case["id"] == id)
        .unwrap()
}

async fn resolve(folder: &TempDir, platform: &str) -> Result<Image> {
    // v1 cases have the referrers' lists beside the image; the image alone has a tag that is none
    let source = open(&format!("oci:{}", folder.path().display())).await?;
    Image::resolve(&source, Some(&platform.parse().unwrap())).await
}

/// A state directory with nothing in it.
pub(super) fn no_local() -> LocalIndexes {
    LocalIndexes::open(std::path::Path::new("/nonexistent")).unwrap()
}

async fn create(
    folder: &TempDir,
    platform: &str,
    span_size: u64,
    min_layer_size: u64,
) -> Result<CreateReport> {
    let options = CreateOptions {
        compact_span_size: None,
        span_size,
        min_layer_size,
        build_tool: AWS_TOOL.to_owned(),
        ..CreateOptions::default()
    };
    let image = resolve(folder, platform).await?;
    create::create(&image, &options, &no_local(), &|_, _, _| {}).await
}

#[test]
fn index_manifests_are_accepted_and_rejected_as_by_awss_tool() {
    let vectors = Vectors::open();
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for case in vectors.accepts("index") {
        let bytes = case.bytes();
        let parsed = IndexManifest::parse(&bytes);
        *outcomes.entry(case.outcome).or_default() += 1;
        if case.outcome == "rejected" {
            assert!(parsed.is_err(), "{} was accepted", case.id);
            continue;
        }
        let index = parsed.unwrap_or_else(|error| panic!("{}: {error:?}", case.id));
        let soci = &case.case["soci"];
        assert_eq!(
            index.version.artifact_type(),
            text(&soci["artifact_type"]),
            "{}",
            case.id
        );
        assert_eq!(
            index.layers.len() as i64,
            number(&soci["blobs"]),
            "{}",
            case.id
        );
        assert_eq!(
            json!(index.subject.is_some()),
            soci["has_subject"],
            "{}",
            case.id
        );
        let annotations = match &soci["annotations"] {
            Value::Null => json!({}),
            other => other.clone(),
        };
        assert_eq!(json!(index.annotations), annotations, "{}", case.id);
        // Go tells an absent list from an empty one
        let has_null_layers = bytes
            .windows(13)
            .any(|window| window == br#""layers":null"#);
        if soci["reserialised_identical"] == true && !has_null_layers {
            assert_eq!(index.to_bytes().unwrap(), bytes, "{}", case.id);
        }
    }
    assert!(
        outcomes["accepted"] >= 20 && outcomes["rejected"] >= 10,
        "{outcomes:?}"
    );
}

#[test]
fn prefetch_artifacts_are_accepted_and_rejected_as_by_awss_tool() {
    let vectors = Vectors::open();
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for case in vectors.accepts("prefetch") {
        let parsed = Prefetch::parse(&case.bytes());
        *outcomes.entry(case.outcome).or_default() += 1;
        if case.outcome == "rejected" {
            assert!(parsed.is_err(), "{} was accepted", case.id);
            continue;
        }
        let prefetch = parsed.unwrap_or_else(|error| panic!("{}: {error:?}", case.id));
        let made: Value = serde_json::from_slice(&prefetch.to_bytes().unwrap()).unwrap();
        assert_eq!(made, case.case["soci"]["value"], "{}", case.id);
        for count in [0, 1, 1000] {
            assert!(
                prefetch
                    .runs(count)
                    .iter()
                    .all(|run| run.end.get() <= count),
                "{}",
                case.id
            );
        }
    }
    assert!(
        outcomes["accepted"] >= 8 && outcomes["rejected"] >= 8,
        "{outcomes:?}"
    );
}

#[test]
fn a_damaged_document_is_an_error_or_a_document() {
    let vectors = Vectors::open();
    let layer = Digest::of(b"some layer");
    let mut parsed = 0;
    for id in ["index-v1-good", "index-v2-good", "prefetch-priority"] {
        let kind = id.split('-').next().unwrap();
        let good = vectors
            .accepts(kind)
            .find(|case| case.id == id)
            .unwrap()
            .bytes();
        for position in 0..good.len() {
            for change in [0x01, 0x20, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[position] ^= change;
                what_is(&bytes, "");
                let _ = manifest::parse(&bytes, "");
                if let Ok(index) = IndexManifest::parse(&bytes) {
                    parsed += 1;
                    let _ = (index.ztoc_of(&layer), index.prefetch_of(&layer));
                    assert_eq!(
                        IndexManifest::parse(&index.to_bytes().unwrap()).unwrap(),
                        index
                    );
                }
                if let Ok(prefetch) = Prefetch::parse(&bytes) {
                    parsed += 1;
                    prefetch.runs(u32::MAX);
                    assert_eq!(
                        Prefetch::parse(&prefetch.to_bytes().unwrap()).unwrap(),
                        prefetch
                    );
                }
            }
        }
    }
    assert!(parsed > 1000, "{parsed}");
}

#[test]
fn every_image_is_resolved_and_its_index_found() {
    let vectors = Vectors::open();
    let mut versions = BTreeMap::<u8, usize>::new();
    for case in vectors
        .images()
        .iter()
        .filter(|case| case.get("layout").is_some())
    {
        let id = text(&case["id"]);
        let folder = layout(&vectors, case);
        let mut images = 0;
        for platform in PLATFORMS {
            let found = run(async {
                let image = match resolve(&folder, platform).await {
                    Ok(image) => image,
                    Err(error) if error.kind() == Kind::NotFound => return None,
                    Err(error) => panic!("{id} {platform}: {}", error.report()),
                };
                let found = search::find(&image, &IndexChoice::default(), &no_local())
                    .await
                    .unwrap();
                assert!(found.warnings.is_empty(), "{id}: {:?}", found.warnings);
                if let Some(index) = &found.index {
                    for layer in index.ztocs.keys() {
                        let ztoc = index.fetch_ztoc(layer).await.unwrap();
                        let parsed = Ztoc::parse(&ztoc).unwrap();
                        let blob = image
                            .layers
                            .iter()
                            .find(|blob| blob.digest == *layer)
                            .unwrap();
                        assert_eq!(parsed.spans.compressed_size, blob.size, "{id}");
                    }
                }
                Some(found.index)
            });
            let Some(index) = found else { continue };
            images += 1;
            match (id.split('-').next().unwrap(), index) {
                ("src", None) => {}
                ("v1", Some(index)) => {
                    assert_eq!(
                        (index.version, index.origin),
                        (1, IndexOrigin::Referrer),
                        "{id}"
                    );
                    assert!(!index.ztocs.is_empty(), "{id}");
                    *versions.entry(1).or_default() += 1;
                }
                ("v2", Some(index)) => {
                    assert_eq!(
                        (index.version, index.origin),
                        (2, IndexOrigin::Annotation),
                        "{id}"
                    );
                    assert!(!index.ztocs.is_empty(), "{id}");
                    *versions.entry(2).or_default() += 1;
                }
                // one platform of two was converted
                ("v2", None) if platform == "linux/amd64" && id.ends_with("arm64") => {}
                ("v2", None) if platform == "linux/arm64" && !id.ends_with("arm64") => {}
                (_, index) => panic!("{id} {platform}: {:?}", index.map(|index| index.digest)),
            }
        }
        assert!(images > 0, "{id}");
    }
    assert!(versions[&1] >= 7 && versions[&2] >= 12, "{versions:?}");
}

#[test]
fn every_index_of_the_images_is_made_again_byte_for_byte() {
    let vectors = Vectors::open();
    let mut made = BTreeMap::<bool, usize>::new(); // by whether it is of version 1
    let pool = vectors.path(&json!("images/blobs/sha256"));
    for blob in fs::read_dir(pool).unwrap() {
        let bytes = fs::read(blob.unwrap().path()).unwrap();
        let Ok(index) = IndexManifest::parse(&bytes) else {
            continue;
        };
        assert_eq!(index.to_bytes().unwrap(), bytes);
        assert_eq!(index.build_tool(), Some(AWS_TOOL));
        *made.entry(index.version == Version::V1).or_default() += 1;
    }
    assert!(made[&true] >= 5 && made[&false] >= 6, "{made:?}");
}

#[test]
fn version_1_indexes_made_from_the_source_images_are_those_of_awss_tool() {
    let vectors = Vectors::open();
    for id in ["v1-single", "v1-multi", "v1-docker"] {
        let case = case(&vectors, id);
        let theirs = layout(&vectors, case);
        let ours = layout(&vectors, self::case(&vectors, text(&case["source"])));
        let mut compared = 0;
        for platform in PLATFORMS {
            run(async {
                let Ok(image) = resolve(&theirs, platform).await else {
                    return;
                };
                let expected = search::find(&image, &IndexChoice::default(), &no_local())
                    .await
                    .unwrap();
                let report = create(&ours, platform, options::DEFAULT_SPAN_SIZE, 0)
                    .await
                    .unwrap();
                assert_eq!(
                    Some(report.index),
                    expected.index.map(|index| index.digest),
                    "{id} {platform}"
                );
                compared += 1;

                let image = resolve(&ours, platform).await.unwrap();
                let found = search::find(&image, &IndexChoice::default(), &no_local())
                    .await
                    .unwrap();
                assert_eq!(
                    found.index.unwrap().digest,
                    report.index,
                    "it was stored where the image is"
                );
            });
        }
        assert_eq!(compared, if id == "v1-single" { 1 } else { 2 }, "{id}");
    }
}

#[test]
fn span_size_and_smallest_layer_are_obeyed_as_by_awss_tool() {
    let vectors = Vectors::open();
    for (id, span_size, min_layer_size) in [
        ("v1-single-span16k-prefetch", 16384, 0),
        ("v1-single-min8k-xattr", options::DEFAULT_SPAN_SIZE, 8192),
    ] {
        let theirs = layout(&vectors, case(&vectors, id));
        let ours = layout(&vectors, case(&vectors, "src-single"));
        run(async {
            let image = resolve(&theirs, "linux/amd64").await.unwrap();
            let expected = search::find(&image, &IndexChoice::default(), &no_local())
                .await
                .unwrap()
                .index
                .unwrap();
            let report = create(&ours, "linux/amd64", span_size, min_layer_size)
                .await
                .unwrap();
            let made: BTreeMap<Digest, Digest> = report
                .layers
                .iter()
                .filter_map(|layer| match &layer.outcome {
                    LayerOutcome::Indexed { ztoc, .. } => Some((layer.layer, *ztoc)),
                    LayerOutcome::Skipped { .. } => None,
                })
                .collect();
            let expected: BTreeMap<Digest, Digest> = expected
                .ztocs
                .iter()
                .map(|(layer, ztoc)| (*layer, ztoc.digest))
                .collect();
            assert_eq!(made, expected, "{id}");
        });
    }
}

#[test]
fn layers_that_cannot_have_a_ztoc_are_skipped_and_all_of_them_are_an_error() {
    let vectors = Vectors::open();
    let mixed = layout(&vectors, case(&vectors, "src-mixed"));
    let report = run(create(&mixed, "linux/amd64", options::DEFAULT_SPAN_SIZE, 0)).unwrap();
    let theirs = layout(&vectors, case(&vectors, "v2-mixed"));
    let text = report.to_string();
    assert!(
        text.contains("ztoc skipped - layer sha256:360f0f28"),
        "{text}"
    );
    run(async {
        let image = resolve(&theirs, "linux/amd64").await.unwrap();
        let index = search::find(&image, &IndexChoice::default(), &no_local())
            .await
            .unwrap()
            .index
            .unwrap();
        for (layer, ztoc) in &index.ztocs {
            assert!(
                text.contains(&format!("layer {layer} -> ztoc {}", ztoc.digest)),
                "{text}"
            );
        }
    });

    for (id, min_layer_size) in [
        ("src-zstd-only", 0),
        ("src-single", options::DEFAULT_MIN_LAYER_SIZE),
    ] {
        let folder = layout(&vectors, case(&vectors, id));
        let before = fs::read(folder.path().join("index.json")).unwrap();
        let error = run(create(
            &folder,
            "linux/amd64",
            options::DEFAULT_SPAN_SIZE,
            min_layer_size,
        ))
        .unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(
            error.report().contains("every layer was skipped"),
            "{}",
            error.report()
        );
        assert_eq!(fs::read(folder.path().join("index.json")).unwrap(), before);
    }
}
