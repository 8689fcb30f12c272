//! `index.json` of a layout: the entries that a tag selects, and the entries that are not images but belong to one.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest,
        descriptor::Descriptor,
        media_type,
        referrers::{referrers_tag, subject_of_tag},
    },
};

/// Maximum size of an `index.json`, in bytes. An entry has 200 to 500.
pub(super) const MAX_INDEX_BYTES: u64 = 16 << 20;

/// The annotation that holds an entry's tag (OCI image specification, annotations).
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation in which containerd keeps the whole name; `ref.name` has only the tag then.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// The tag of an entry, if it has one.
pub(super) fn ref_name(entry: &Descriptor) -> Option<&str> {
    annotation(entry, REF_NAME)
}

fn annotation<'a>(entry: &'a Descriptor, key: &str) -> Option<&'a str> {
    entry.annotations.get(key).map(String::as_str)
}

/// Whether an entry is marked as something that belongs to an image and is not an image itself: an artifact, or the list of referrers of
/// an image that is copied from a registry without the referrers API.
fn is_companion(entry: &Descriptor) -> bool {
    entry.artifact_type.is_some() || ref_name(entry).is_some_and(is_referrers_tag)
}

/// Whether this tag names an entry: by the whole of its name, or by the part after the colon of `host/name:tag`.
fn is_tagged(entry: &Descriptor, tag: &str) -> bool {
    [REF_NAME, CONTAINERD_NAME]
        .iter()
        .any(|key| annotation(entry, key) == Some(tag))
}

fn has_tag_part(entry: &Descriptor, tag: &str) -> bool {
    ref_name(entry)
        .and_then(|name| name.rsplit_once(':'))
        .is_some_and(|(_, part)| part == tag)
}

fn is_referrers_tag(name: &str) -> bool {
    subject_of_tag(name).is_some()
}

/// Whether an entry is the list of the referrers of a subject.
pub(super) fn is_list_of(entry: &Descriptor, subject: &Digest) -> bool {
    ref_name(entry) == Some(&referrers_tag(subject))
}

/// The result of looking up a tag in an `index.json`.
#[derive(Debug)]
pub(super) enum Root {
    /// One entry.
    Entry(Descriptor),
    /// `index.json` itself: a flat list of one image's platforms.
    Whole,
}

/// The valid entries of an `index.json`, and messages about the others.
pub(super) fn entries(bytes: &[u8]) -> Result<(Vec<Descriptor>, Vec<String>)> {
    let index: Value = serde_json::from_slice(bytes)
        .map_err(|error| Error::with_source(Kind::Corrupt, "not JSON", error))?;
    match &index["manifests"] {
        Value::Array(entries) => Ok(Descriptor::read_list(entries)),
        Value::Null if index.is_object() => Ok((Vec::new(), Vec::new())), // Go's empty list
        _ => Err(Error::new(Kind::Corrupt, "not an index")),
    }
}

/// Finds the entry of the tag; without a tag, the only image. `place` is the name of the layout in errors.
pub(super) fn root(entries: &[Descriptor], tag: Option<&str>, place: &str) -> Result<Root> {
    let Some(tag) = tag else {
        return only(entries, place);
    };
    if let Ok(digest) = tag.parse::<Digest>() {
        return match entries.iter().find(|entry| entry.digest == digest) {
            Some(entry) => Ok(Root::Entry(entry.clone())),
            None => Err(Error::new(
                Kind::NotFound,
                format!("{place}: its index.json has no {digest}"),
            )),
        };
    }
    let mut found: Vec<&Descriptor> = entries
        .iter()
        .filter(|entry| is_tagged(entry, tag))
        .collect();
    if found.is_empty() {
        found = entries
            .iter()
            .filter(|entry| has_tag_part(entry, tag))
            .collect();
    }
    distinct(&mut found);
    match found[..] {
        [entry] => Ok(Root::Entry(entry.clone())),
        [] => Err(Error::new(
            Kind::NotFound,
            format!("{place} has no tag {tag:?}; it has {}", names(entries)),
        )),
        _ => Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{place}: tag {tag:?} is of {} manifests; give the digest of one: {}",
                found.len(),
                found
                    .iter()
                    .map(|entry| entry.digest.to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        )),
    }
}

/// The tags that name an image or artifact, sorted.
pub(super) fn tags(entries: &[Descriptor]) -> Vec<String> {
    let tags: BTreeSet<&str> = entries
        .iter()
        .filter_map(ref_name)
        .filter(|name| !is_referrers_tag(name))
        .collect();
    tags.into_iter().map(str::to_owned).collect()
}

/// Removes entries of a manifest that is listed before.
fn distinct(entries: &mut Vec<&Descriptor>) {
    let mut seen = BTreeSet::new();
    entries.retain(|entry| seen.insert(entry.digest));
}

