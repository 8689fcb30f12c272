//! Our client against Debian's `docker-registry`, and skopeo against the registry of these tests.

use std::process::Command;

use futures_util::TryStreamExt as _;
use serde_json::json;
use socinbd::error::Kind;

use super::*;
use crate::support::{docker_registry::DockerRegistry, registry::MANIFEST, succeeds};

const LAYER: usize = 9 << 20;

/// An OCI layout with one image of one layer, tagged `1`. The layer's digest and bytes.
fn layout(folder: &std::path::Path) -> (Digest, Vec<u8>) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("the blobs' folder");
    let add = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).expect("write a blob");
        digest
    };
    let layer = noise(LAYER, 8);
    let layer_digest = add(&layer);
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer_digest.to_string()] },
    })
    .to_string();
    let config_digest = add(config.as_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest.to_string(),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer_digest.to_string(),
            "size": LAYER,
        }],
    })
    .to_string();
    let manifest_digest = add(manifest.as_bytes());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": MANIFEST,
            "digest": manifest_digest.to_string(),
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": "1" },
        }],
    });
    std::fs::write(folder.join("index.json"), index.to_string()).expect("write the index");
    std::fs::write(
        folder.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("write");
    (layer_digest, layer)
}

/// Copies an image, with a policy that takes all.
fn skopeo(folder: &std::path::Path, from: &str, to: &str) {
    let policy = folder.join("policy.json");
    std::fs::write(
        &policy,
        r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
    )
    .expect("write");
    succeeds(Command::new("skopeo").arg("--policy").arg(&policy).args([
        "copy",
        "--preserve-digests",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        from,
        to,
    ]));
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_pushes_to_and_pulls_from_the_registry_of_these_tests() {
    let folder = tempfile::tempdir().expect("a folder");
    let (blob, layer) = layout(folder.path());
    let registry = Registry::start();
    let (from, to) = (
        format!("oci:{}:1", folder.path().display()),
        format!("docker://{}", registry.reference("pushed:1")),
    );
    skopeo(folder.path(), &from, &to);
    let source = open(&registry, "pushed:1").await;
    assert_eq!(
        streamed(&source, &blob, LAYER).await.expect("the layer"),
        layer
    );

    registry
        .add_layout("served", folder.path())
        .expect("serve the layout");
    let back = folder.path().join("back");
    let (from, to) = (
        format!("docker://{}", registry.reference("served:1")),
        format!("oci:{}:1", back.display()),
    );
    skopeo(folder.path(), &from, &to);
    let pulled = std::fs::read(back.join("blobs/sha256").join(blob.hex())).expect("the layer");
    assert_eq!(pulled, layer);
}

#[tokio::test(flavor = "multi_thread")]
async fn debians_docker_registry() {
    let folder = tempfile::tempdir().expect("a folder");
    let (blob, layer) = layout(folder.path());
    let registry = DockerRegistry::start();
    let name = format!("{}/team/app:1", registry.host);
    skopeo(
        folder.path(),
        &format!("oci:{}:1", folder.path().display()),
        &format!("docker://{name}"),
    );
    let reference = name.parse().expect("a reference");
    let source = Source::open_with(&reference, &Access::default(), LIMITS)
        .await
        .expect("open");
    let manifest = source.root_manifest().await.expect("the manifest");
    assert_eq!(manifest.media_type, MANIFEST);
    assert_eq!(
        source
            .manifest(&manifest.digest)
            .await
            .expect("the same")
            .bytes,
        manifest.bytes
    );
    for range in [
        0..1_u64,
        4_000_000..4_100_000,
        LAYER as u64 - 1..LAYER as u64,
    ] {
        let got = source.range(&blob, range.clone()).await.expect("the range");
        assert_eq!(got, layer[range.start as usize..range.end as usize]);
    }
    let pieces: Vec<_> = source
        .stream(&blob, LAYER as u64)
        .await
        .expect("a stream")
        .try_collect()
        .await
        .expect("the layer");
    assert_eq!(pieces.concat(), layer);
    // its 416 has a length and no body
    let size = LAYER as u64;
    let error = source
        .range(&blob, size..size + 5)
        .await
        .expect_err("past the end");
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    // it has no referrers API, and no tag in its place
    let found = source
        .referrers(
            &manifest.digest,
            "application/vnd.amazon.soci.index.v1+json",
        )
        .await
        .expect("no referrers");
    assert!(found.is_empty());
    let error = source
        .manifest(&Digest::of(b"nothing"))
        .await
        .expect_err("no such manifest");
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
}
