//! Making an index: what is skipped, what is refused, and where it goes.

use std::{fs, sync::Mutex};

use serde_json::json;
use socinbd::{
    engine::{
        Image,
        make::{create, options::CreateOptions, report::CreateReport},
        open::local_indexes::LocalIndexes,
    },
    error::{Kind, Result},
    oci::Digest,
};
use tempfile::TempDir;

use super::{
    make::{GZIP_LAYER, MadeLayout, PLAIN_LAYER, digest, tar_of},
    open, run,
};
use crate::support::{noise, registry::Registry};

const ZSTD_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn options(min_layer_size: u64) -> CreateOptions {
    CreateOptions {
        min_layer_size,
        ..CreateOptions::default()
    }
}

async fn create(reference: &str, root: &TempDir, min_layer_size: u64) -> Result<CreateReport> {
    let image = Image::resolve(&open(reference).await?, None).await?;
    let local = LocalIndexes::open(root.path())?;
    create::create(&image, &options(min_layer_size), &local, &|_, _, _| {}).await
}

#[test]
fn each_layer_is_read_once_and_told_about() {
    let mut made = MadeLayout::new();
    let large = tar_of(&[("large", &noise(300_000))]);
    let image = made.image(
        "amd64",
        &[
            (GZIP_LAYER, large.clone()),
            (PLAIN_LAYER, tar_of(&[("plain", &noise(200_000))])),
            (GZIP_LAYER, tar_of(&[("small", b"x")])),
            (ZSTD_LAYER, large.clone()),
            (GZIP_LAYER, large.clone()), // again
        ],
    );
    made.tag(&image, "x");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let root = TempDir::new().unwrap();
    let told = Mutex::new(Vec::new());
    let (image, report) = run(async {
        let image = Image::resolve(&open(&registry.reference("app:x")).await.unwrap(), None)
            .await
            .unwrap();
        let local = LocalIndexes::open(root.path()).unwrap();
        let progress = |layer: Digest, done, size| told.lock().unwrap().push((layer, done, size));
        let report = create::create(&image, &options(10_000), &local, &progress)
            .await
            .unwrap();
        assert_eq!(local.list().await.unwrap()[0].digest, report.index);
        (image, report)
    });
    for (number, layer) in image.layers.iter().enumerate() {
        let sent = registry.counters().blob(&layer.digest).bytes;
        let expected = if matches!(number, 2 | 3) {
            0
        } else {
            layer.size
        };
        assert_eq!(sent, expected, "layer {number}");
    }
    let lines: Vec<String> = report.layers.iter().map(ToString::to_string).collect();
    assert!(
        lines[0].contains(" -> ztoc ") && lines[1].contains(" -> ztoc "),
        "{lines:?}"
    );
    assert!(
        lines[2].contains("is less than min-layer-size 10000"),
        "{lines:?}"
    );
    assert!(lines[3].contains("zstd"), "{lines:?}");
    assert_eq!(lines[4], lines[0]);
    assert_eq!(report.stored_in, "the state directory");
    let report = json!(report);
    assert_eq!(report["layers"][0]["layer"], json!(image.layers[0].digest));
    assert!(report["layers"][0]["ztoc"].is_string() && report["layers"][2]["skipped"].is_string());

    let told = told.into_inner().unwrap();
    for layer in [&image.layers[0], &image.layers[1]] {
        let of_layer: Vec<u64> = told
            .iter()
            .filter(|(digest, _, size)| *digest == layer.digest && *size == layer.size)
            .map(|(_, done, _)| *done)
            .collect();
        assert!(of_layer.is_sorted());
        assert_eq!(of_layer.last(), Some(&layer.size));
    }
}

#[test]
fn an_index_goes_where_the_image_is_if_that_is_a_folder() {
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", b"1")]))]);
    made.tag(&image, "x");
    let root = TempDir::new().unwrap();
    let before = fs::read(made.blob_path(&digest(&image))).unwrap();
    let report = run(create(&made.reference("x"), &root, 0)).unwrap();
    assert_eq!(report.stored_in, made.reference("x"));
    assert!(made.blob_path(&report.index).exists());
    assert_eq!(
        fs::read_dir(root.path()).unwrap().count(),
        0,
        "the state directory is not touched"
    );
    assert_eq!(
        fs::read(made.blob_path(&digest(&image))).unwrap(),
        before,
        "nor the image"
    );
    let again = run(create(&made.reference("x"), &root, 0)).unwrap();
    assert_eq!(
        again.index, report.index,
        "the same image gives the same index"
    );

    let packed = made.packed("");
    let archive = format!("oci-archive:{}:x", packed.path().display());
    let report = run(create(&archive, &root, 0)).unwrap();
    assert_eq!(report.index, again.index);
    assert!(root.path().join("content/index.json").exists());
}

#[test]
fn a_layer_that_is_not_what_the_image_says_is_refused() {
    // content of another layer under the layer's digest
    let mut made = MadeLayout::new();
    let (one, other) = (tar_of(&[("a", b"1")]), tar_of(&[("a", b"2")]));
    let image = made.image("amd64", &[(PLAIN_LAYER, one.clone())]);
    made.tag(&image, "x");
    fs::write(made.blob_path(&Digest::of(&one)), &other).unwrap();
    let root = TempDir::new().unwrap();
    let error = run(create(&made.reference("x"), &root, 0)).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error
            .report()
            .contains(&format!("has the digest {}", Digest::of(&other))),
        "{}",
        error.report()
    );

    // compressed in another way, which is named
    for (magic, name) in [
        (&b"BZh91AY&SY"[..], "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x04\x22\x4d\x18", "lz4"),
    ] {
        let mut made = MadeLayout::new();
        let layer = made.blob(GZIP_LAYER, &[magic, &noise(5000)].concat());
        let config = json!({"architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"x")]}});
        let config = made.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let image = made.manifest(&config, &[layer]);
        made.tag(&image, "x");
        let error = run(create(&made.reference("x"), &root, 0)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{}", error.report());
        let text = format!("compressed with {name}");
        assert!(error.report().contains(&text), "{}", error.report());
    }

    // no gzip where gzip is said, and no tar either
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(PLAIN_LAYER, noise(5000))]);
    made.tag(&image, "x");
    let error = run(create(&made.reference("x"), &root, 0)).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    assert_eq!(
        fs::read_dir(root.path()).unwrap().count(),
        0,
        "nothing is left of a failure"
    );
}

#[test]
fn a_layer_that_the_source_has_no_more_is_an_error() {
    let mut made = MadeLayout::new();
    let image = made.image(
        "amd64",
        &[(GZIP_LAYER, tar_of(&[("a", &noise(3_000_000))]))],
    );
    made.tag(&image, "x");
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let root = TempDir::new().unwrap();
    let bytes = fs::read(made.blob_path(&digest(&image))).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let error = run(async {
        let image = Image::resolve(&open(&registry.reference("app:x")).await.unwrap(), None)
            .await
            .unwrap();
        registry.remove("app", &digest(&manifest["layers"][0]));
        let local = LocalIndexes::open(root.path()).unwrap();
        create::create(&image, &options(0), &local, &|_, _, _| {})
            .await
            .unwrap_err()
    });
    assert_eq!(error.kind(), Kind::NotFound, "{}", error.report());
    assert!(
        error.report().contains("layer sha256:"),
        "{}",
        error.report()
    );
}
