//! From a reference to an image: the choice by platform, and errors that name what else it is.

use serde_json::{Value, json};
use socinbd::{
    engine::Image,
    error::{Kind, Result},
    oci::{Digest, Packing, Platform},
};

use super::{
    make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout, PLAIN_LAYER, digest, tar_of},
    open, run,
};

fn resolve(reference: &str, platform: Option<&str>) -> Result<Image> {
    let platform = platform.map(|text| text.parse().unwrap());
    run(async { Image::resolve(&open(reference).await?, platform.as_ref()).await })
}

fn error(made: &MadeLayout, platform: Option<&str>) -> (Kind, String) {
    match resolve(&made.reference(""), platform) {
        Ok(image) => panic!("resolved to {}", image.digest),
        Err(error) => (error.kind(), error.report()),
    }
}

fn one_layer(content: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    vec![(GZIP_LAYER, tar_of(&[("file", content)]))]
}

fn with_platform(descriptor: &Value, architecture: &str) -> Value {
    let mut descriptor = descriptor.clone();
    descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
    descriptor
}

#[test]
fn an_image_has_its_layers_and_configuration() {
    let mut made = MadeLayout::new();
    let tars = [tar_of(&[("a", b"1")]), tar_of(&[("b", b"2")])];
    let manifest = made.image(
        "amd64",
        &[
            (GZIP_LAYER, tars[0].clone()),
            (PLAIN_LAYER, tars[1].clone()),
            (GZIP_LAYER, tars[0].clone()),
        ],
    );
    made.tag(&manifest, "x");
    let image = resolve(&made.reference("x"), Some("linux/amd64")).unwrap();
    assert_eq!(image.digest, digest(&manifest));
    assert_eq!(image.index_digest, None);
    assert_eq!(image.platform.to_string(), "linux/amd64");
    assert_eq!(image.config.process.cmd, ["/bin/true"]);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(
        image.layers[0], image.layers[2],
        "equal layers are both there"
    );
    assert_eq!(
        image
            .layers
            .iter()
            .map(|layer| layer.packing)
            .collect::<Vec<_>>(),
        [Packing::Gzip, Packing::Plain, Packing::Gzip]
    );
    assert_eq!(image.layers[1].diff_id, image.layers[1].digest);
    assert_eq!(image.layers[1].size, tars[1].len() as u64);
}

#[test]
fn the_platform_chooses() {
    let mut made = MadeLayout::new();
    let [amd, arm, i386] = ["amd64", "arm64", "386"]
        .map(|arch| with_platform(&made.image(arch, &one_layer(arch.as_bytes())), arch));
    let mut attestation = with_platform(&made.image("unknown", &one_layer(b"x")), "unknown");
    attestation["platform"]["os"] = json!("unknown");
    let index = made.index(&[attestation, i386.clone(), arm.clone(), amd.clone()]);
    made.tag(&index, "x");
    for (platform, expected) in [
        ("linux/amd64", &amd),
        ("arm64/v8", &arm),
        ("linux/386", &i386),
    ] {
        let platform = if platform.starts_with("linux") {
            platform.to_owned()
        } else {
            format!("linux/{platform}")
        };
        let image = resolve(&made.reference(""), Some(&platform)).unwrap();
        assert_eq!(image.digest, digest(expected), "{platform}");
        assert_eq!(image.index_digest, Some(digest(&index)));
    }
    let (kind, message) = error(&made, Some("linux/s390x"));
    assert_eq!(kind, Kind::NotFound);
    assert!(
        message.ends_with("no image for linux/s390x; available platforms: linux/386, linux/amd64, linux/arm64; select one with --platform"),
        "{message}"
    );
}

#[test]
fn nested_indexes_and_entries_without_a_platform_are_looked_into() {
    let mut made = MadeLayout::new();
    let [amd, arm] = ["amd64", "arm64"].map(|arch| made.image(arch, &one_layer(arch.as_bytes())));
    let inner = made.index(std::slice::from_ref(&arm)); // no platform anywhere: the configurations say
    let outer = made.index(&[amd.clone(), inner]);
    made.list(&outer);
    for (platform, expected) in [("linux/amd64", &amd), ("linux/arm64", &arm)] {
        let image = resolve(&made.reference(""), Some(platform)).unwrap();
        assert_eq!(image.digest, digest(expected));
        assert_eq!(image.index_digest, Some(digest(&outer)));
    }
    assert_eq!(error(&made, Some("linux/s390x")).0, Kind::NotFound);
}

#[test]
fn a_flat_layout_of_platforms_is_an_index() {
    let mut made = MadeLayout::new();
    for arch in ["amd64", "arm64"] {
        let image = made.image(arch, &one_layer(arch.as_bytes()));
        made.list(&with_platform(&image, arch));
    }
    let image = resolve(&made.reference(""), Some("linux/arm64")).unwrap();
    assert_eq!(image.platform.to_string(), "linux/arm64");
}

#[test]
fn a_single_image_must_have_the_platform_only_if_one_is_named() {
    let mut made = MadeLayout::new();
    let image = made.image("s390x", &one_layer(b"x"));
    made.list(&image);
    assert_eq!(
        resolve(&made.reference(""), None)
            .unwrap()
            .platform
            .to_string(),
        "linux/s390x"
    );
    let (kind, message) = error(&made, Some("linux/amd64"));
    assert_eq!(kind, Kind::NotFound);
    assert!(
        message.ends_with(
            "no image for linux/amd64; available platforms: linux/s390x; select one with --platform"
        ),
        "{message}"
    );
}

