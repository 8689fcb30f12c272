//! OCI image layouts: in folders and in archives, whole and hostile.

use std::{fs, os::unix::fs::symlink};

use futures_util::TryStreamExt;
use serde_json::json;
use socinbd::{
    error::{Kind, Result},
    oci::Digest,
    source::{
        Manifest, Source,
        layout::{Layout, NewArtifact},
    },
};

use super::{
    make::{GZIP_LAYER, MANIFEST, MadeLayout, digest, tar_of},
    open, run,
};

fn sample() -> (MadeLayout, Digest) {
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", b"hello")]))]);
    made.tag(&image, "one");
    (made, digest(&image))
}

async fn root(reference: &str) -> Result<Manifest> {
    open(reference).await?.root_manifest().await
}

fn error(reference: &str) -> (Kind, String) {
    let error = run(root(reference)).unwrap_err();
    (error.kind(), error.report())
}

/// Reads a blob in each way there is.
async fn read_all_ways(source: &Source, blob: &Digest, expected: &[u8]) {
    let size = expected.len() as u64;
    assert_eq!(source.blob(blob, size, size).await.unwrap(), expected);
    assert_eq!(source.range(blob, 0..size).await.unwrap(), expected);
    assert_eq!(source.range(blob, 3..7).await.unwrap(), expected[3..7]);
    assert!(source.range(blob, 3..3).await.unwrap().is_empty());
    let pieces: Vec<_> = source
        .stream(blob, size)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(pieces.concat(), expected);
    assert_eq!(
        source.range(blob, 0..size + 1).await.unwrap_err().kind(),
        Kind::Corrupt
    );
    assert_eq!(
        source.blob(blob, size, size - 1).await.unwrap_err().kind(),
        Kind::Corrupt
    );
    assert_eq!(
        source.blob(blob, size - 1, size).await.unwrap_err().kind(),
        Kind::Corrupt
    );
    assert!(source.stream(blob, size + 1).await.is_err());
}

#[test]
fn a_folder_and_archives_of_it_give_the_same() {
    let (made, image) = sample();
    let large: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect(); // many pieces of a stream
    let large_digest = digest(&made.blob("application/x", &large));
    let (plain, dotted) = (made.packed(""), made.packed("./"));
    let references = [
        made.reference("one"),
        made.reference(""),
        format!("oci-archive:{}:one", plain.path().display()),
        format!("oci-archive:{}", dotted.path().display()),
    ];
    run(async {
        for reference in references {
            let source = open(&reference).await.unwrap();
            let manifest = source.root_manifest().await.unwrap();
            assert_eq!(
                (manifest.digest, &*manifest.media_type),
                (image, MANIFEST),
                "{reference}"
            );
            assert_eq!(source.manifest(&image).await.unwrap().bytes, manifest.bytes);
            read_all_ways(&source, &large_digest, &large).await;
            read_all_ways(&source, &image, &manifest.bytes).await;
            let missing = Digest::of(b"not there");
            assert_eq!(
                source.manifest(&missing).await.unwrap_err().kind(),
                Kind::NotFound
            );
        }
    });
}

