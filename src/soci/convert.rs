//! Conversion of an image to an image with its SOCI index (version 2): the manifest that names the index, and the image index that lists
//! both. Pure.
//!
//! Where AWS's tool is right, the result has the same bytes: Go's order of fields, sorted annotations, `<`, `>` and `&` escaped. What that
//! tool drops (unknown fields, annotations of attestations) is kept. Entries that are not to be converted are not changed.

use serde_json::{Map, Value, json};

use super::{
    index::{IMAGE_MANIFEST_DIGEST, INDEX_DIGEST, V2_TYPE},
    json,
};
use crate::{
    compact::manifest as compact,
    oci::{
        Digest,
        manifest::MAX_MANIFEST_BYTES,
        media_type::{OCI_CONFIG, OCI_INDEX, OCI_MANIFEST},
    },
};

/// The fields of a manifest, in Go's order.
const MANIFEST_FIELDS: &[&str] = &[
    "schemaVersion",
    "mediaType",
    "artifactType",
    "config",
    "layers",
    "subject",
    "annotations",
];
/// The fields of an image index.
const INDEX_FIELDS: &[&str] = &[
    "schemaVersion",
    "mediaType",
    "artifactType",
    "manifests",
    "subject",
    "annotations",
];
/// The fields of a descriptor.
const DESCRIPTOR_FIELDS: &[&str] = &[
    "mediaType",
    "digest",
    "size",
    "urls",
    "annotations",
    "data",
    "platform",
    "artifactType",
];
/// The fields of a platform.
const PLATFORM_FIELDS: &[&str] = &["architecture", "os", "os.version", "os.features", "variant"];

/// Why something cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not JSON.
    #[error("not JSON")]
    NotJson(#[from] serde_json::Error),
    /// Something else where an object or a list must be.
    #[error("{field} is not {expected}")]
    Malformed {
        /// The field.
        field: &'static str,
        /// `an object` or `a list`.
        expected: &'static str,
    },
    /// An image that was converted is not listed by the index.
    #[error("the index does not list {0}")]
    NotListed(Digest),
    /// The result is longer than registries accept.
    #[error("{0} bytes long, over the limit of registries of {MAX_MANIFEST_BYTES}")]
    TooLong(usize),
}

/// A converted image: before and after.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The digest of its manifest before.
    pub old: Digest,
    /// The digest of its manifest now.
    pub manifest: Digest,
    /// The length of its manifest now.
    pub manifest_size: usize,
    /// The annotations of its manifest now, which its entry gets too.
    pub annotations: Map<String, Value>,
    /// The digest of its SOCI index.
    pub index: Digest,
    /// The length of its SOCI index.
    pub index_size: usize,
    /// Digest and length of its compact index, if it has a new one.
    pub compact: Option<(Digest, usize)>,
    /// The SOCI index that its old manifest named, if it named one.
    pub replaces: Option<String>,
    /// Its platform, for entries that do not state one.
    pub platform: Value,
    /// The platform of the entry of its SOCI index, if it is not that of the image's entry.
    pub index_platform: Option<Value>,
}

/// The manifest of an image that names its SOCI index, and its compact index if it has a new one: of OCI's types, and all else as it
/// was.
pub fn image_manifest(
    bytes: &[u8],
    index: &Digest,
    compact: Option<&Digest>,
) -> Result<Vec<u8>, Error> {
    let mut manifest = object(serde_json::from_slice(bytes)?, "the manifest")?;
    manifest.insert("schemaVersion".to_owned(), json!(2));
    manifest.insert("mediaType".to_owned(), json!(OCI_MANIFEST));
    let mut config = object(
        manifest.shift_remove("config").unwrap_or_default(),
        "config",
    )?;
    config.insert("mediaType".to_owned(), json!(OCI_CONFIG));
    manifest.insert("config".to_owned(), descriptor(config).into());
    let layers = list(
        manifest.shift_remove("layers").unwrap_or_default(),
        "layers",
    )?;
    let layers = layers
        .into_iter()
        .map(|layer| Ok(descriptor(object(layer, "a layer")?).into()))
        .collect::<Result<Vec<Value>, Error>>()?;
    manifest.insert("layers".to_owned(), layers.into());
    if let Some(Value::Object(subject)) = manifest.shift_remove("subject") {
        manifest.insert("subject".to_owned(), descriptor(subject).into());
    }
    annotate(&mut manifest, INDEX_DIGEST, index)?;
    if let Some(compact) = compact {
        annotate(&mut manifest, compact::INDEX_DIGEST, compact)?;
    }
    written(ordered(manifest, MANIFEST_FIELDS))
}

