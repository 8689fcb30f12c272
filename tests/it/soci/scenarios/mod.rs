//! AWS's `create`, `convert`, `push`, `index`, `ztoc` and `prefetch` suites, scenario by scenario, as far as no other test shows them;
//! `docs/requirements.md` lists them all.

mod convert;
mod create;
mod index;
mod push;
mod standalone;

use serde_json::Value;
use socinbd::oci::Digest;

use super::{make, open, run};
use crate::engine::Host;

/// The document that a reference names.
fn root_of(reference: &str) -> Value {
    let found = run(async {
        let source = open(reference).await.unwrap();
        source.root_manifest().await.unwrap()
    });
    serde_json::from_slice(&found.bytes).unwrap()
}

/// The digest that a reference names.
fn digest_of(reference: &str) -> Digest {
    run(async {
        let source = open(reference).await.unwrap();
        source.root_manifest().await.unwrap().digest
    })
}

/// What an image index lists.
fn entries(reference: &str) -> Vec<Value> {
    let root = root_of(reference);
    let manifests = root["manifests"].as_array();
    manifests
        .unwrap_or_else(|| panic!("{reference} is {root}"))
        .clone()
}

/// A manifest of a reference's repository or layout.
fn manifest(reference: &str, digest: &Digest) -> Value {
    let found = run(async {
        let source = open(reference).await.unwrap();
        source.manifest(digest).await.unwrap()
    });
    serde_json::from_slice(&found.bytes).unwrap()
}

/// Digests and sizes of the layers of an image's manifest.
fn layers(manifest: &Value) -> Vec<(Digest, u64)> {
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| (make::digest(layer), layer["size"].as_u64().unwrap()))
        .collect()
}

/// A host that knows nothing reads these files with an index alone, and they are these.
fn assert_reads(image: &str, platform: &str, options: &[&str], files: &[(&str, &[u8])]) {
    let host = Host::new();
    let with = ["--platform", platform, "--require-index"];
    for (path, content) in files {
        let arguments = [&["cat", image, path][..], &with, options].concat();
        let output = host.output(&arguments);
        assert!(
            output.stdout == *content,
            "{arguments:?}: {} bytes, {}",
            output.stdout.len(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
