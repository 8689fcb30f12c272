//! Images that containerd gets only if a verifier accepts them.

use std::process::Command;

use serde_json::{Value, json};
use socinbd::{oci::Digest, snapshotter::labels};
use tonic::Code;

use super::{
    Snapshotter,
    client::Client,
    image::{Container, Image},
};
use crate::{
    soci::make::{INDEX, MANIFEST},
    support::{registry::Registry, tars::Layer, verifier::TestVerifier, wait},
};

fn layers() -> Vec<Layer> {
    vec![
        Layer::new().file("etc/tag", b"lower"),
        Layer::new().file("etc/tag", b"upper"),
    ]
}

/// The labels of a layer, with another name and another manifest of its image.
fn labels_of(image: &Image, layer: usize, name: &str, manifest: &Digest) -> Vec<(String, String)> {
    let mut found = image.labels(layer);
    for (label, value) in &mut found {
        match label.as_str() {
            labels::IMAGE => name.clone_into(value),
            labels::MANIFEST => *value = manifest.to_string(),
            _ => {}
        }
    }
    found
}

/// Prepares a layer; the code and the message of the answer.
fn prepare(client: &Client, key: &str, labels: &[(String, String)]) -> (Code, String) {
    let labels: Vec<(&str, &str)> = labels
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    match client.prepare(key, "", &labels) {
        Ok(_) => (Code::Ok, String::new()),
        Err(error) => error,
    }
}

#[test]
fn an_unsigned_image_is_refused_also_where_its_layers_are_there() {
    let registry = Registry::start();
    let image = Image::push(&registry, "team/app", layers(), true);
    let verifier = TestVerifier::new(&format!("{}/team/*", registry.host()));
    let snapshotter = Snapshotter::start(&["--config", &verifier.config()]);
    let client = snapshotter.client();
    let own = image.labels(0);
    let (code, message) = prepare(&client, "default/0/x", &own);
    assert_eq!(code, Code::PermissionDenied, "{message}");
    let reason = format!("no signature for {}", image.manifest);
    assert!(message.contains(&reason), "{message}");
    assert_eq!(client.names(&[]).len(), 0);
    verifier.accept(&image.manifest);
    verifier.accept(&image.index.unwrap());
    // a failure is answered for some seconds
    wait("it is verified again", || {
        prepare(&client, "default/0/x", &own).0 == Code::AlreadyExists
    });
    let (_, top) = image.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "container", &top);
    assert_eq!(container.root.read("etc/tag"), "upper");
    // a manifest that nobody has signed, of the same layers
    let source = registry.reference("team/app");
    let url = format!("http://{}/v2/team/app/manifests/1", registry.host());
    let output = Command::new("curl").args(["-sSf", &url]).output().unwrap();
    let mut other: Value = serde_json::from_slice(&output.stdout).unwrap();
    other["annotations"] = json!({"evil": "yes"});
    let bytes = other.to_string().into_bytes();
    let unsigned = Digest::of(&bytes);
    registry.add_manifest("team/app", Some("evil"), MANIFEST, bytes);
    let labels = labels_of(&image, 0, &format!("{source}:evil"), &unsigned);
    let (code, message) = prepare(&client, "evil/0/x", &labels);
    assert_eq!(code, Code::PermissionDenied, "{message}");
    assert!(message.contains(&unsigned.to_string()), "{message}");
    container.end();
    client.remove_all();
    snapshotter.end();
}

#[test]
fn the_signature_may_be_that_of_the_image_index() {
    let registry = Registry::start();
    let image = Image::push(&registry, "team/app", layers(), true);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [{
            "mediaType": MANIFEST,
            "digest": image.manifest.to_string(),
            "size": 1,
            "platform": {"os": "linux", "architecture": "amd64"},
        }],
    });
    let bytes = index.to_string().into_bytes();
    let signed = Digest::of(&bytes);
    registry.add_manifest("team/app", Some("multi"), INDEX, bytes);
    let verifier = TestVerifier::new("*");
    verifier.accept(&signed);
    verifier.accept(&image.index.unwrap());
    let snapshotter = Snapshotter::start(&["--config", &verifier.config()]);
    let client = snapshotter.client();
    let source = registry.reference("team/app");
    for (number, name) in [format!("{source}:multi"), format!("{source}@{signed}")]
        .iter()
        .enumerate()
    {
        let labels = labels_of(&image, 0, name, &image.manifest);
        let (code, message) = prepare(&client, &format!("n{number}/0/x"), &labels);
        assert_eq!(code, Code::AlreadyExists, "{name}: {message}");
    }
    // the index does not list another manifest
    let labels = labels_of(&image, 0, &format!("{source}@{signed}"), &Digest::of(b"x"));
    let (code, message) = prepare(&client, "evil/0/x", &labels);
    assert_ne!(code, Code::AlreadyExists, "{message}");
    assert_ne!(code, Code::Ok, "{message}");
    client.remove_all();
    snapshotter.end();
}