/// The annotations of a manifest; none where it cannot be read.
pub fn annotations(manifest: &[u8]) -> Map<String, Value> {
    let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
    match manifest.get("annotations") {
        Some(Value::Object(annotations)) => annotations.clone(),
        _ => Map::new(),
    }
}

/// The SOCI index (version 2) that the manifest of an image names, unparsed.
pub fn named_index(manifest: &[u8]) -> Option<String> {
    named(manifest, INDEX_DIGEST)
}

/// The compact index that the manifest of an image names, unparsed.
pub fn named_compact_index(manifest: &[u8]) -> Option<String> {
    named(manifest, compact::INDEX_DIGEST)
}

fn named(manifest: &[u8], annotation: &str) -> Option<String> {
    Some(annotations(manifest).get(annotation)?.as_str()?.to_owned())
}

/// The image index of converted images. `source` is the index that they came from; without one there is a single image, and the
/// index is new.
pub fn image_index(source: Option<&[u8]>, converted: &[Converted]) -> Result<Vec<u8>, Error> {
    let mut index = match source {
        Some(bytes) => object(serde_json::from_slice(bytes)?, "the image index")?,
        None => {
            let entries: Vec<Value> = converted
                .iter()
                .map(|image| json!({"digest": image.old.to_string(), "size": 0}))
                .collect();
            Map::from_iter([("manifests".to_owned(), entries.into())])
        }
    };
    index.insert("schemaVersion".to_owned(), json!(2));
    index.insert("mediaType".to_owned(), json!(OCI_INDEX));
    let mut entries = list(
        index.shift_remove("manifests").unwrap_or_default(),
        "manifests",
    )?;
    for image in converted {
        convert_entry(&mut entries, image)?;
    }
    index.insert("manifests".to_owned(), entries.into());
    if let Some(Value::Object(annotations)) = index.shift_remove("annotations")
        && !annotations.is_empty()
    {
        index.insert("annotations".to_owned(), sorted(annotations).into());
    }
    written(ordered(index, INDEX_FIELDS))
}