fn only(entries: &[Descriptor], place: &str) -> Result<Root> {
    let mut images: Vec<&Descriptor> = entries
        .iter()
        .filter(|entry| !is_companion(entry))
        .collect();
    distinct(&mut images);
    // there may be only artifacts: the reader of the entry then reports what it is
    if images.is_empty() {
        images = entries.iter().collect();
    }
    let flat = |entry: &&Descriptor| {
        entry.has_platform && ref_name(entry).is_none() && !media_type::is_index(&entry.media_type)
    };
    match images[..] {
        [entry] => Ok(Root::Entry(entry.clone())),
        [] => Err(Error::new(
            Kind::NotFound,
            format!("{place} has no image: its index.json lists no manifest"),
        )),
        _ if images.iter().all(flat) => Ok(Root::Whole),
        _ => Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{place} has {} images; give the tag of one after a colon: {}",
                images.len(),
                names(entries)
            ),
        )),
    }
}

/// Tags (or digests) of the images, for an error message.
fn names(entries: &[Descriptor]) -> String {
    const SHOWN: usize = 20;
    let names: Vec<String> = entries
        .iter()
        .filter(|entry| !is_companion(entry))
        .map(|entry| match ref_name(entry) {
            Some(name) => format!("{name:?}"),
            None => entry.digest.to_string(),
        })
        .collect();
    match names.len() {
        0 => "none".to_owned(),
        count if count > SHOWN => {
            format!("{} and {} more", names[..SHOWN].join(", "), count - SHOWN)
        }
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(hex: char, rest: &str) -> String {
        format!(
            r#"{{"mediaType":"{}","digest":"sha256:{}","size":7{rest}}}"#,
            media_type::OCI_MANIFEST,
            hex.to_string().repeat(64)
        )
    }

    fn tagged(hex: char, tag: &str) -> String {
        entry(hex, &format!(r#","annotations":{{"{REF_NAME}":"{tag}"}}"#))
    }

    fn parse(list: &[String]) -> Vec<Descriptor> {
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, list.join(","));
        entries(index.as_bytes()).unwrap().0
    }

    fn found(list: &[String], tag: Option<&str>) -> Result<char, (Kind, String)> {
        match root(&parse(list), tag, "L") {
            Ok(Root::Entry(entry)) => Ok(entry.digest.hex().chars().next().unwrap()),
            Ok(Root::Whole) => Ok('*'),
            Err(error) => Err((error.kind(), error.to_string())),
        }
    }

    #[test]
    fn a_tag_names_its_entry() {
        let list = [
            tagged('a', "one"),
            tagged('b', "host/name:two"),
            entry(
                'c',
                r#","annotations":{"io.containerd.image.name":"docker.io/library/x:3"}"#,
            ),
        ];
        assert_eq!(found(&list, Some("one")), Ok('a'));
        assert_eq!(found(&list, Some("host/name:two")), Ok('b'));
        assert_eq!(found(&list, Some("two")), Ok('b'));
        assert_eq!(found(&list, Some("docker.io/library/x:3")), Ok('c'));
        assert_eq!(
            found(&list, Some(&format!("sha256:{}", "c".repeat(64)))),
            Ok('c')
        );
        let (kind, message) = found(&list, Some("three")).unwrap_err();
        assert_eq!(kind, Kind::NotFound);
        assert!(
            message.contains(r#""one", "host/name:two", sha256:ccc"#),
            "{message}"
        );
        let twice = [tagged('a', "one"), tagged('b', "one")];
        assert_eq!(
            found(&twice, Some("one")).unwrap_err().0,
            Kind::InvalidArgument
        );
    }

    #[test]
    fn without_a_tag_the_only_image_is_meant() {
        let referrers = tagged('9', &format!("sha256-{}", "a".repeat(64)));
        let artifact = entry(
            '8',
            r#","artifactType":"application/vnd.amazon.soci.index.v1+json""#,
        );
        assert_eq!(
            found(
                &[referrers.clone(), tagged('a', "x"), artifact.clone()],
                None
            ),
            Ok('a')
        );
        assert_eq!(found(&[tagged('a', "x"), tagged('a', "x")], None), Ok('a'));
        assert_eq!(found(&[], None).unwrap_err().0, Kind::NotFound);
        assert_eq!(found(&[artifact], None), Ok('8'));
        let (kind, message) =
            found(&[tagged('a', "x"), tagged('b', "y"), referrers], None).unwrap_err();
        assert_eq!(kind, Kind::InvalidArgument);
        assert!(
            message.ends_with(r#"give the tag of one after a colon: "x", "y""#),
            "{message}"
        );
        let platform =
            |arch: &str| format!(r#","platform":{{"os":"linux","architecture":"{arch}"}}"#);
        assert_eq!(
            found(
                &[
                    entry('a', &platform("amd64")),
                    entry('b', &platform("arm64"))
                ],
                None
            ),
            Ok('*')
        );
    }

    #[test]
    fn unusable_entries_are_left_out() {
        let list = [
            r#"{"digest":"sha512:00","size":1}"#.to_owned(),
            r#"{"digest":7}"#.to_owned(),
            "null".to_owned(),
            r#"{"mediaType":"m","digest":"sha256:../../../etc/passwd","size":1}"#.to_owned(),
            tagged('a', "x"),
        ];
        assert_eq!(found(&list, None), Ok('a'));
        assert!(entries(b"[]").is_err());
        assert!(entries(br#"{"manifests":null}"#).unwrap().0.is_empty());
    }
}