#[test]
fn what_is_no_layout_is_named() {
    let empty = tempfile::TempDir::new().unwrap();
    let (kind, message) = error(&format!("oci:{}", empty.path().display()));
    assert_eq!(kind, Kind::NotFound);
    assert!(message.contains("is not an OCI image layout"), "{message}");

    let (made, _) = sample();
    fs::write(
        made.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    assert_eq!(error(&made.reference("one")).0, Kind::Unsupported);

    let gzipped = tempfile::NamedTempFile::new().unwrap();
    fs::write(gzipped.path(), super::make::gzip(&[7; 5000])).unwrap();
    let (kind, message) = error(&format!("oci-archive:{}", gzipped.path().display()));
    assert_eq!(kind, Kind::Unsupported);
    assert!(message.contains("compressed with gzip"), "{message}");

    let docker = tempfile::NamedTempFile::new().unwrap();
    fs::write(docker.path(), tar_of(&[("manifest.json", b"[]")])).unwrap();
    let (kind, message) = error(&format!("oci-archive:{}", docker.path().display()));
    assert_eq!(kind, Kind::NotFound);
    assert!(message.contains("docker save"), "{message}");

    let (kind, message) = error(&made.reference("one").replace("oci:", "oci-archive:"));
    assert_eq!(kind, Kind::Corrupt); // a folder where a file is expected
    assert!(message.contains("not a regular file"), "{message}");
}

#[test]
fn an_archive_cut_anywhere_is_an_error_or_has_what_it_has() {
    let (made, image) = sample();
    let packed = fs::read(made.packed("").path()).unwrap();
    let cut = tempfile::NamedTempFile::new().unwrap();
    let reference = format!("oci-archive:{}", cut.path().display());
    run(async {
        let mut errors = 0;
        for length in (0..packed.len()).step_by(97) {
            fs::write(cut.path(), &packed[..length]).unwrap();
            match root(&reference).await {
                Ok(manifest) => assert_eq!(manifest.digest, image),
                Err(error) => {
                    errors += 1;
                    assert!(
                        matches!(error.kind(), Kind::Corrupt | Kind::NotFound),
                        "at {length}: {}",
                        error.report()
                    );
                }
            }
        }
        assert!(errors > 10, "{errors} of {} cuts", packed.len() / 97);
    });
}

#[test]
fn an_archive_with_any_byte_changed_gives_right_bytes_or_an_error() {
    let (made, image) = sample();
    let packed = fs::read(made.packed("").path()).unwrap();
    let changed = tempfile::NamedTempFile::new().unwrap();
    let reference = format!("oci-archive:{}", changed.path().display());
    run(async {
        for position in (0..packed.len()).step_by(61) {
            let mut bytes = packed.clone();
            bytes[position] ^= 0x55;
            fs::write(changed.path(), &bytes).unwrap();
            let Ok(source) = open(&reference).await else {
                continue;
            };
            if let Ok(manifest) = source.root_manifest().await {
                assert_eq!(Digest::of(&manifest.bytes), image);
            }
        }
    });
}

#[test]
fn an_archive_of_endless_members_is_bounded() {
    // a sparse file: a header that says 8 GiB, and no such bytes
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("blobs/sha256/x").unwrap();
    header.set_size(u64::MAX - 100);
    header.set_cksum();
    fs::write(file.path(), header.as_bytes()).unwrap();
    let (kind, message) = error(&format!("oci-archive:{}", file.path().display()));
    assert_eq!(kind, Kind::Corrupt);
    assert!(
        message.contains("truncated") || message.contains("not a tar archive"),
        "{message}"
    );
}

#[test]
fn a_blob_that_is_another_is_refused() {
    let (made, image) = sample();
    let path = made.blob_path(&image);
    let mut bytes = fs::read(&path).unwrap();
    bytes[10] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let (kind, message) = error(&made.reference("one"));
    assert_eq!(kind, Kind::Corrupt);
    assert!(message.contains("its content has the digest"), "{message}");

    bytes.push(b' ');
    fs::write(&path, &bytes).unwrap();
    let (kind, message) = error(&made.reference("one"));
    assert_eq!(kind, Kind::Corrupt);
    assert!(message.contains("in its descriptor"), "{message}");

    fs::remove_file(&path).unwrap();
    assert_eq!(error(&made.reference("one")).0, Kind::NotFound);
}

#[test]
fn what_is_no_file_is_not_opened() {
    for make in [
        (|path| symlink("/dev/zero", path)) as fn(&std::path::Path) -> std::io::Result<()>,
        |path| fs::create_dir(path),
        |path| {
            rustix::fs::mkfifoat(rustix::fs::CWD, path, 0o600.into())?;
            Ok(())
        },
    ] {
        let (made, image) = sample();
        let path = made.blob_path(&image);
        fs::remove_file(&path).unwrap();
        make(&path).unwrap();
        let (kind, message) = error(&made.reference("one"));
        assert_eq!(kind, Kind::Corrupt);
        assert!(message.contains("not a regular file"), "{message}");
    }
}

#[test]
fn a_shared_pool_behind_a_symbolic_link_is_read() {
    let (made, image) = sample();
    let pool = tempfile::TempDir::new().unwrap();
    let moved = pool.path().join("pool");
    fs::rename(made.path().join("blobs"), &moved).unwrap();
    symlink(&moved, made.path().join("blobs")).unwrap();
    assert_eq!(run(root(&made.reference("one"))).unwrap().digest, image);
}

#[test]
fn an_artifact_is_stored_found_replaced_and_removed() {
    let (mut made, image) = sample();
    let mut odd =
        json!({"mediaType": MANIFEST, "digest": image, "size": 1, "x-unknown": {"kept": [1, 2]}});
    odd["annotations"]["io.containerd.image.name"] = json!("docker.io/library/x:1");
    made.list(&odd);
    let artifact = |number: u8| {
        let config = b"{}".to_vec();
        let layer = vec![number; 100];
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/test", "digest": Digest::of(&config), "size": 2},
            "layers": [{"mediaType": "application/octet-stream", "digest": Digest::of(&layer), "size": 100}],
            "subject": {"mediaType": MANIFEST, "digest": image, "size": 1},
            "annotations": {"number": number.to_string()},
        });
        NewArtifact {
            media_type: MANIFEST.to_owned(),
            manifest: manifest.to_string().into(),
            artifact_type: "application/test".to_owned(),
            annotations: [("number".to_owned(), number.to_string())].into(),
            blobs: vec![config.into(), layer.into()],
        }
    };
    run(async {
        let layout = Layout::open_folder(made.path(), Some("one")).await.unwrap();
        let numbers = async || -> Vec<String> {
            let found = layout
                .referrers(&image, Some("application/test"))
                .await
                .unwrap();
            found
                .iter()
                .map(|referrer| referrer.annotations["number"].clone())
                .collect()
        };
        assert!(numbers().await.is_empty());
        let one = layout.store(artifact(1)).await.unwrap();
        layout.store(artifact(2)).await.unwrap();
        assert_eq!(numbers().await, ["1", "2"]);
        assert_eq!(layout.store(artifact(1)).await.unwrap(), one);
        assert_eq!(
            numbers().await,
            ["2", "1"],
            "what is stored again is the newest"
        );
        assert!(
            layout
                .referrers(&image, Some("application/other"))
                .await
                .unwrap()
                .is_empty()
        );
        assert!(
            layout
                .referrers(&one, Some("application/test"))
                .await
                .unwrap()
                .is_empty()
        );
        assert_eq!(layout.root_manifest().await.unwrap().digest, image);
        let text = fs::read_to_string(made.path().join("index.json")).unwrap();
        assert!(
            text.starts_with(r#"{"schemaVersion":2,"manifests":[{"mediaType""#),
            "{text}"
        );
        let index: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(index["manifests"][1], odd, "fields that are not ours stay");
        assert_eq!(index["manifests"][3]["digest"], json!(one));

        // the same in an archive, where nothing can be added
        let packed = made.packed("");
        let archive = Layout::open_archive(packed.path(), Some("one"))
            .await
            .unwrap();
        assert_eq!(
            archive
                .referrers(&image, Some("application/test"))
                .await
                .unwrap()
                .len(),
            2
        );
        assert!(!archive.is_writable());
        assert_eq!(
            archive.store(artifact(3)).await.unwrap_err().kind(),
            Kind::Unsupported
        );
    });
}

