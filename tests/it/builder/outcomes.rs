//! What becomes of images that get an index, and of those that cannot have one.

use std::path::Path;

use serde_json::{Value, json};
use socinbd::soci::index::V2_TYPE;

use super::{Builder, images, open, push_event};
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout},
    support::{registry::Registry, tars::Layer},
};

/// The reasons in `failed/`.
fn failed(folder: &Path) -> Vec<Value> {
    let files = std::fs::read_dir(folder.join("root/builder/failed")).unwrap();
    files
        .map(|file| serde_json::from_slice(&std::fs::read(file.unwrap().path()).unwrap()).unwrap())
        .collect()
}

/// A registry with an image for amd64, one for arm64, and one for both.
fn platforms() -> Registry {
    let registry = Registry::start();
    let mut layout = MadeLayout::new();
    let image = |architecture: &str| {
        let tar = Layer::new().file("name", architecture.as_bytes()).tar();
        let mut image = layout.image(architecture, &[(GZIP_LAYER, tar)]);
        image["platform"] = json!({"os": "linux", "architecture": architecture});
        image
    };
    let (amd64, arm64) = (image("amd64"), image("arm64"));
    let both = layout.index(&[amd64.clone(), arm64.clone()]);
    let only = layout.index(std::slice::from_ref(&arm64));
    for (image, tag) in [
        (&amd64, "amd64"),
        (&arm64, "arm64"),
        (&only, "only"),
        (&both, "both"),
    ] {
        layout.tag(image, tag);
    }
    registry.add_layout("team/app", layout.path()).unwrap();
    registry
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_the_platform_is_given_up_with_the_reason_at_once() {
    let registry = platforms();
    let folder = tempfile::tempdir().unwrap();
    let builder = Builder::start(&registry.host(), 0, folder.path(), &[]);
    for tag in ["arm64", "only"] {
        builder.post(push_event("team/app", tag)).await;
    }
    builder.idle().await;
    assert_eq!(
        builder.counts().await,
        json!({"waiting": 0, "running": 0, "failed": 2})
    );
    for reason in failed(folder.path()) {
        let error = reason["error"].as_str().unwrap();
        assert!(error.contains("no image for linux/amd64"), "{error}");
        assert!(
            error.contains("available platforms: linux/arm64"),
            "{error}"
        );
    }
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(
        log.contains("ERROR") && log.contains("team/app:only"),
        "{log}"
    );
    assert!(!log.contains("will be retried"), "{log}");
    let metrics = builder.get("/metrics").await;
    let line = r#"socinbd_builder_images_total{outcome="failed"} 2"#;
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rules_choose_platforms() {
    let converted = async |tag: &str, more: &[&str]| {
        let registry = platforms();
        let folder = tempfile::tempdir().unwrap();
        let options = [&["--min-layer-size", "0"], more].concat();
        let builder = Builder::start_with(&registry.host(), 0, folder.path(), &options);
        builder.post(push_event("team/app", tag)).await;
        builder.idle().await;
        assert_eq!(failed(folder.path()), [] as [Value; 0]);
        let source = open(&registry.host(), &format!("team/app:{tag}-soci")).await;
        let root = source.root_manifest().await.unwrap();
        let index: Value = serde_json::from_slice(&root.bytes).unwrap();
        let entries = index["manifests"].as_array().unwrap().iter();
        entries
            .filter(|entry| entry["artifactType"] == V2_TYPE)
            .count()
    };
    let all = ["--all-platforms"];
    assert_eq!(converted("both", &all).await, 2);
    assert_eq!(converted("only", &all).await, 1);
    let two = ["--platform", "linux/amd64", "--platform", "linux/arm64"];
    assert_eq!(converted("both", &two).await, 2);
    // of several, those that the image has
    assert_eq!(converted("only", &two).await, 1);
    assert_eq!(converted("amd64", &two).await, 1);
    assert_eq!(converted("both", &two[2..]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_or_too_small_is_done_with() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let mut layout = images(["small".to_owned()].into_iter());
    let empty = layout.blob("application/vnd.oci.empty.v1+json", b"{}");
    let chart = json!({"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": empty["digest"], "size": 2});
    let chart = layout.manifest(&chart, &[empty]);
    let mut attestation = chart.clone();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let attestations = layout.index(&[attestation]);
    layout.tag(&chart, "chart");
    layout.tag(&attestations, "attestations");
    registry.add_layout("team/app", layout.path()).unwrap();
    let more = ["--platform", "linux/amd64"];
    let builder = Builder::start_with(&registry.host(), 0, folder.path(), &more);
    for tag in ["small", "chart", "attestations"] {
        builder.post(push_event("team/app", tag)).await;
    }
    builder.idle().await;
    assert_eq!(failed(folder.path()), [] as [Value; 0]);
    let metrics = builder.get("/metrics").await;
    let line = r#"socinbd_builder_images_total{outcome="skipped"} 3"#;
    assert!(metrics.contains(line), "{metrics}");
    // as a whole
    let folder = tempfile::tempdir().unwrap();
    let more = ["--min-image-size", "1000000"];
    let builder = Builder::start(&registry.host(), 0, folder.path(), &more);
    builder.post(push_event("team/app", "small")).await;
    builder.idle().await;
    let metrics = builder.get("/metrics").await;
    let line = r#"socinbd_builder_images_total{outcome="skipped"} 1"#;
    assert!(metrics.contains(line), "{metrics}");
    assert!(!registry.tags("team/app").contains_key("small-soci"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_which_no_layer_can_have_a_table_is_given_up_with_the_reason() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let mut layout = MadeLayout::new();
    let tar = Layer::new().file("name", b"name").tar();
    let image = layout.image(
        "amd64",
        &[("application/vnd.oci.image.layer.v1.tar+zstd", tar)],
    );
    layout.tag(&image, "zstd");
    registry.add_layout("team/app", layout.path()).unwrap();
    let builder = Builder::start(&registry.host(), 0, folder.path(), &[]);
    builder.post(push_event("team/app", "zstd")).await;
    builder.idle().await;
    let [reason] = &failed(folder.path())[..] else {
        panic!("one reason is expected");
    };
    assert_eq!(reason["tag"], "zstd");
    assert!(
        reason["error"].as_str().unwrap().contains("zstd"),
        "{reason}"
    );
}
