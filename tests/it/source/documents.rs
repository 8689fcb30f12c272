//! Manifests and referrers.

use serde_json::json;
use socinbd::{error::Kind, source::Referrer};

use super::*;
use crate::support::registry::{
    DOCKER_MANIFEST, Fault, INDEX, Kind as Of, MANIFEST, On, Referrers, Times,
};

const SOCI: &str = "application/vnd.amazon.soci.index.v1+json";

fn replaced(content_type: &str, body: impl Into<bytes::Bytes>, headers: &[(&str, &str)]) -> Fault {
    Fault::Replace {
        content_type: content_type.to_owned(),
        body: body.into(),
        headers: headers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
    }
}

#[tokio::test]
async fn manifests_by_tag_and_by_digest() {
    let registry = Registry::start();
    let bytes = json!({ "schemaVersion": 2, "mediaType": MANIFEST }).to_string();
    let digest = registry.add_manifest("a/b", Some("1.0"), MANIFEST, bytes.clone());
    let docker = registry.add_manifest("a/b", Some("d"), DOCKER_MANIFEST, r#"{"schemaVersion":2}"#);
    for (rest, expected) in [
        ("a/b:1.0".to_owned(), digest),
        (format!("a/b@{digest}"), digest),
        (format!("a/b:d@{digest}"), digest),
        ("a/b:d".to_owned(), docker),
    ] {
        let source = open(&registry, &rest).await;
        let manifest = source.root_manifest().await.expect("the manifest");
        assert_eq!(manifest.digest, expected, "{rest}");
        let by_digest = source.manifest(&expected).await.expect("the same");
        assert_eq!(by_digest.bytes, manifest.bytes);
    }
    let source = open(&registry, "a/b:d").await;
    // what does not say itself what it is has its type from the header
    assert_eq!(
        source.root_manifest().await.expect("one").media_type,
        DOCKER_MANIFEST
    );
    let accept = &registry.counters().log[0].headers["accept"];
    for media_type in [MANIFEST, INDEX, DOCKER_MANIFEST] {
        assert!(accept.contains(media_type), "{accept}");
    }
}

#[tokio::test]
async fn what_does_not_exist_is_not_found_and_named() {
    let registry = Registry::start();
    registry.add_manifest("app", Some("1"), MANIFEST, "{}");
    for rest in ["app:2", "other:1"] {
        let error = open(&registry, rest)
            .await
            .root_manifest()
            .await
            .expect_err(rest);
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        let (name, tag) = rest.split_once(':').expect("a tag");
        assert!(error.report().contains(tag) && error.report().contains(&registry.reference(name)));
    }
}

#[tokio::test]
async fn manifests_that_are_not_what_was_asked_for() {
    let registry = Registry::start();
    let good = r#"{"schemaVersion":2}"#;
    let digest = registry.add_manifest("app", Some("1"), MANIFEST, good);
    let large = format!(r#"{{"schemaVersion":2,"x":"{}"}}"#, "x".repeat(4 << 20));
    let other = Digest::of(b"other").to_string();
    let source = open(&registry, "app:1").await;
    for (fault, kind, by_digest) in [
        (
            replaced(MANIFEST, r#"{"schemaVersion": 2}"#, &[]),
            Kind::Corrupt,
            true,
        ),
        (
            replaced(MANIFEST, good, &[("docker-content-digest", &other)]),
            Kind::Corrupt,
            false,
        ),
        (
            replaced("text/html", "<html>log in</html>", &[]),
            Kind::Corrupt,
            false,
        ),
        (replaced(MANIFEST, "", &[]), Kind::Corrupt, false),
        (replaced(MANIFEST, "[[[[", &[]), Kind::Corrupt, false),
        (replaced(MANIFEST, large, &[]), Kind::Corrupt, false),
        (
            replaced(
                "application/vnd.docker.distribution.manifest.v1+prettyjws",
                r#"{"schemaVersion":1}"#,
                &[],
            ),
            Kind::Unsupported,
            false,
        ),
    ] {
        registry.fail(On::Kind(Of::Manifest), fault.clone(), Times::Next(1));
        let result = match by_digest {
            true => source.manifest(&digest).await,
            false => source.root_manifest().await,
        };
        let error = result.expect_err("not what was asked for");
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    source
        .root_manifest()
        .await
        .expect("nothing is remembered of them");
}

#[tokio::test]
async fn what_was_packed_on_the_way_is_said_to_be() {
    let registry = Registry::start();
    let good = r#"{"schemaVersion":2}"#;
    let digest = registry.add_manifest("app", Some("1"), MANIFEST, good);
    let blob = registry.add_blob("app", "hello");
    let source = open(&registry, "app:1").await;
    let said = digest.to_string();
    let packed = |encoding: &str| {
        let headers = [
            ("content-type", MANIFEST),
            ("content-encoding", encoding),
            ("docker-content-digest", &said),
        ];
        let fault = Fault::Answer {
            code: 200,
            headers: headers
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec(),
            body: crate::soci::make::gzip(good.as_bytes()).into(),
        };
        registry.fail(On::Any, fault, Times::Next(1));
    };
    packed("gzip");
    let by_tag = source.root_manifest().await.expect_err("packed").report();
    packed("gzip");
    let by_digest = source.manifest(&digest).await.expect_err("packed").report();
    packed("gzip");
    let of_a_blob = source
        .blob(&blob, 5, 1 << 20)
        .await
        .expect_err("packed")
        .report();
    for error in [by_tag, by_digest, of_a_blob] {
        assert!(error.contains("Content-Encoding: \"gzip\""), "{error}");
    }
    // one whose header alone is odd is what it is
    let fault = replaced(MANIFEST, good, &[("content-encoding", "gzip")]);
    registry.fail(On::Any, fault, Times::Next(1));
    assert_eq!(
        source.root_manifest().await.expect("as it is").digest,
        digest
    );
}

#[tokio::test]
async fn a_manifest_is_tried_again() {
    let registry = Registry::start();
    registry.add_manifest("app", Some("1"), MANIFEST, r#"{"schemaVersion":2}"#);
    let source = open(&registry, "app:1").await;
    for fault in [Fault::status(503), Fault::Close, Fault::Cut { after: 3 }] {
        registry.fail(On::Kind(Of::Manifest), fault, Times::Next(2));
        source.root_manifest().await.expect("in the end");
    }
}

/// A registry with a subject, so many SOCI referrers, and as many others among them.
fn with_referrers(count: usize) -> (Registry, Digest, Vec<Digest>) {
    let registry = Registry::start();
    let subject = registry.add_manifest("app", Some("1"), MANIFEST, r#"{"schemaVersion":2}"#);
    let mut wanted = Vec::new();
    for at in 0..count {
        for media_type in [SOCI, "application/vnd.other"] {
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": { "mediaType": media_type },
                "subject": { "digest": subject.to_string() },
                "annotations": { "at": at.to_string() },
            });
            let digest = registry.add_manifest("app", None, MANIFEST, manifest.to_string());
            if media_type == SOCI {
                wanted.push(digest);
            }
        }
    }
    (registry, subject, wanted)
}

fn digests(referrers: &[Referrer]) -> Vec<Digest> {
    referrers.iter().map(|referrer| referrer.digest).collect()
}

#[tokio::test]
async fn referrers_by_the_api_filtered_or_not_and_in_several_answers() {
    let (registry, subject, wanted) = with_referrers(7);
    let source = open(&registry, "app").await;
    for (per_answer, filters, requests) in [
        (0, true, 1),
        (0, false, 1),
        (3, true, 3),
        (3, false, 5),
        (1, false, 14),
    ] {
        registry.set_referrers(Referrers::Present {
            per_answer,
            filters,
        });
        registry.reset_counters();
        let found = source.referrers(&subject, SOCI).await.expect("the list");
        assert_eq!(digests(&found), wanted, "{per_answer} {filters}");
        assert_eq!(registry.counters().total().requests, requests);
        assert_eq!(found[3].annotations["at"], "3");
        assert_eq!(found[3].artifact_type, SOCI);
        assert!(found[3].size > 100);
    }
    let nobody = Digest::of(b"nobody");
    assert!(
        source
            .referrers(&nobody, SOCI)
            .await
            .expect("an empty list")
            .is_empty()
    );
}

#[tokio::test]
async fn referrers_by_the_tag_where_there_is_no_api() {
    let (registry, subject, wanted) = with_referrers(2);
    let source = open(&registry, "app").await;
    let entry = |digest: &Digest, artifact_type: &str| json!({ "mediaType": MANIFEST, "digest": digest.to_string(), "size": 5, "artifactType": artifact_type });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [
            entry(&wanted[0], SOCI),
            entry(&wanted[1], "other"),
            { "digest": "sha512:00", "size": 1, "artifactType": SOCI },
            entry(&wanted[1], SOCI),
        ],
    });
    registry.set_referrers(Referrers::Absent);
    assert!(
        source
            .referrers(&subject, SOCI)
            .await
            .expect("no tag")
            .is_empty()
    );
    let tag = format!("sha256-{}", subject.hex());
    registry.add_manifest("app", Some(&tag), INDEX, index.to_string());
    let found = source.referrers(&subject, SOCI).await.expect("the tag's");
    assert_eq!(digests(&found), wanted);

    // what counts as having no API
    registry.set_referrers(Referrers::default());
    for fault in [
        Fault::status(404),
        Fault::status(405),
        Fault::status(400),
        Fault::status(501),
        replaced("text/html", "<html>", &[]),
        replaced("application/json", "{}", &[]),
    ] {
        registry.fail(On::Kind(Of::Referrers), fault.clone(), Times::Next(1));
        let found = source.referrers(&subject, SOCI).await.expect("the tag's");
        assert_eq!(digests(&found), wanted, "{fault:?}");
    }
}

#[tokio::test]
async fn a_repository_that_does_not_exist_has_no_referrers_to_list() {
    let (registry, subject, _) = with_referrers(1);
    let source = open(&registry, "elsewhere").await;
    let error = source
        .referrers(&subject, SOCI)
        .await
        .expect_err("NAME_UNKNOWN");
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
}

#[tokio::test]
async fn lists_that_never_end_or_lead_away() {
    let (registry, subject, _) = with_referrers(1);
    let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
    let empty = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [] }).to_string();
    let own = format!(
        "</v2/app/referrers/{subject}?artifactType={}>; rel=next",
        SOCI.replace('/', "%2F").replace('+', "%2B")
    );
    for link in [
        own.as_str(),
        "<http://127.0.0.2:1/x>; rel=\"next\"",
        "<http://[>; rel=next",
    ] {
        registry.fail(
            On::Kind(Of::Referrers),
            replaced(INDEX, empty.clone(), &[("link", link)]),
            Times::UntilHealed,
        );
        registry.reset_counters();
        let error = source.referrers(&subject, SOCI).await.expect_err(link);
        assert_eq!(error.kind(), Kind::Corrupt, "{link}: {error:?}");
        assert!(registry.counters().total().requests <= 64, "{link}");
        registry.heal();
    }
    for body in ["", "[]", r#"{"manifests":7}"#] {
        registry.fail(
            On::Kind(Of::Referrers),
            replaced(INDEX, body, &[]),
            Times::Next(1),
        );
        let error = source.referrers(&subject, SOCI).await.expect_err(body);
        assert_eq!(error.kind(), Kind::Corrupt, "{body}: {error:?}");
    }
}