/// Replaces an image's entries by its new ones, and puts its SOCI index where its old one was, or at the end.
fn convert_entry(entries: &mut Vec<Value>, image: &Converted) -> Result<(), Error> {
    let old = image.old.to_string();
    let mut platform = None;
    for entry in entries.iter_mut().filter(|entry| entry["digest"] == *old) {
        let mut fields = object(entry.take(), "an entry")?;
        fields.insert("mediaType".to_owned(), json!(OCI_MANIFEST));
        fields.insert("digest".to_owned(), json!(image.manifest));
        fields.insert("size".to_owned(), json!(image.manifest_size));
        fields.shift_remove("data"); // the old manifest's bytes
        if fields.get("platform").is_none_or(Value::is_null) {
            fields.insert("platform".to_owned(), image.platform.clone());
        }
        let mut annotations = match fields.shift_remove("annotations") {
            None | Some(Value::Null) => Map::new(),
            Some(annotations) => object(annotations, "annotations")?,
        };
        for (key, value) in &image.annotations {
            annotations
                .entry(key.clone())
                .or_insert_with(|| value.clone());
        }
        fields.insert("annotations".to_owned(), annotations.into());
        annotate(&mut fields, INDEX_DIGEST, &image.index)?;
        let fields = descriptor(fields);
        platform = fields.get("platform").cloned();
        *entry = fields.into();
    }
    let Some(platform) = platform else {
        return Err(Error::NotListed(image.old));
    };
    let soci: Value = descriptor(Map::from_iter([
        ("mediaType".to_owned(), json!(OCI_MANIFEST)),
        ("digest".to_owned(), json!(image.index)),
        ("size".to_owned(), json!(image.index_size)),
        (
            "annotations".to_owned(),
            json!({ IMAGE_MANIFEST_DIGEST: image.manifest }),
        ),
        (
            "platform".to_owned(),
            image.index_platform.clone().unwrap_or(platform),
        ),
        ("artifactType".to_owned(), json!(V2_TYPE)),
    ]))
    .into();
    let is_replaced = |entry: &Value| {
        let of_image = &entry["annotations"][IMAGE_MANIFEST_DIGEST];
        entry["artifactType"] == V2_TYPE
            && (*of_image == *old
                || of_image.is_null()
                    && image
                        .replaces
                        .as_ref()
                        .is_some_and(|named| entry["digest"] == **named))
    };
    replace(entries, is_replaced, soci);
    list_compact(entries, image);
    Ok(())
}

/// Puts an image's compact index where its old one was, or at the end; without a new one the old one stays, for the image names it.
fn list_compact(entries: &mut Vec<Value>, image: &Converted) {
    let old = image.old.to_string();
    let of_image = |entry: &Value| {
        entry["artifactType"] == compact::ARTIFACT_TYPE
            && entry["annotations"][compact::IMAGE_MANIFEST_DIGEST] == *old
    };
    let Some((digest, size)) = image.compact else {
        for entry in entries.iter_mut().filter(|entry| of_image(entry)) {
            entry["annotations"][compact::IMAGE_MANIFEST_DIGEST] = json!(image.manifest);
        }
        return;
    };
    // without a platform, like attestations: a client that selects an image by platform must not find it
    let entry = json!({
        "mediaType": OCI_MANIFEST,
        "digest": digest,
        "size": size,
        "annotations": { compact::IMAGE_MANIFEST_DIGEST: image.manifest },
        "platform": { "architecture": "unknown", "os": "unknown" },
        "artifactType": compact::ARTIFACT_TYPE,
    });
    replace(entries, of_image, entry);
}

/// Puts an entry in place of the first of those, the others of which go; or at the end.
fn replace(entries: &mut Vec<Value>, is_replaced: impl Fn(&Value) -> bool, new: Value) {
    let Some(place) = entries.iter().position(&is_replaced) else {
        entries.push(new);
        return;
    };
    let mut at = 0_usize;
    entries.retain(|entry| {
        let keep = at <= place || !is_replaced(entry);
        at = at.saturating_add(1);
        keep
    });
    if let Some(entry) = entries.get_mut(place) {
        *entry = new;
    }
}

fn annotate(fields: &mut Map<String, Value>, key: &str, digest: &Digest) -> Result<(), Error> {
    let mut annotations = match fields.shift_remove("annotations") {
        None | Some(Value::Null) => Map::new(),
        Some(annotations) => object(annotations, "annotations")?,
    };
    annotations.insert(key.to_owned(), json!(digest));
    fields.insert("annotations".to_owned(), sorted(annotations).into());
    Ok(())
}

/// A descriptor as Go writes it: its fields in order, and no empty ones.
fn descriptor(mut fields: Map<String, Value>) -> Map<String, Value> {
    if let Some(Value::Object(annotations)) = fields.shift_remove("annotations") {
        fields.insert("annotations".to_owned(), sorted(annotations).into());
    }
    if let Some(Value::Object(platform)) = fields.shift_remove("platform") {
        fields.insert(
            "platform".to_owned(),
            ordered(platform, PLATFORM_FIELDS).into(),
        );
    }
    ordered(fields, DESCRIPTOR_FIELDS)
}

