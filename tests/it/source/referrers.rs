//! Lists of referrers as they are in registries: of others, odd, or something else under a list's tag.

use bytes::Bytes;
use serde_json::{Value, json};
use socinbd::{
    error::Kind,
    oci::{media_type::DOCKER_LIST, referrers::referrers_tag},
    source::{Destination, layout::NewArtifact},
};

use super::*;
use crate::support::{
    docker_registry::DockerRegistry,
    registry::{Fault, INDEX, Kind as Of, MANIFEST, On, Referrers, Times},
};

const TYPE: &str = "application/vnd.amazon.soci.index.v1+json";

/// Opened as a source, and to be written to.
async fn places(host: &str) -> (Source, Destination) {
    let reference = format!("{host}/app:1").parse().expect("a reference");
    let access = Access::default();
    let source = Source::open_with(&reference, &access, IMPATIENT).await;
    let destination = Destination::open_with(&reference, &access, IMPATIENT).await;
    (source.expect("open"), destination.expect("open"))
}

fn subject() -> Bytes {
    let config = json!({"mediaType": "a/b", "digest": Digest::of(b"{}"), "size": 2});
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []})
        .to_string()
        .into()
}

/// A manifest that refers to the subject, or to nothing.
fn manifest(name: &str, artifact_type: &str, subject: Option<&Digest>) -> Bytes {
    let mut manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "layers": [], "annotations": {"name": name},
        "config": {"mediaType": artifact_type, "digest": Digest::of(b"{}"), "size": 2},
    });
    if let Some(subject) = subject {
        manifest["subject"] = json!({"mediaType": MANIFEST, "digest": subject, "size": 1});
    }
    manifest.to_string().into()
}

fn artifact(name: &str, subject: &Digest) -> NewArtifact {
    NewArtifact {
        media_type: MANIFEST.to_owned(),
        manifest: manifest(name, TYPE, Some(subject)),
        artifact_type: TYPE.to_owned(),
        annotations: [("name".to_owned(), name.to_owned())].into(),
        blobs: vec![Bytes::from_static(b"{}")],
    }
}

fn entry(manifest: &Bytes, artifact_type: Value) -> Value {
    json!({"mediaType": MANIFEST, "digest": Digest::of(manifest), "size": manifest.len(), "artifactType": artifact_type})
}

fn index(entries: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
}