#[test]
fn removal_frees_what_nothing_else_needs() {
    let root = tempfile::TempDir::new().unwrap();
    let folder = root.path().join("content");
    let artifact = |layers: [&[u8]; 2]| NewArtifact {
        media_type: MANIFEST.to_owned(),
        manifest: json!({
            "config": {"digest": Digest::of(b"{}")},
            "layers": layers.map(|layer| json!({"digest": Digest::of(layer)})),
        })
        .to_string()
        .into(),
        artifact_type: "application/test".to_owned(),
        annotations: Default::default(),
        blobs: vec![
            b"{}".to_vec().into(),
            layers[0].to_vec().into(),
            layers[1].to_vec().into(),
        ],
    };
    run(async {
        let layout = Layout::open_or_create(&folder, 0o700).await.unwrap();
        let first = layout
            .store(artifact([b"shared", b"only the first's"]))
            .await
            .unwrap();
        let second = layout
            .store(artifact([b"shared", b"only the second's"]))
            .await
            .unwrap();
        fs::write(folder.join("blobs/sha256/.socinbd-left"), b"by a crash").unwrap();
        let count = || fs::read_dir(folder.join("blobs/sha256")).unwrap().count();
        assert_eq!(count(), 7);
        let collected = layout.remove(&first).await.unwrap().unwrap();
        assert_eq!((collected.blobs, count()), (3, 4));
        assert_eq!(layout.remove(&first).await.unwrap(), None);
        let again = Layout::open_or_create(&folder, 0o700).await.unwrap();
        assert!(again.manifest(&second).await.is_ok());
        assert!(again.manifest(&first).await.is_err());
        again.remove(&second).await.unwrap().unwrap();
        assert_eq!(count(), 0);
    });
    use std::os::unix::fs::PermissionsExt as _;
    for (path, mode) in [
        ("content", 0o700),
        ("content/blobs/sha256", 0o700),
        ("content/index.json", 0o600),
    ] {
        let metadata = fs::metadata(root.path().join(path)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{path}");
    }
}

#[test]
fn writers_side_by_side_lose_nothing() {
    let root = tempfile::TempDir::new().unwrap();
    run(async {
        let writers = (0..16).map(|number: u32| {
            let path = root.path().to_owned();
            async move {
                let layout = Layout::open_or_create(&path, 0o700).await?;
                layout
                    .store(NewArtifact {
                        media_type: MANIFEST.to_owned(),
                        manifest: format!("{{\"number\":{number}}}").into(),
                        artifact_type: "application/test".to_owned(),
                        annotations: Default::default(),
                        blobs: Vec::new(),
                    })
                    .await
            }
        });
        futures_util::future::try_join_all(writers).await.unwrap();
    });
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(root.path().join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 16);
}
