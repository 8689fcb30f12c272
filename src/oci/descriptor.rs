//! Descriptors in lists of other tools. Each is judged by itself, so that a malformed one does not affect the others.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Digest;

/// A descriptor, as far as lists of manifests need it.
#[derive(Clone, Debug)]
pub struct Descriptor {
    /// Media type of the target; empty if it has none.
    pub media_type: String,
    /// Digest of the target.
    pub digest: Digest,
    /// Size of the target, in bytes.
    pub size: u64,
    /// Artifact type of the target, if it has one.
    pub artifact_type: Option<String>,
    /// Annotations. A null is an empty text, as Go reads it; other values that are not text are left out.
    pub annotations: BTreeMap<String, String>,
    /// Whether it has a platform, of any value.
    pub has_platform: bool,
}

/// Why a descriptor is not used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something else than an object.
    #[error("it is not an object")]
    NotAnObject,
    /// A required field is missing or malformed.
    #[error("its {0} is missing or malformed")]
    Field(&'static str),
    /// Its digest has an algorithm that this program does not know.
    #[error("its digest is not SHA-256")]
    Algorithm,
}

impl Descriptor {
    /// Reads one entry of a list.
    pub fn read(entry: &Value) -> Result<Self, Error> {
        if !entry.is_object() {
            return Err(Error::NotAnObject);
        }
        let digest = entry["digest"].as_str().ok_or(Error::Field("digest"))?;
        let digest = digest.parse().map_err(|_| match digest.split_once(':') {
            Some((algorithm, _)) if algorithm != "sha256" => Error::Algorithm,
            _ => Error::Field("digest"),
        })?;
        Ok(Self {
            media_type: text(entry, "mediaType")?.unwrap_or_default(),
            digest,
            size: size(entry).ok_or(Error::Field("size"))?,
            artifact_type: text(entry, "artifactType")?.filter(|stated| !stated.is_empty()),
            annotations: annotations(&entry["annotations"]).ok_or(Error::Field("annotations"))?,
            has_platform: !entry["platform"].is_null(),
        })
    }

    /// Reads a list, and reports malformed entries with their position and the reason.
    pub fn read_list(entries: &[Value]) -> (Vec<Self>, Vec<String>) {
        let mut sound = Vec::new();
        let mut odd = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            match Self::read(entry) {
                Ok(descriptor) => sound.push(descriptor),
                Err(why) => odd.push(oddity(at, entry, &why)),
            }
        }
        (sound, odd)
    }
}

/// `entry 3 (sha256:...): why`.
pub(super) fn oddity(at: usize, entry: &Value, why: &dyn std::fmt::Display) -> String {
    // text from outside: bounded, and without control characters
    let digest: String = entry["digest"]
        .as_str()
        .unwrap_or("no digest")
        .chars()
        .filter(|letter| !letter.is_control())
        .take(80)
        .collect();
    format!("entry {at} ({digest}): {why}")
}

/// A size that Go's int64 can hold.
pub(super) fn size(entry: &Value) -> Option<u64> {
    entry["size"]
        .as_u64()
        .filter(|size| i64::try_from(*size).is_ok())
}

fn text(entry: &Value, field: &'static str) -> Result<Option<String>, Error> {
    match &entry[field] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        _ => Err(Error::Field(field)),
    }
}

/// `None` where they are not an object.
pub(super) fn annotations(annotations: &Value) -> Option<BTreeMap<String, String>> {
    let entries = match annotations {
        Value::Null => return Some(BTreeMap::new()),
        Value::Object(entries) => entries,
        _ => return None,
    };
    let of_text = entries.iter().filter_map(|(key, value)| match value {
        Value::Null => Some((key.clone(), String::new())),
        Value::String(text) => Some((key.clone(), text.clone())),
        _ => None,
    });
    Some(of_text.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DIGEST: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn with(field: &str, value: Value) -> Value {
        let mut entry =
            json!({"mediaType": "a/b", "digest": DIGEST, "size": 7, "artifactType": "c/d"});
        entry[field] = value;
        entry
    }

    #[test]
    fn an_entry_is_read_as_go_reads_it() {
        let read = |field, value| Descriptor::read(&with(field, value)).unwrap();
        let annotated = read("annotations", json!({"a": "b", "c": null, "d": 7}));
        let expected = [("a", "b"), ("c", "")].map(|(key, value)| (key.into(), value.into()));
        assert_eq!(annotated.annotations, expected.into());
        assert!(read("annotations", Value::Null).annotations.is_empty());
        assert_eq!(read("mediaType", Value::Null).media_type, "");
        assert_eq!(read("artifactType", json!("")).artifact_type, None);
        assert_eq!(read("x", json!(1)).artifact_type.as_deref(), Some("c/d"));
        assert!(!read("platform", Value::Null).has_platform);
        assert!(read("platform", json!({})).has_platform);
        assert_eq!(read("size", json!(0)).size, 0);
    }

    #[test]
    fn odd_entries_are_told_of_and_the_others_count() {
        let mut list = vec![with("size", json!(1))];
        let odd = [
            json!(null),
            json!([]),
            json!({}),
            with("digest", json!(7)),
            with("digest", json!("sha512:00")),
            with("digest", json!("sha256:00\u{1b}[2J")),
            with("size", json!(null)),
            with("size", json!(-1)),
            with("size", json!(1.5)),
            with("size", json!("7")),
            with("size", json!(u64::MAX)),
            with("size", json!(1e30)),
            with("annotations", json!([])),
            with("mediaType", json!({})),
            with("artifactType", json!(7)),
        ];
        list.extend(odd.iter().cloned());
        list.push(with("size", json!(2)));
        let (sound, told) = Descriptor::read_list(&list);
        let sizes: Vec<u64> = sound.iter().map(|one| one.size).collect();
        assert_eq!(sizes, [1, 2]);
        assert_eq!(told.len(), odd.len());
        assert_eq!(told[0], "entry 1 (no digest): it is not an object");
        assert_eq!(
            told[6],
            format!("entry 7 ({DIGEST}): its size is missing or malformed")
        );
        assert!(told.iter().all(|text| !text.contains('\u{1b}')), "{told:?}");
    }
}
