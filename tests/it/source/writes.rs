//! Writing to registries and layouts.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use socinbd::{
    error::Kind,
    source::{
        Copied, DEFAULT_UPLOADS, Destination,
        layout::{Layout, NewArtifact},
    },
};
use tokio::sync::mpsc;

use super::*;
use crate::support::{
    docker_registry::DockerRegistry,
    registry::{Auth, Fault, INDEX, Kind as Asked, MANIFEST, On, Referrers, Times},
};

const LAYER: usize = 5 << 20;
const TYPE: &str = "application/vnd.example.thing";

async fn destination(reference: &str) -> Destination {
    destination_with(reference, &Access::default()).await
}

async fn destination_with(reference: &str, access: &Access) -> Destination {
    Destination::open_with(&reference.parse().expect("a reference"), access, LIMITS)
        .await
        .expect("opening touches no network")
}

async fn source(reference: &str) -> Source {
    Source::open_with(
        &reference.parse().expect("a reference"),
        &Access::default(),
        LIMITS,
    )
    .await
    .expect("open")
}

/// A small artifact that refers to a manifest.
fn artifact(name: &str, subject: &Bytes) -> NewArtifact {
    let blob = Bytes::from(name.to_owned());
    let descriptor = |media_type: &str, bytes: &Bytes| json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()});
    let config = Bytes::from_static(b"{}");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor(TYPE, &config),
        "layers": [descriptor("text/plain", &blob)],
        "subject": descriptor(MANIFEST, subject),
        "annotations": {"name": name},
    });
    NewArtifact {
        media_type: MANIFEST.to_owned(),
        manifest: manifest.to_string().into(),
        artifact_type: TYPE.to_owned(),
        annotations: [("name".to_owned(), name.to_owned())].into(),
        blobs: vec![blob, config],
    }
}