async fn names(source: &Source, subject: &Digest) -> Vec<String> {
    let list = source.referrers(subject, TYPE).await.expect("a list");
    list.iter()
        .map(|found| found.annotations.get("name").cloned().unwrap_or_default())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_has_the_tag_of_a_list_is_neither_read_nor_changed() {
    let of = Digest::of(&subject());
    let image = manifest("image", "application/vnd.oci.image.config.v1+json", None);
    let other = manifest("other", TYPE, Some(&of));
    let with = |mut document: Value, field: &str, value: Value| {
        document[field] = value;
        document.to_string()
    };
    let platform = json!({"os": "linux", "architecture": "amd64"});
    let for_platform = |entry: Value| with(entry, "platform", platform.clone());
    let parsed = |text: String| serde_json::from_str::<Value>(&text).expect("JSON");
    let listed = entry(&other, json!(TYPE));
    let docker = index(&[parsed(for_platform(entry(&image, Value::Null)))]);
    for (media_type, document) in [
        (
            MANIFEST,
            String::from_utf8(subject().to_vec()).expect("text"),
        ),
        (MANIFEST, String::from_utf8(image.to_vec()).expect("text")),
        (MANIFEST, String::from_utf8(other.to_vec()).expect("text")),
        (INDEX, index(&[entry(&image, Value::Null)]).to_string()),
        (
            INDEX,
            index(&[listed.clone(), entry(&image, Value::Null)]).to_string(),
        ),
        (
            INDEX,
            index(&[parsed(for_platform(entry(&image, Value::Null)))]).to_string(),
        ),
        (
            INDEX,
            index(&[parsed(for_platform(listed.clone()))]).to_string(),
        ),
        (DOCKER_LIST, with(docker, "mediaType", json!(DOCKER_LIST))),
        (
            INDEX,
            with(index(std::slice::from_ref(&listed)), "layers", json!([])),
        ),
        (
            INDEX,
            with(
                index(std::slice::from_ref(&listed)),
                "artifactType",
                json!("a/b"),
            ),
        ),
    ] {
        let registry = Registry::start();
        registry.set_referrers(Referrers::Absent);
        registry.add_manifest("app", Some("1"), MANIFEST, subject());
        registry.add_manifest("app", None, MANIFEST, image.clone());
        registry.add_manifest("app", None, MANIFEST, other.clone());
        let tag = referrers_tag(&of);
        registry.add_manifest("app", Some(&tag), media_type, document.clone());
        let before = registry.tags("app");
        let (source, destination) = places(&registry.host()).await;
        assert_eq!(names(&source, &of).await, [""; 0], "{document}");
        let error = destination
            .put_referrer(artifact("ours", &of), &of, 1)
            .await
            .expect_err(&document);
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        let report = error.report();
        assert!(
            report.contains(&tag) && report.contains("socinbd convert"),
            "{report}"
        );
        // a referrer that no list names can still be removed
        let removed = destination.delete_referrer(&Digest::of(&other), &of).await;
        assert!(removed.expect("remove"), "{document}");
        let mut after = registry.tags("app");
        if document.as_bytes() == other {
            after.insert(tag.clone(), Digest::of(&other));
        }
        assert_eq!(after, before, "{document}");
        for asked in registry.counters().log {
            let is_other = asked.digest == Some(Digest::of(&other));
            assert!(
                asked.method != "DELETE" || is_other,
                "{document}: {asked:?}"
            );
            assert!(
                !(asked.method == "PUT" && asked.path.ends_with(&tag)),
                "{document}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_without_a_type_are_referrers_if_their_manifests_say_so() {
    let registry = Registry::start();
    registry.set_referrers(Referrers::Absent);
    let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
    let theirs = manifest("theirs", TYPE, Some(&of));
    registry.add_manifest("app", None, MANIFEST, theirs.clone());
    let mut untyped = entry(&theirs, Value::Null);
    untyped["annotations"] = json!({"name": "theirs"});
    let tag = referrers_tag(&of);
    registry.add_manifest("app", Some(&tag), INDEX, index(&[untyped]).to_string());
    let (source, destination) = places(&registry.host()).await;
    assert_eq!(names(&source, &of).await, ["theirs"]);
    let put = destination.put_referrer(artifact("ours", &of), &of, 1);
    put.await.expect("it is a list");
    assert_eq!(names(&source, &of).await, ["theirs", "ours"]);
}

/// A registry removes a manifest with all its tags; and lists of two subjects may be the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_was_replaced_stays_for_who_names_it_too() {
    let debian = DockerRegistry::start();
    let (source, destination) = places(&debian.host).await;
    destination
        .put_blob(&Bytes::from_static(b"{}"))
        .await
        .expect("the config");
    destination
        .tag_manifest(MANIFEST, &subject())
        .await
        .expect("the subject");
    let of = Digest::of(&subject());
    let put = destination.put_referrer(artifact("one", &of), &of, 1);
    let first = put.await.expect("put");
    let list = source
        .tagged(&referrers_tag(&of))
        .await
        .expect("ask")
        .expect("the list");
    destination
        .tag_as(INDEX, &list.bytes, "kept")
        .await
        .expect("tag");
    let put = destination.put_referrer(artifact("two", &of), &of, 1);
    put.await.expect("put");
    assert!(
        destination
            .delete_referrer(&first, &of)
            .await
            .expect("delete")
    );
    assert_eq!(names(&source, &of).await, ["two"]);
    let kept = source
        .tagged("kept")
        .await
        .expect("ask")
        .expect("another's tag");
    assert_eq!(kept.bytes, list.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_refers_to_the_subject_is_removed_as_its_referrer() {
    let registry = Registry::start();
    let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
    let image = manifest("image", TYPE, None);
    let of_another = manifest("x", TYPE, Some(&Digest::of(b"another")));
    let folder = tempfile::tempdir().expect("a folder");
    let layout = format!("oci:{}:1", folder.path().display());
    let layout = layout.parse().expect("a reference");
    let layout = Destination::open(&layout, &Access::default()).await;
    let layout = layout.expect("open");
    for manifest in [&image, &of_another] {
        registry.add_manifest("app", Some("kept"), MANIFEST, manifest.clone());
        layout
            .tag_as(MANIFEST, manifest, "kept")
            .await
            .expect("tag");
        for place in [&places(&registry.host()).await.1, &layout] {
            let error = place.delete_referrer(&Digest::of(manifest), &of).await;
            let error = error.expect_err("it is not one");
            assert_eq!(error.kind(), Kind::InvalidArgument, "{error:?}");
            let there = place.source().await.expect("source").expect("a source");
            let kept = there.tagged("kept").await.expect("ask");
            assert_eq!(kept.expect("it is there").bytes, *manifest);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_and_who_reads_agree_on_the_api() {
    let refused = |code: u16| Fault::Answer {
        code,
        headers: Vec::new(),
        body: Bytes::new(),
    };
    let html = Fault::Answer {
        code: 200,
        headers: vec![("content-type".to_owned(), "text/html".to_owned())],
        body: Bytes::from_static(b"<html>"),
    };
    let codes = [
        204, 400, 402, 404, 405, 406, 408, 409, 410, 413, 414, 415, 418, 422, 451, 499, 501,
    ];
    for fault in codes.map(refused).into_iter().chain([html]) {
        for says_subject in [true, false] {
            let registry = Registry::start();
            let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
            if !says_subject {
                registry.set_referrers(Referrers::Absent);
            }
            registry.fail(On::Kind(Of::Referrers), fault.clone(), Times::UntilHealed);
            let (source, destination) = places(&registry.host()).await;
            let put = destination.put_referrer(artifact("ours", &of), &of, 1);
            put.await
                .unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
            assert_eq!(names(&source, &of).await, ["ours"], "{fault:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_api_is_not_its_absence() {
    for (code, kind) in [
        (401, Kind::Unauthorized),
        (403, Kind::Unauthorized),
        (429, Kind::Unavailable),
        (500, Kind::Unavailable),
        (502, Kind::Unavailable),
        (503, Kind::Unavailable),
        (504, Kind::Unavailable),
    ] {
        let registry = Registry::start();
        let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
        registry.fail(
            On::Kind(Of::Referrers),
            Fault::status(code),
            Times::UntilHealed,
        );
        let (source, destination) = places(&registry.host()).await;
        let read = source.referrers(&of, TYPE).await.expect_err("an outage");
        assert_eq!(read.kind(), kind, "{read:?}");
        let put = destination
            .put_referrer(artifact("ours", &of), &of, 1)
            .await;
        let put = put.expect_err("an outage");
        assert_eq!(put.kind(), kind, "{put:?}");
        assert!(
            !registry.tags("app").contains_key(&referrers_tag(&of)),
            "{code}"
        );
    }
    // it is there, and has not taken the subject: nobody would find what was stored
    let registry = Registry::start();
    let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
    let ignored = Fault::Answer {
        code: 201,
        headers: Vec::new(),
        body: Bytes::new(),
    };
    let (_, destination) = places(&registry.host()).await;
    destination
        .put_blob(&Bytes::from_static(b"{}"))
        .await
        .expect("the config");
    registry.fail(On::Kind(Of::Manifest), ignored, Times::Next(1));
    let error = destination
        .put_referrer(artifact("ours", &of), &of, 1)
        .await;
    let error = error.expect_err("it is not listed");
    assert!(error.report().contains("does not list"), "{error:?}");
}

/// Entries that no reader can use, of an artifact type that is looked for.
fn odd_entries(sound: &Value) -> Vec<Value> {
    let with = |field: &str, value: Value| {
        let mut entry = sound.clone();
        entry[field] = value;
        entry
    };
    vec![
        Value::Null,
        json!([]),
        json!({"artifactType": TYPE}),
        with("size", Value::Null),
        with("size", json!(-1)),
        with("size", json!(1.5)),
        with("size", json!("7")),
        with("size", json!(1e40)),
        with("digest", Value::Null),
        with("digest", json!("sha512:00")),
        with("annotations", json!("none")),
        with("mediaType", json!(7)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_odd_entry_does_not_spoil_a_list() {
    let registry = Registry::start();
    let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
    let manifests = ["one", "two", "three"].map(|name| manifest(name, TYPE, Some(&of)));
    let [one, two, three] = manifests
        .clone()
        .map(|manifest| entry(&manifest, json!(TYPE)));
    let annotated = |mut entry: Value, annotations: Value| {
        entry["annotations"] = annotations;
        entry
    };
    let mut entries = vec![annotated(one.clone(), json!({"name": "one", "x": null}))];
    entries.extend(odd_entries(&one));
    entries.push(annotated(two, json!({"name": "two", "x": 7})));
    entries.push(annotated(three, Value::Null));
    let list = index(&entries).to_string();
    let (source, _) = places(&registry.host()).await;
    let answer = Fault::Replace {
        content_type: INDEX.to_owned(),
        body: list.clone().into(),
        headers: Vec::new(),
    };
    registry.fail(On::Kind(Of::Referrers), answer, Times::Next(1));
    let log = Log::start();
    assert_eq!(names(&source, &of).await, ["one", "two", ""], "by the API");
    let warnings = log.warnings();
    let odd = entries.len() - 3;
    assert_eq!(warnings.len(), odd, "{warnings:?}");
    assert!(warnings.iter().all(|line| line.contains("ignored: entry")));

    registry.set_referrers(Referrers::Absent);
    registry.add_manifest("app", Some(&referrers_tag(&of)), INDEX, list);
    assert_eq!(names(&source, &of).await, ["one", "two", ""], "by the tag");
    // what is odd is not ours: it stays where it is
    let (_, destination) = places(&registry.host()).await;
    let put = destination.put_referrer(artifact("ours", &of), &of, 1);
    put.await.expect("it is a list");
    assert_eq!(names(&source, &of).await, ["one", "two", "", "ours"]);
    let stored = source
        .tagged(&referrers_tag(&of))
        .await
        .expect("ask")
        .expect("the list");
    let stored: Value = serde_json::from_slice(&stored.bytes).expect("JSON");
    let stored = stored["manifests"].as_array().expect("a list").clone();
    assert_eq!(stored[..entries.len()], entries);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_odd_tag_does_not_spoil_a_list() {
    let registry = Registry::start();
    let (source, _) = places(&registry.host()).await;
    let list = |body: Value, link: &str| Fault::Replace {
        content_type: "application/json".to_owned(),
        body: body.to_string().into(),
        headers: vec![("link".to_owned(), link.to_owned())],
    };
    let odd = json!({"tags": ["b", null, 7, "", "../../other/manifests/x", "a?b", ".", {}, "a"]});
    registry.fail(On::Kind(Of::Tags), list(odd, ""), Times::Next(1));
    let log = Log::start();
    assert_eq!(source.tags().await.expect("tags"), ["a", "b"]);
    assert_eq!(log.warnings().len(), 7, "{}", log.text());
    registry.fail(
        On::Kind(Of::Tags),
        list(json!({"tags": null}), ""),
        Times::Next(1),
    );
    assert_eq!(source.tags().await.expect("tags"), [""; 0]);
    for (body, link) in [
        (json!({"tags": {}}), ""),
        (json!([]), ""),
        (
            json!({"tags": ["a"]}),
            "/v2/app/tags/list?last=a; rel=\"next\"",
        ),
        (
            json!({"tags": ["a"]}),
            "</v2/app/tags/list?last=a; rel=\"next\"",
        ),
    ] {
        registry.fail(On::Kind(Of::Tags), list(body.clone(), link), Times::Next(1));
        let error = source.tags().await.expect_err(link);
        assert_eq!(error.kind(), Kind::Corrupt, "{body} {link}: {error:?}");
    }
    let of = registry.add_manifest("app", Some("1"), MANIFEST, subject());
    let page = Fault::Replace {
        content_type: INDEX.to_owned(),
        body: index(&[]).to_string().into(),
        headers: vec![("link".to_owned(), "next: /v2/x".to_owned())],
    };
    registry.fail(On::Kind(Of::Referrers), page, Times::Next(1));
    let error = source.referrers(&of, TYPE).await.expect_err("more, or not");
    assert!(error.report().contains("Link header"), "{error:?}");
}

/// A repository that is not there has no list that could be empty.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_not_there_is_an_error() {
    let registry = Registry::start();
    registry.set_referrers(Referrers::Absent);
    let (source, _) = places(&registry.host()).await;
    let of = Digest::of(&subject());
    let error = source.referrers(&of, TYPE).await.expect_err("nothing");
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
    registry.add_manifest("app", Some("1"), MANIFEST, subject());
    assert_eq!(names(&source, &of).await, [""; 0], "it is there");
}