/// The known fields in their order, followed by the others in theirs; empty optional fields are left out.
fn ordered(mut fields: Map<String, Value>, order: &[&str]) -> Map<String, Value> {
    let says_nothing = |key: &str, value: &Value| match value {
        Value::Null => key != "config",
        Value::String(text) => {
            text.is_empty() && !matches!(key, "mediaType" | "digest" | "architecture" | "os")
        }
        Value::Array(elements) => elements.is_empty() && !matches!(key, "layers" | "manifests"),
        Value::Object(map) => map.is_empty() && key == "annotations",
        _ => false,
    };
    let known: Vec<(String, Value)> = order
        .iter()
        .filter_map(|key| fields.shift_remove_entry(*key))
        .collect();
    known
        .into_iter()
        .filter(|(key, value)| !says_nothing(key, value))
        .chain(fields)
        .collect()
}

fn sorted(map: Map<String, Value>) -> Map<String, Value> {
    let mut entries: Vec<(String, Value)> = map.into_iter().collect();
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    entries.into_iter().collect()
}

fn object(value: Value, field: &'static str) -> Result<Map<String, Value>, Error> {
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(Error::Malformed {
            field,
            expected: "an object",
        }),
    }
}

fn list(value: Value, field: &'static str) -> Result<Vec<Value>, Error> {
    match value {
        Value::Array(elements) => Ok(elements),
        Value::Null => Ok(Vec::new()),
        _ => Err(Error::Malformed {
            field,
            expected: "a list",
        }),
    }
}

