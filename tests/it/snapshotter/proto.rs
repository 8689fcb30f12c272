//! The generated code of containerd's APIs is what its definitions give.

use std::{fs, path::Path};

/// Compares the code in `directory` with what these definitions in its directory `containerd` give.
fn compare(directory: &str, definitions: &[&str]) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let files = protox::compile(definitions, [directory.join("containerd")]).unwrap();
    let made = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .build_client(true)
        .build_transport(false)
        .out_dir(made.path())
        .compile_fds(files)
        .unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(made.path()).unwrap() {
        let path = entry.unwrap().path();
        let generated = fs::read_to_string(&path).unwrap();
        if generated.is_empty() {
            continue;
        }
        let stored = directory.join(path.file_name().unwrap());
        if std::env::var_os("SOCINBD_TEST_GENERATE").is_some() {
            fs::write(&stored, &generated).unwrap();
        }
        let found = fs::read_to_string(&stored).unwrap_or_default();
        assert!(
            found == generated,
            "{} differs: run this test with SOCINBD_TEST_GENERATE=1",
            stored.display()
        );
        seen += 1;
    }
    // each definition has a package of its own, and so has what they import
    assert_eq!(seen, definitions.len() + 1);
}

/// `SOCINBD_TEST_GENERATE=1` writes the files instead.
#[test]
fn the_generated_code_is_that_of_the_definitions() {
    compare(
        "src/snapshotter/proto",
        &["services/snapshots/v1/snapshots.proto"],
    );
    compare(
        "src/source/containerd/proto",
        &[
            "services/content/v1/content.proto",
            "services/images/v1/images.proto",
            "services/leases/v1/leases.proto",
        ],
    );
}
