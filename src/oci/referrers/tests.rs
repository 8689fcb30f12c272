use serde_json::json;

use super::{super::media_type::*, *};

const SOCI: &str = "application/vnd.amazon.soci.index.v1+json";

fn subject() -> Digest {
    Digest::of(b"the subject")
}

fn entry(name: &str, artifact_type: Value) -> Value {
    json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(name.as_bytes()), "size": 7, "artifactType": artifact_type})
}

fn list(entries: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
}

/// Reads what stands under the subject's tag; these manifests refer to it.
fn read(document: &Value, referrers: &[&str]) -> Result<ReferrersList, NotAList> {
    let candidate = Candidate::read(document.to_string().as_bytes(), OCI_INDEX, &subject())?;
    let known = |digest: &Digest| {
        referrers
            .iter()
            .any(|name| Digest::of(name.as_bytes()) == *digest)
    };
    let referring = Referring {
        artifact_type: SOCI.to_owned(),
        annotations: BTreeMap::new(),
    };
    let found = candidate
        .untyped()
        .filter(known)
        .map(|digest| (digest, referring.clone()))
        .collect();
    candidate.prove(found)
}

#[test]
fn a_list_of_referrers_is_one() {
    for entries in [
        vec![],
        vec![entry("a", json!(SOCI))],
        vec![entry("a", json!(SOCI)), json!(null), json!(7)],
        vec![entry("a", json!(SOCI)), json!({"artifactType": "a/b"})],
    ] {
        let document = list(&entries);
        let read = read(&document, &[]).unwrap_or_else(|why| panic!("{document}: {why}"));
        assert_eq!(read.entries(), entries);
        assert_eq!(read.to_bytes(), document.to_string().into_bytes());
    }
    let mut null = list(&[]);
    null["manifests"] = Value::Null;
    assert!(read(&null, &[]).is_ok(), "Go's empty list");
    let mut unstated = list(&[]);
    unstated["mediaType"] = Value::Null;
    assert!(read(&unstated, &[]).is_ok(), "the registry states its type");
}