/// A manifest with no layers, as a subject.
fn subject(text: &str) -> Bytes {
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": "a/b", "digest": Digest::of(b"{}"), "size": 2}, "layers": [], "annotations": {"text": text}})
        .to_string()
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_found_mounted_or_sent() {
    let registry = Registry::start();
    let layer = Bytes::from(noise(LAYER, 3));
    let digest = registry.add_blob("from/a", layer.clone());
    let size = LAYER as u64;

    let from = source(&registry.reference("from/a:1")).await;
    let to = destination(&registry.reference("to/b:1")).await;
    let copied = to
        .copy_blob(&from, &digest, size, None)
        .await
        .expect("copy");
    assert_eq!(copied, Copied::Mounted);
    let copied = to
        .copy_blob(&from, &digest, size, None)
        .await
        .expect("copy");
    assert_eq!(copied, Copied::Present);
    assert_eq!(registry.counters().blob(&digest).bytes, 0, "no byte moved");

    // from another registry its bytes pass once, and the tap hears them
    let other = Registry::start();
    let to = destination(&other.reference("to/b:1")).await;
    let (sender, mut heard) = mpsc::channel::<Bytes>(4);
    let listening = tokio::spawn(async move {
        let mut bytes = Vec::new();
        while let Some(piece) = heard.recv().await {
            bytes.extend_from_slice(&piece);
        }
        bytes
    });
    let mut sender = Some(sender);
    let mut tap = || sender.take().expect("called once");
    let copied = to
        .copy_blob(&from, &digest, size, Some(&mut tap))
        .await
        .expect("copy");
    assert_eq!(copied, Copied::Uploaded);
    assert_eq!(listening.await.expect("the listener"), layer);
    assert_eq!(registry.counters().blob(&digest).bytes, size);
    let back = source(&other.reference("to/b:1")).await;
    assert_eq!(
        streamed(&back, &digest, LAYER).await.expect("it is there"),
        layer
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_goes_on_where_it_was() {
    let registry = Registry::start();
    let layer = noise(LAYER, 4);
    let digest = registry.add_blob("a", layer.clone());
    let from = source(&registry.reference("a")).await;
    for (fault, at_least) in [
        // kept in part: the rest is sent
        (Fault::TakePart { bytes: 3 << 20 }, LAYER - (3 << 20)),
        // nothing kept: all again
        (Fault::TakePart { bytes: 0 }, LAYER),
        // it was done, and nobody heard
        (Fault::LoseAnswer, 0),
        (Fault::status(503), LAYER),
    ] {
        let other = Registry::start();
        let to = destination(&other.reference("b:1")).await;
        // the POST passes, the PUT does not
        other.fail(
            On::Kind(Asked::Upload),
            Fault::Delay(Duration::ZERO),
            Times::Next(1),
        );
        other.fail(On::Kind(Asked::Upload), fault.clone(), Times::Next(1));
        let copied = to
            .copy_blob(&from, &digest, LAYER as u64, None)
            .await
            .unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert_eq!(copied, Copied::Uploaded);
        let log = other.counters().log;
        let sent = log
            .iter()
            .filter(|entry| entry.method == "PUT")
            .filter_map(|entry| entry.headers.get("content-length")?.parse::<usize>().ok())
            .skip(1)
            .sum::<usize>();
        assert_eq!(sent, at_least, "{fault:?}: sent after the failure");
        let back = source(&other.reference("b")).await;
        assert!(streamed(&back, &digest, LAYER).await.expect("there") == layer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lies_or_fails_stores_nothing() {
    let registry = Registry::start();
    let digest = Digest::of(b"what was promised");
    registry.add_blob_as("a", digest, vec![7; 17]);
    let from = source(&registry.reference("a")).await;
    let other = Registry::start();
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("new.tar");
    for to in [
        other.reference("b:1"),
        format!("oci:{}/layout:1", folder.path().display()),
        format!("oci-archive:{}:1", archive.display()),
    ] {
        let to = destination(&to).await;
        let error = to
            .copy_blob(&from, &digest, 17, None)
            .await
            .expect_err("a lie");
        assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
        assert!(!to.has_blob(&Digest::of(&[7; 17]), 17).await.expect("ask"));
        let missing = Digest::of(b"missing");
        let error = to
            .copy_blob(&from, &missing, 5, None)
            .await
            .expect_err("none");
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        if to.reference().to_string().starts_with("oci-archive") {
            to.finish().await.expect_err("not whole");
        }
    }
    assert!(!archive.exists(), "no archive by halves");
    let blobs = std::fs::read_dir(folder.path().join("layout/blobs/sha256")).expect("the blobs");
    assert_eq!(blobs.count(), 0, "no blob by halves");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_pushing_is_asked_for() {
    let registry = Registry::start();
    registry.set_auth(Auth::Bearer {
        user: Some(("me".to_owned(), "secret".to_owned())),
        refresh_token: None,
        lifetime: Duration::from_secs(60),
    });
    let config = docker_config(&registry.host(), "me", "secret");
    let layer = Bytes::from(noise(100_000, 1));
    let digest = registry.add_blob("from", layer.clone());
    let to = destination_with(&registry.reference("to:1"), &config.access).await;
    let from = open_with(&registry, "from", &config.access, LIMITS).await;
    let copied = to
        .copy_blob(&from, &digest, 100_000, None)
        .await
        .expect("copy");
    assert_eq!(copied, Copied::Mounted);
    registry.revoke_tokens(); // in the middle of a job
    to.put_blob(&Bytes::from_static(b"more"))
        .await
        .expect("with a new token");
    to.tag_manifest(MANIFEST, &subject("x")).await.expect("put");
    assert!(registry.tags("to").contains_key("1"));
    let scopes: Vec<String> = registry
        .counters()
        .log
        .iter()
        .filter(|entry| entry.kind == Asked::Token)
        .map(|entry| entry.query.clone())
        .collect();
    assert!(
        scopes
            .iter()
            .any(|query| query.contains("repository%3Ato%3Apull%2Cpush")),
        "{scopes:?}"
    );

    let stranger = destination(&registry.reference("to:2")).await;
    let error = stranger
        .put_blob(&Bytes::from_static(b"no"))
        .await
        .expect_err("no login");
    assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
}

/// Referrers in the order of the list.
async fn names(source: &Source, subject: &Bytes) -> Vec<String> {
    let list = source
        .all_referrers(&Digest::of(subject))
        .await
        .expect("list");
    list.iter()
        .map(|referrer| {
            assert_eq!(referrer.artifact_type, TYPE);
            referrer.annotations["name"].clone()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_are_listed_with_and_without_the_api() {
    let subject = subject("x");
    let debian = DockerRegistry::start();
    let (with, without) = (Registry::start(), Registry::start());
    without.set_referrers(Referrers::Absent);
    let folder = tempfile::tempdir().expect("a folder");
    for place in [
        with.reference("app:1"),
        without.reference("app:1"),
        format!("{}/app:1", debian.host),
        format!("oci:{}:1", folder.path().display()),
    ] {
        let to = destination(&place).await;
        to.put_blob(&Bytes::from_static(b"{}"))
            .await
            .expect("the config");
        to.tag_manifest(MANIFEST, &subject)
            .await
            .expect("the subject");
        let of = Digest::of(&subject);
        let mut digests = Vec::new();
        for name in ["one", "two", "two"] {
            let put = to.put_referrer(artifact(name, &subject), &of, DEFAULT_UPLOADS);
            digests.push(put.await.expect("put"));
        }
        let source = source(&place).await;
        assert_eq!(names(&source, &subject).await, ["one", "two"], "{place}");
        assert_eq!(
            source.root_manifest().await.expect("the image").bytes,
            subject,
            "{place}: the image is as it was"
        );
        assert!(
            to.delete_referrer(&digests[0], &of).await.expect("delete"),
            "{place}"
        );
        assert_eq!(names(&source, &subject).await, ["two"], "{place}");
        assert!(
            !to.delete_referrer(&digests[0], &of).await.expect("again"),
            "{place}"
        );
    }
    let tag = format!("sha256-{}", Digest::of(&subject).hex());
    assert!(
        !with.tags("app").contains_key(&tag),
        "no list where there is the API"
    );
    assert!(without.tags("app").contains_key(&tag));
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_that_are_added_at_once_are_all_listed() {
    let registry = Registry::start();
    registry.set_referrers(Referrers::Absent);
    let subject = subject("x");
    let place = registry.reference("app:1");
    let mut work = Vec::new();
    for number in 0..8 {
        let (place, subject) = (place.clone(), subject.clone());
        work.push(tokio::spawn(async move {
            let to = destination(&place).await;
            let artifact = artifact(&format!("n{number}"), &subject);
            to.put_referrer(artifact, &Digest::of(&subject), 1).await
        }));
    }
    for task in work {
        task.await.expect("a task").expect("put");
    }
    let mut found = names(&source(&place).await, &subject).await;
    found.sort();
    assert_eq!(found, ["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7"]);
}

/// Another program, which knows nothing of our lock, writes over the list between our write and our second look.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_another_writes_over_is_changed_again() {
    let registry = Arc::new(Registry::start());
    registry.set_referrers(Referrers::Absent);
    let subject = subject("x");
    let tag = format!("sha256-{}", Digest::of(&subject).hex());
    let theirs = artifact("theirs", &subject);
    registry.add_blob("app", Bytes::from_static(b"{}"));
    let their_digest = registry.add_manifest("app", None, MANIFEST, theirs.manifest.clone());
    let list = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        {"mediaType": MANIFEST, "digest": their_digest, "size": theirs.manifest.len(), "artifactType": TYPE, "annotations": {"name": "theirs"}},
    ]});
    let watching = {
        let (registry, tag) = (Arc::clone(&registry), tag.clone());
        tokio::task::spawn_blocking(move || {
            crate::support::wait("our list is written", || {
                registry.tags("app").contains_key(&tag)
            });
            registry.add_manifest("app", Some(&tag), INDEX, list.to_string());
        })
    };
    // slow enough that the other one is in between
    registry.fail(
        On::Kind(Asked::Manifest),
        Fault::Delay(Duration::from_millis(60)),
        Times::UntilHealed,
    );
    let to = destination(&registry.reference("app:1")).await;
    to.put_referrer(artifact("ours", &subject), &Digest::of(&subject), 1)
        .await
        .expect("put");
    watching.await.expect("the other one");
    registry.heal();
    let source = source(&registry.reference("app:1")).await;
    assert_eq!(names(&source, &subject).await, ["theirs", "ours"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_are_written_whole_and_read_back() {
    let registry = Registry::start();
    let layer = noise(300_000, 9);
    let digest = registry.add_blob("a", layer.clone());
    let from = source(&registry.reference("a")).await;
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("new.tar");
    for place in [
        format!("oci:{}/layout:v1", folder.path().display()),
        format!("oci-archive:{}:v1", archive.display()),
    ] {
        let to = destination(&place).await;
        let copied = to
            .copy_blob(&from, &digest, 300_000, None)
            .await
            .expect("copy");
        assert_eq!(copied, Copied::Uploaded);
        assert_eq!(
            to.copy_blob(&from, &digest, 300_000, None)
                .await
                .expect("again"),
            Copied::Present
        );
        to.put_blob(&Bytes::from_static(b"{}"))
            .await
            .expect("config");
        to.tag_manifest(MANIFEST, &subject("old"))
            .await
            .expect("tag");
        let new = subject("new");
        if place.starts_with("oci:") {
            assert_eq!(
                to.source()
                    .await
                    .expect("source")
                    .expect("a folder")
                    .tagged("v1")
                    .await
                    .expect("tagged")
                    .map(|found| found.bytes),
                Some(subject("old"))
            );
            to.tag_manifest(MANIFEST, &new).await.expect("tag again");
        }
        to.put_referrer(artifact("one", &new), &Digest::of(&new), 1)
            .await
            .expect("refer");
        to.finish().await.expect("finish");
        let source = source(&place).await;
        let expected = if place.starts_with("oci:") {
            &new
        } else {
            &subject("old")
        };
        assert_eq!(source.root_manifest().await.expect("root").bytes, *expected);
        assert_eq!(
            streamed(&source, &digest, layer.len())
                .await
                .expect("the layer"),
            layer
        );
        assert_eq!(names(&source, &new).await, ["one"]);
        assert_eq!(source.tags().await.expect("tags"), ["v1"]);
    }
    // an independent reader of the archive
    let output = std::process::Command::new("tar")
        .arg("-tf")
        .arg(&archive)
        .output()
        .expect("tar");
    assert!(output.status.success(), "{output:?}");
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        listed.contains(&format!("blobs/sha256/{}\n", digest.hex())),
        "{listed}"
    );
    let layout = Layout::open_folder(&folder.path().join("layout"), None).await;
    layout.expect("it is one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_of_a_folder_gets_a_second_name_where_it_can() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let home = tempfile::TempDir::new().unwrap();
    let layout = |name: &str| format!("oci:{}", home.path().join(name).display());
    let first = destination(&layout("first")).await;
    let path = |name: &str, digest: &Digest| {
        home.path()
            .join(name)
            .join("blobs/sha256")
            .join(digest.hex())
    };
    let copy = async |name: &str, digest: &Digest, size: usize| {
        let from = source(&layout("first")).await;
        let to = destination(&layout(name)).await;
        let (sender, mut receiver) = tokio::sync::mpsc::channel(100);
        let mut sender = Some(sender);
        let mut tap = || sender.take().unwrap();
        let copied = to
            .copy_blob(&from, digest, size as u64, Some(&mut tap))
            .await?;
        assert_eq!(copied, Copied::Uploaded);
        let mut seen = Vec::new();
        while let Some(piece) = receiver.recv().await {
            seen.extend_from_slice(&piece);
        }
        assert_eq!(Digest::of(&seen), *digest);
        Ok::<_, socinbd::error::Error>(path(name, digest).metadata().unwrap().ino())
    };
    let (plain, odd) = (Bytes::from(vec![1; 3_000_000]), Bytes::from_static(b"odd"));
    first.put_blob(&plain).await.unwrap();
    first.put_blob(&odd).await.unwrap();
    let (plain, odd) = (Digest::of(&plain), Digest::of(&odd));
    // the very file
    let inode = path("first", &plain).metadata().unwrap().ino();
    assert_eq!(copy("second", &plain, 3_000_000).await.unwrap(), inode);
    // another mode, and a symbolic link: copied
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path("first", &odd), mode).unwrap();
    let inode = path("first", &odd).metadata().unwrap().ino();
    assert_ne!(copy("second", &odd, 3).await.unwrap(), inode);
    std::fs::rename(path("first", &plain), home.path().join("pool")).unwrap();
    std::os::unix::fs::symlink(home.path().join("pool"), path("first", &plain)).unwrap();
    copy("third", &plain, 3_000_000).await.unwrap();
    assert!(path("third", &plain).symlink_metadata().unwrap().is_file());
    // other bytes than the digest's have no name in the end
    std::fs::remove_file(path("first", &plain)).unwrap();
    std::fs::write(path("first", &plain), vec![2; 3_000_000]).unwrap();
    let error = copy("fourth", &plain, 3_000_000).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    let left = std::fs::read_dir(home.path().join("fourth/blobs/sha256")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_registry_takes_is_a_named_error() {
    let registry = Registry::start();
    let to = destination(&registry.reference("a:1")).await;
    for (code, kind) in [
        (400, Kind::Unsupported),
        (403, Kind::Unauthorized),
        (409, Kind::Unsupported),
    ] {
        registry.fail(
            On::Kind(Asked::Manifest),
            Fault::status(code),
            Times::Next(1),
        );
        let error = to
            .tag_manifest(MANIFEST, &subject("x"))
            .await
            .expect_err("refused");
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    let by_digest = destination(&registry.reference(&format!("a@{}", Digest::of(b"x")))).await;
    let error = by_digest
        .tag_manifest(MANIFEST, &subject("x"))
        .await
        .expect_err("a digest");
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_says_is_not_followed_by_guesses() {
    let registry = Registry::start();
    let to = destination(&registry.reference("a:1")).await;
    let manifest = |code| {
        (
            On::Kind(Asked::Manifest),
            Fault::status(code),
            Times::Next(1),
        )
    };
    let (on, fault, times) = manifest(400);
    registry.fail(on, fault, times);
    let error = to.tag_manifest(MANIFEST, &subject("x")).await;
    let report = error.expect_err("refused").report();
    assert!(!report.contains("TLS"), "{report}");
    let begun = Fault::Answer {
        code: 202,
        headers: Vec::new(),
        body: Bytes::new(),
    };
    registry.fail(On::Kind(Asked::Upload), begun, Times::Next(1));
    let error = to.put_blob(&Bytes::from_static(b"x")).await;
    let report = error.expect_err("nowhere to send it to").report();
    assert!(
        report.contains("begins an upload") && report.contains("without a valid Location"),
        "{report}"
    );
}

/// As the documentation of registries has it.
const IMMUTABLE: [(u16, &str, &str); 6] = [
    (
        400,
        "TAG_INVALID",
        "The image tag '1' already exists in the 'a' repository and cannot be overwritten because the tag is immutable.",
    ),
    (
        412,
        "PRECONDITION",
        "Failed to process request due to 'a:1' configured as immutable.",
    ),
    (
        403,
        "DENIED",
        "The tag:a:1 is immutable, cannot be overwrite.",
    ),
    (409, "TAG_IMMUTABLE", "no"),
    (
        405,
        "UNKNOWN",
        "The requested tag already exists and cannot be overwritten.",
    ),
    (400, "ImageTagAlreadyExistsException", ""),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_its_registry_keeps_is_a_named_error() {
    let registry = Registry::start();
    let to = destination(&registry.reference("a:1")).await;
    to.tag_manifest(MANIFEST, &subject("first")).await.unwrap();
    for (code, name, message) in IMMUTABLE {
        let immutable = Fault::Answer {
            code,
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: json!({"errors": [{"code": name, "message": message}]})
                .to_string()
                .into(),
        };
        registry.fail(On::Kind(Asked::Manifest), immutable.clone(), Times::Next(1));
        let error = to.tag_manifest(MANIFEST, &subject("x")).await;
        let error = error.expect_err("immutable");
        assert_eq!(error.kind(), Kind::Immutable, "{error:?}");
        let report = error.report();
        assert!(
            report.contains("the tag 1 of") && report.contains("another tag"),
            "{report}"
        );
        assert!(report.contains(name), "{report}");
        // what it names already it may be told again
        registry.fail(On::Kind(Asked::Manifest), immutable, Times::Next(1));
        to.tag_manifest(MANIFEST, &subject("first")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_listed_through_pages() {
    let debian = DockerRegistry::start();
    let mut expected = Vec::new();
    for number in 0..7 {
        let to = destination(&format!("{}/app:v{number}", debian.host)).await;
        to.put_blob(&Bytes::from_static(b"{}"))
            .await
            .expect("config");
        to.tag_manifest(MANIFEST, &subject("x")).await.expect("tag");
        expected.push(format!("v{number}"));
    }
    let found = source(&format!("{}/app", debian.host))
        .await
        .tags()
        .await
        .expect("tags");
    assert_eq!(found, expected);
    let registry = Registry::start();
    let first = Fault::Replace {
        content_type: "application/json".to_owned(),
        body: Bytes::from_static(br#"{"tags":["b","c"]}"#),
        headers: vec![(
            "link".to_owned(),
            "</v2/app/tags/list?last=c>; rel=\"next\"".to_owned(),
        )],
    };
    registry.fail(On::Kind(Asked::Tags), first, Times::Next(1));
    registry.tag("app", "a", Digest::of(b"x"));
    let found = source(&registry.reference("app"))
        .await
        .tags()
        .await
        .expect("tags");
    assert_eq!(found, ["a", "b", "c"]);
    let _: Value = json!(found);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lies_about_an_upload_is_not_believed() {
    let registry = Registry::start();
    let layer = noise(LAYER, 5);
    let digest = registry.add_blob("a", layer.clone());
    let from = source(&registry.reference("a")).await;
    let status = |range: &str| Fault::Answer {
        code: 204,
        headers: vec![("range".to_owned(), range.to_owned())],
        body: Bytes::new(),
    };
    for range in [
        "0-99999999999",
        "0-0",
        "nonsense",
        "0-18446744073709551615",
        "",
    ] {
        let other = Registry::start();
        let to = destination(&other.reference("b:1")).await;
        let pass = |times| {
            other.fail(
                On::Kind(Asked::Upload),
                Fault::Delay(Duration::ZERO),
                Times::Next(times),
            )
        };
        pass(1); // POST
        other.fail(
            On::Kind(Asked::Upload),
            Fault::TakePart { bytes: 1 << 20 },
            Times::Next(1),
        );
        other.fail(On::Kind(Asked::Upload), status(range), Times::Next(1));
        let copied = to
            .copy_blob(&from, &digest, LAYER as u64, None)
            .await
            .unwrap_or_else(|error| panic!("{range:?}: {error:?}"));
        assert_eq!(copied, Copied::Uploaded);
        let back = source(&other.reference("b")).await;
        assert!(
            streamed(&back, &digest, LAYER).await.expect("there") == layer,
            "{range:?}"
        );
    }
    // an upload that is to go on elsewhere gets no credentials there, and what is less safe is refused
    let other = Registry::start();
    other.set_auth(Auth::Basic {
        user: "me".to_owned(),
        password: "secret".to_owned(),
    });
    let config = docker_config(&other.host(), "me", "secret");
    let elsewhere = Registry::start();
    let to = destination_with(&other.reference("b:1"), &config.access).await;
    to.put_blob(&Bytes::from_static(b"first"))
        .await
        .expect("logged in");
    let away = Fault::Answer {
        code: 202,
        headers: vec![(
            "location".to_owned(),
            format!("http://{}/v2/b/blobs/uploads/7", elsewhere.host()),
        )],
        body: Bytes::new(),
    };
    other.fail(On::Kind(Asked::Upload), away, Times::UntilHealed);
    let failed = to.copy_blob(&from, &digest, LAYER as u64, None).await;
    assert_eq!(
        failed.expect_err("no such upload there").kind(),
        Kind::NotFound
    );
    let log = elsewhere.counters().log;
    assert!(!log.is_empty());
    assert!(
        log.iter()
            .all(|entry| !entry.headers.contains_key("authorization"))
    );

    let wrong = Fault::Answer {
        code: 201,
        headers: vec![(
            "docker-content-digest".to_owned(),
            Digest::of(b"other").to_string(),
        )],
        body: Bytes::new(),
    };
    let to = destination(&registry.reference("b:1")).await;
    registry.fail(On::Kind(Asked::Manifest), wrong, Times::Next(1));
    let error = to
        .tag_manifest(MANIFEST, &subject("x"))
        .await
        .expect_err("another digest");
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_nobody_takes_ends() {
    let registry = Registry::start();
    let limits = Limits {
        stall: Duration::from_millis(50),
        ..IMPATIENT
    };
    let to = Destination::open_with(
        &registry.reference("a:1").parse().expect("a reference"),
        &Access::default(),
        limits,
    )
    .await
    .expect("open");
    registry.fail(
        On::Kind(Asked::Upload),
        Fault::Delay(Duration::ZERO),
        Times::Next(1),
    );
    registry.fail(On::Kind(Asked::Upload), Fault::Hang, Times::UntilHealed);
    let error = to
        .put_blob(&Bytes::from(noise(200_000, 2)))
        .await
        .expect_err("no answer");
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    assert!(error.report().contains("uploading blob"), "{error:?}");
}