fn written(document: Map<String, Value>) -> Result<Vec<u8>, Error> {
    let bytes = json::to_vec(&document)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= MAX_MANIFEST_BYTES) {
        Ok(bytes)
    } else {
        Err(Error::TooLong(bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn converted(old: &str) -> Converted {
        Converted {
            old: digest(old),
            manifest: digest(&format!("{old}'")),
            manifest_size: 100,
            annotations: Map::from_iter([("of the manifest".to_owned(), json!("yes"))]),
            index: digest(&format!("{old} soci")),
            index_size: 50,
            compact: None,
            replaces: None,
            platform: json!({"architecture": "amd64", "os": "linux"}),
            index_platform: None,
        }
    }

    fn image_manifest_of(bytes: &[u8]) -> Result<Vec<u8>, Error> {
        image_manifest(bytes, &digest("soci"), None)
    }

    fn parsed(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_manifest_keeps_what_it_says_and_names_its_index() {
        // Docker's order of fields, a field of the future, annotations that are not sorted
        let source = json!({
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "schemaVersion": 2,
            "future": {"b": 1, "a": 2},
            "annotations": {"z": "<&>", "a": "1"},
            "config": {"size": 5, "mediaType": "application/vnd.docker.container.image.v1+json", "digest": "sha256:x"},
            "layers": [{"mediaType": "l", "size": 7, "digest": "sha256:y", "urls": [], "annotations": {}}],
        });
        let index = digest("soci");
        let bytes = image_manifest(source.to_string().as_bytes(), &index, None).unwrap();
        assert_eq!(
            String::from_utf8(bytes.clone()).unwrap(),
            format!(
                r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"{OCI_CONFIG}","digest":"sha256:x","size":5}},"layers":[{{"mediaType":"l","digest":"sha256:y","size":7}}],"annotations":{{"a":"1","{INDEX_DIGEST}":"{index}","z":"\u003c\u0026\u003e"}},"future":{{"b":1,"a":2}}}}"#
            )
        );
        assert_eq!(named_index(&bytes), Some(index.to_string()));
        assert_eq!(named_compact_index(&bytes), None);
        let compact = digest("compact");
        let both = image_manifest(&bytes, &index, Some(&compact)).unwrap();
        assert_eq!(named_compact_index(&both), Some(compact.to_string()));
        assert_eq!(named_index(&both), Some(index.to_string()));
        assert_eq!(
            image_manifest(&bytes, &index, None).unwrap(),
            bytes,
            "twice is once"
        );
    }

    #[test]
    fn an_index_keeps_the_entries_of_others_as_they_are() {
        let attestation = json!({"size": 3, "digest": "sha256:att", "mediaType": OCI_MANIFEST,
            "annotations": {"vnd.docker.reference.type": "attestation-manifest", "a": "b"},
            "platform": {"os": "unknown", "architecture": "unknown"}, "x-unknown": [1, 2]});
        let other = json!({"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "digest": digest("arm"), "size": 9,
            "platform": {"architecture": "arm64", "os": "linux", "variant": "v8"}});
        let source = json!({"schemaVersion": 2, "manifests": [
            {"mediaType": "m", "digest": digest("amd"), "size": 1, "platform": {"os": "linux", "architecture": "amd64"}},
            other, attestation], "annotations": {"k": "v"}});
        let one = image_index(Some(source.to_string().as_bytes()), &[converted("amd")]).unwrap();
        let entries = parsed(&one)["manifests"].as_array().unwrap().clone();
        assert_eq!(entries.len(), 4);
        assert_eq!(entries[0]["digest"], json!(digest("amd'")));
        assert_eq!(
            entries[0]["annotations"][INDEX_DIGEST],
            json!(digest("amd soci"))
        );
        assert_eq!(entries[1].to_string(), other.to_string());
        assert_eq!(entries[2].to_string(), attestation.to_string());
        assert_eq!(entries[3]["artifactType"], V2_TYPE);
        assert_eq!(parsed(&one)["annotations"], json!({"k": "v"}));

        // the other platform afterwards: the first one's entries stay
        let two = image_index(Some(&one), &[converted("arm")]).unwrap();
        let two = parsed(&two)["manifests"].as_array().unwrap().clone();
        assert_eq!(two.len(), 5);
        assert_eq!(two[0], entries[0]);
        assert_eq!(two[3], entries[3]);
        assert_eq!(two[4]["platform"]["variant"], "v8");

        // the first one again, with another index: in place of the old one
        let mut again = converted("amd'");
        again.replaces = Some(digest("amd soci").to_string());
        let three = image_index(Some(&one), &[again]).unwrap();
        let three = parsed(&three)["manifests"].as_array().unwrap().clone();
        assert_eq!(three.len(), 4);
        assert_eq!(three[3]["digest"], json!(digest("amd' soci")));
        assert_eq!(
            three[3]["annotations"][IMAGE_MANIFEST_DIGEST],
            json!(digest("amd''"))
        );
    }

    #[test]
    fn a_compact_index_is_listed_once_and_for_no_platform() {
        let with_compact = |old: &str, compact: &str| Converted {
            compact: Some((digest(compact), 70)),
            ..converted(old)
        };
        let entries = |bytes: &[u8]| parsed(bytes)["manifests"].as_array().unwrap().clone();
        let of_image = |entry: &Value| entry["annotations"][compact::IMAGE_MANIFEST_DIGEST].clone();
        let one = image_index(None, &[with_compact("amd", "first")]).unwrap();
        let listed = entries(&one);
        assert_eq!(listed.len(), 3);
        assert_eq!(listed[2]["digest"], json!(digest("first")));
        assert_eq!(listed[2]["artifactType"], compact::ARTIFACT_TYPE);
        assert_eq!(listed[2]["platform"]["os"], "unknown");
        assert_eq!(of_image(&listed[2]), json!(digest("amd'")));
        // again: the new one is in its place, as the new SOCI index is
        let two = image_index(Some(&one), &[with_compact("amd'", "second")]).unwrap();
        assert_eq!(entries(&two).len(), 3);
        assert_eq!(entries(&two)[2]["digest"], json!(digest("second")));
        // without a new one it stays, for the image still names it
        let three = image_index(Some(&two), &[converted("amd''")]).unwrap();
        let (name, listed) = (format!("amd{}", "'".repeat(3)), entries(&three));
        assert_eq!(listed.len(), 3);
        assert_eq!(listed[2]["digest"], json!(digest("second")));
        assert_eq!(of_image(&listed[2]), json!(digest(&name)));
    }

    #[test]
    fn a_single_image_gets_an_index() {
        let bytes = image_index(None, &[converted("amd")]).unwrap();
        let entries = parsed(&bytes)["manifests"].as_array().unwrap().clone();
        assert_eq!(entries.len(), 2);
        assert_eq!(
            entries[0]["platform"],
            json!({"architecture": "amd64", "os": "linux"})
        );
        assert_eq!(entries[1]["platform"], entries[0]["platform"]);
    }

    #[test]
    fn nonsense_is_refused() {
        let index = digest("x");
        for text in [
            "",
            "[]",
            "7",
            r#"{"config":7}"#,
            r#"{"config":{},"layers":{}}"#,
            r#"{"config":{},"layers":[1]}"#,
            r#"{"config":{},"annotations":[]}"#,
        ] {
            assert!(
                image_manifest(text.as_bytes(), &index, None).is_err(),
                "{text}"
            );
        }
        for text in [
            "",
            "[]",
            r#"{"manifests":{}}"#,
            r#"{"manifests":[7,null,[]]}"#,
            "{}",
        ] {
            assert!(
                image_index(Some(text.as_bytes()), &[converted("a")]).is_err(),
                "{text}"
            );
        }
        let long = format!(r#"{{"manifests":[],"x":"{}"}}"#, "y".repeat(5 << 20));
        assert!(matches!(
            image_index(Some(long.as_bytes()), &[]),
            Err(Error::TooLong(_))
        ));
    }

    /// Any JSON, with the keys that matter.
    fn documents() -> impl proptest::strategy::Strategy<Value = Value> {
        use proptest::prelude::*;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            "[a-z<>&]{0,6}".prop_map(Value::from),
            Just(json!(digest("amd"))),
            Just(json!(V2_TYPE)),
        ];
        leaf.prop_recursive(5, 64, 6, |inner| {
            let key = proptest::sample::select(vec![
                "schemaVersion",
                "mediaType",
                "config",
                "layers",
                "manifests",
                "annotations",
                "platform",
                "digest",
                "size",
                "subject",
                "artifactType",
                "future",
                IMAGE_MANIFEST_DIGEST,
                INDEX_DIGEST,
            ]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..8).prop_map(|fields| {
                    let fields = fields
                        .into_iter()
                        .map(|(key, value)| (key.to_owned(), value));
                    Value::Object(fields.collect())
                }),
            ]
        })
    }

    #[test]
    fn fields_that_are_not_known_keep_their_order() {
        let document = br#"{"config":{},"platform":null,"digest":null,"future":1}"#;
        let once = image_manifest_of(document).unwrap();
        let text = String::from_utf8(once.clone()).unwrap();
        assert!(
            text.ends_with(r#""platform":null,"digest":null,"future":1}"#),
            "{text}"
        );
        assert_eq!(image_manifest_of(&once).unwrap(), once);
    }

    proptest::proptest! {
        #[test]
        fn any_document_is_converted_or_refused_and_twice_is_once(document in documents()) {
            let bytes = document.to_string();
            if let Ok(once) = image_manifest_of(bytes.as_bytes()) {
                proptest::prop_assert_eq!(&image_manifest_of(&once).unwrap(), &once);
            }
            if let Ok(once) = image_index(Some(bytes.as_bytes()), &[converted("amd")]) {
                // what was converted is named by its new digest
                let mut again = converted("amd");
                again.old = again.manifest;
                proptest::prop_assert_eq!(&image_index(Some(&once), &[again]).unwrap(), &once);
            }
        }
    }
}