#[test]
fn an_image_that_does_not_name_its_platform_is_taken() {
    let mut made = MadeLayout::new();
    let unstated = |content: &[u8]| {
        let tar = tar_of(&[("f", content)]);
        let config = json!({"rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar)]}});
        let config = made.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        made.manifest(&config, &[made.blob(PLAIN_LAYER, &tar)])
    };
    let (one, two) = (unstated(b"one"), unstated(b"two"));
    let described = made.index(&[with_platform(&one, "amd64"), with_platform(&two, "arm64")]);
    let single = made.index(std::slice::from_ref(&one));
    let several = made.index(&[one.clone(), two.clone()]);
    for (descriptor, tag) in [
        (&one, "one"),
        (&described, "described"),
        (&single, "single"),
        (&several, "several"),
    ] {
        made.tag(descriptor, tag);
    }
    let found = |tag: &str, platform| {
        let image = resolve(&made.reference(tag), platform).unwrap();
        (image.digest, image.platform)
    };
    let host = Platform::host();
    let arm: Platform = "linux/arm64".parse().unwrap();
    assert_eq!(found("one", None), (digest(&one), host.clone()));
    assert_eq!(
        found("one", Some("linux/arm64")),
        (digest(&one), arm.clone())
    );
    assert_eq!(found("described", Some("linux/arm64")), (digest(&two), arm));
    assert_eq!(found("single", None), (digest(&one), host));
    // nobody knows which of them is meant
    let error = resolve(&made.reference("several"), None).err().unwrap();
    assert!(
        error
            .report()
            .contains("available platforms: unknown/unknown;"),
        "{error:?}"
    );
}

#[test]
fn what_is_no_image_is_named() {
    let config = "application/vnd.oci.image.config.v1+json";
    for (config, layer, name) in [
        (
            "application/vnd.cncf.helm.config.v1+json",
            "application/x",
            "a Helm chart, not an image",
        ),
        (
            config,
            "application/vnd.dev.cosign.simplesigning.v1+json",
            "a cosign signature, not an image",
        ),
        (
            config,
            "application/vnd.in-toto+json",
            "an attestation (in-toto), not an image",
        ),
        (
            "application/vnd.amazon.soci.index.v1+json",
            "application/octet-stream",
            "a SOCI index (v1), not an image",
        ),
        (
            "application/vnd.oci.empty.v1+json",
            "application/spdx+json",
            "an SBOM (SPDX), not an image",
        ),
        (
            "application/vnd.oci.empty.v1+json",
            "application/thing",
            "an artifact of type \"application/thing\", not an image",
        ),
        (
            config,
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "an image with an encrypted layer (application/vnd.oci.image.layer.v1.tar+gzip+encrypted), which cannot be read: \
             decrypt the image first (skopeo copy --decryption-key)",
        ),
        (
            config,
            "application/vnd.docker.image.rootfs.diff.tar.bzip2",
            "an image with a layer that is compressed with bzip2 (application/vnd.docker.image.rootfs.diff.tar.bzip2), which cannot be read: \
             build the image with gzip or zstd layers",
        ),
    ] {
        let mut made = MadeLayout::new();
        let config = made.blob(config, b"{}");
        let layer = made.blob(layer, b"x");
        let manifest = made.manifest(&config, &[layer]);
        made.list(&manifest);
        let (kind, message) = error(&made, None);
        assert_eq!(kind, Kind::Unsupported, "{message}");
        assert!(message.ends_with(&format!("it is {name}")), "{message}");
        assert!(message.starts_with("image oci:"), "{message}");
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    // a configuration of another image
    let mut made = MadeLayout::new();
    let config = made.blob(
        "application/vnd.oci.image.config.v1+json",
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#,
    );
    let layer = made.blob(GZIP_LAYER, b"x");
    let manifest = made.manifest(&config, &[layer]);
    made.list(&manifest);
    let (kind, message) = error(&made, None);
    assert_eq!(kind, Kind::Corrupt);
    assert!(
        message.ends_with("the configuration has 0 diff IDs for 1 layers"),
        "{message}"
    );

    // an image of nothing
    let mut made = MadeLayout::new();
    let manifest = made.image("amd64", &[]);
    made.list(&manifest);
    assert_eq!(error(&made, None).0, Kind::Unsupported);

    // an index that says it is a manifest
    let mut made = MadeLayout::new();
    let mut index = made.index(&[]);
    index["mediaType"] = json!(MANIFEST);
    made.list(&index);
    let (kind, message) = error(&made, None);
    assert_eq!(kind, Kind::Corrupt);
    assert!(message.contains(INDEX), "{message}");

    // an index of indexes without end
    let mut made = MadeLayout::new();
    let mut nest = made.index(&[]);
    for _ in 0..40 {
        nest = made.index(&[nest]);
    }
    made.list(&nest);
    assert_eq!(error(&made, None).0, Kind::Unsupported);

    // a configuration that is missing
    let mut made = MadeLayout::new();
    let manifest = made.image("amd64", &one_layer(b"x"));
    let bytes = std::fs::read(made.blob_path(&digest(&manifest))).unwrap();
    let parsed: Value = serde_json::from_slice(&bytes).unwrap();
    std::fs::remove_file(made.blob_path(&digest(&parsed["config"]))).unwrap();
    made.list(&manifest);
    let (kind, message) = error(&made, None);
    assert_eq!(kind, Kind::NotFound);
    assert!(message.contains("image configuration"), "{message}");
}
