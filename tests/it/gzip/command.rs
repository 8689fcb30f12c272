//! `socinbd ztoc create`.

use assert_cmd::Command;
use serde_json::Value;
use socinbd::{oci::Digest, ztoc::Ztoc};

use super::random::{Random, gzip, tar};

fn socinbd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_socinbd"))
}

#[test]
fn a_layer_file_gets_its_ztoc_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let layer = folder.path().join("layer.tar.gz");
    let random = &mut Random::new(21);
    let (tar, files) = tar(random);
    let blob = gzip(random, &tar);
    std::fs::write(&layer, &blob).unwrap();
    let output = socinbd()
        .args(["ztoc", "create", "--json", "--span-size", "5000"])
        .args(["--build-tool", "a test"])
        .arg(&layer)
        .assert()
        .success()
        .stderr("") // a pipe sees no progress
        .get_output()
        .clone();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = folder.path().join("layer.tar.gz.ztoc");
    let bytes = std::fs::read(&path).unwrap();
    let ztoc = Ztoc::parse(&bytes).unwrap();
    assert_eq!(ztoc.build_tool, "a test");
    assert_eq!(ztoc.spans.span_size, 5000);
    assert_eq!(report["path"], path.to_str().unwrap());
    assert_eq!(report["layer"], Digest::of(&blob).to_string());
    assert_eq!(report["ztoc"], Digest::of(&bytes).to_string());
    assert_eq!(report["packing"], "gzip");
    assert_eq!(report["entries"], files.len());
    assert_eq!(report["spans"], ztoc.spans.spans.len());
}

#[test]
fn a_layer_that_can_have_none_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let layer = folder.path().join("layer");
    let (tar, _) = tar(&mut Random::new(22));
    std::fs::write(&layer, zstd::encode_all(&tar[..], 1).unwrap()).unwrap();
    let out = folder.path().join("out");
    for (bytes, word) in [
        (zstd::encode_all(&tar[..], 1).unwrap(), "zstd"),
        (b"\x1f\x8b\x08 cut".to_vec(), "gzip"),
    ] {
        std::fs::write(&layer, bytes).unwrap();
        let output = socinbd()
            .args(["ztoc", "create"])
            .arg(&layer)
            .arg("-o")
            .arg(&out)
            .assert()
            .failure()
            .get_output()
            .clone();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(word) && text.contains("layer"), "{text}");
        assert!(!out.exists());
    }
}