#[test]
fn an_entry_without_a_type_is_what_its_manifest_says() {
    for untyped in [json!(null), json!(""), json!(7), json!(OCI_CONFIG)] {
        let document = list(&[entry("a", json!("a/b")), entry("b", untyped)]);
        assert_eq!(
            read(&document, &["a"]).unwrap_err(),
            NotAList::NotAReferrer(1)
        );
        let (sound, _) = read(&document, &["b"]).unwrap().descriptors();
        if let [_, second] = &sound[..] {
            assert_eq!(second.artifact_type.as_deref(), Some(SOCI));
        }
    }
    let unknown = json!({"digest": "sha512:00", "size": 1});
    assert!(read(&list(&[unknown]), &[]).is_err());
    let many: Vec<Value> = (0..=MAX_UNTYPED)
        .map(|at| entry(&at.to_string(), Value::Null))
        .collect();
    let names: Vec<String> = (0..=MAX_UNTYPED).map(|at| at.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert!(read(&list(&many[1..]), &names).is_ok());
    assert!(read(&list(&many), &names).is_err());
}

#[test]
fn what_only_has_the_tag_of_a_list_is_none() {
    let with = |field: &str, value: Value| {
        let mut document = list(&[entry("a", json!(SOCI))]);
        document[field] = value;
        document
    };
    let mut platform = entry("a", json!(SOCI));
    platform["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut empty_platform = entry("a", json!(SOCI));
    empty_platform["platform"] = json!({});
    for (document, why) in [
        (with("layers", json!([])), NotAList::Field("layers")),
        (with("config", json!({})), NotAList::Field("config")),
        (with("fsLayers", json!([])), NotAList::Field("fsLayers")),
        (with("subject", json!({})), NotAList::Field("subject")),
        (
            with("artifactType", json!("a/b")),
            NotAList::Field("artifactType"),
        ),
        (
            with("schemaVersion", json!(1)),
            NotAList::Field("schemaVersion"),
        ),
        (with("manifests", json!({})), NotAList::Field("manifests")),
        (
            with("mediaType", json!(DOCKER_LIST)),
            NotAList::OtherType(DOCKER_LIST.to_owned()),
        ),
        (
            with("mediaType", json!(OCI_MANIFEST)),
            NotAList::OtherType(OCI_MANIFEST.to_owned()),
        ),
        (
            with("mediaType", json!(7)),
            NotAList::OtherType(String::new()),
        ),
        (list(&[platform]), NotAList::Platform(0)),
        (list(&[empty_platform]), NotAList::Platform(0)),
        (list(&[json!(null)]), NotAList::NotAReferrer(0)),
        (
            list(&[entry("a", json!(SOCI)), entry("b", Value::Null)]),
            NotAList::NotAReferrer(1),
        ),
    ] {
        assert_eq!(read(&document, &[]).unwrap_err(), why, "{document}");
    }
    let read = |bytes: &[u8], media_type| {
        let read = Candidate::read(bytes, media_type, &subject());
        read.map(drop).unwrap_err()
    };
    assert_eq!(read(b"the subject", OCI_INDEX), NotAList::Subject);
    for bytes in ["", "[]", "7", "{", "<html>"] {
        let why = read(bytes.as_bytes(), "a/b");
        assert_eq!(why, NotAList::OtherType("a/b".to_owned()), "{bytes}");
    }
    let unstated = br#"{"schemaVersion":2,"manifests":[]}"#;
    assert_eq!(
        read(unstated, "application/json"),
        NotAList::OtherType("application/json".to_owned())
    );
}

#[test]
fn a_list_is_changed_and_its_other_fields_stay() {
    let odd = json!({"digest": "sha512:00", "artifactType": "a/b", "x": [1]});
    let mut document = list(&[odd.clone(), entry("a", json!(SOCI))]);
    document["annotations"] = json!({"by": "others"});
    let mut list = read(&document, &[]).unwrap();
    assert!(!list.add(&entry("a", json!("other"))), "it is listed");
    assert!(list.add(&entry("b", json!(SOCI))));
    assert!(list.remove(&Digest::of(b"a")));
    assert!(!list.remove(&Digest::of(b"a")));
    document["manifests"] = json!([odd, entry("b", json!(SOCI))]);
    assert_eq!(list.to_bytes(), document.to_string().into_bytes());
    let mut new = ReferrersList::default();
    assert!(new.add(&entry("a", json!(SOCI))));
    let bytes = new.to_bytes();
    assert_eq!(
        bytes,
        super::tests::list(&[entry("a", json!(SOCI))])
            .to_string()
            .into_bytes()
    );
}

#[test]
fn a_tag_names_its_subject() {
    let tag = referrers_tag(&subject());
    assert_eq!(subject_of_tag(&tag), Some(subject()));
    for other in ["v1", "sha256-00", &format!("{tag}.sig"), &tag[1..], ""] {
        assert_eq!(subject_of_tag(other), None, "{other}");
    }
}

#[test]
fn a_referrer_says_so_itself() {
    let manifest = |fields: Value| {
        let mut manifest = json!({"subject": {"digest": subject()}});
        for (key, value) in fields.as_object().unwrap() {
            manifest[key] = value.clone();
        }
        referring(manifest.to_string().as_bytes(), &subject())
    };
    let by_config = json!({"artifactType": "", "config": {"mediaType": SOCI}, "annotations": {"a": null, "b": "c"}});
    let found = manifest(by_config).unwrap();
    assert_eq!(found.artifact_type, SOCI);
    assert_eq!(found.annotations["b"], "c");
    let found = manifest(json!({"artifactType": "a/b", "config": {"mediaType": SOCI}}));
    assert_eq!(found.unwrap().artifact_type, "a/b");
    assert_eq!(manifest(json!({})), None, "no type at all");
    let other = json!({"artifactType": "a/b", "subject": {"digest": Digest::of(b"x")}});
    assert_eq!(manifest(other), None);
    assert_eq!(referring(b"[", &subject()), None);
}
