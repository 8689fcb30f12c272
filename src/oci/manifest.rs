//! Manifests and indexes from outside: bounded, checked to be what they claim, and refused with the kind that they are if they are not
//! images.

use oci_spec::image::{ImageIndex, ImageManifest};
use serde_json::Value;

use super::{
    artifact::{What, what_is_document},
    descriptor::{self, Descriptor},
    media_type,
};
use crate::error::Kind;

/// Maximum size of a manifest or index, in bytes. The distribution specification asks registries to accept 4 MiB.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Maximum size of an image configuration, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Maximum number of layers of an image: the limit of overlayfs (`OVL_MAX_STACK`).
pub const MAX_LAYERS: usize = 500;

/// A manifest that leads to an image.
#[derive(Clone, Debug)]
pub enum Document {
    /// The manifest of one image.
    Image(Box<ImageManifest>),
    /// A list of images by platform, with its valid entries, and a sentence for each entry that is ignored because it is malformed.
    Index(Box<ImageIndex>, Vec<String>),
}

/// Why a document is not an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than [`MAX_MANIFEST_BYTES`] or [`MAX_CONFIG_BYTES`].
    #[error("{size} bytes long, over the limit of {limit}")]
    TooLong {
        /// Its length.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// Not JSON.
    #[error("not JSON")]
    NotJson(#[source] serde_json::Error),
    /// It has the lists of both an image and an index; readers would disagree about it (CVE-2021-41190).
    #[error(
        "it has both \"manifests\" and \"layers\" or \"config\": neither an image nor an index"
    )]
    Ambiguous,
    /// It was announced as one kind and states that it is the other (CVE-2021-41190).
    #[error("announced as {announced:?}, but its mediaType is {stated:?}")]
    Contradiction {
        /// The media type of its descriptor or of the registry's answer.
        announced: String,
        /// Its own `mediaType`.
        stated: String,
    },
    /// Something else.
    #[error("it is {0}{advice}", advice = .0.advice())]
    NotAnImage(What),
    /// A required part of an image is missing.
    #[error("malformed: expected {what}")]
    Malformed {
        /// The kind that it seems to be.
        what: What,
        /// The part that is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Only schema version 2 exists.
    #[error("schemaVersion is {0}, expected 2")]
    SchemaVersion(u32),
    /// More than [`MAX_LAYERS`].
    #[error("{0} layers, over the overlayfs limit of {MAX_LAYERS}")]
    TooManyLayers(usize),
    /// A digest that this program cannot check.
    #[error("unusable digest")]
    Digest(#[source] crate::error::Error),
    /// The configuration's list of diff IDs does not match the manifest.
    #[error("the configuration has {diff_ids} diff IDs for {layers} layers")]
    DiffIds {
        /// Diff IDs in the configuration.
        diff_ids: usize,
        /// Layers in the manifest.
        layers: usize,
    },
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NotAnImage(_) | Self::TooManyLayers(_) => Kind::Unsupported,
            Self::Digest(error) => error.kind(),
            _ => Kind::Corrupt,
        }
    }
}

/// Parses an image or an image index. `media_type` is that of its descriptor or of the registry.
pub fn parse(bytes: &[u8], media_type: &str) -> Result<Document, Error> {
    bounded(bytes, MAX_MANIFEST_BYTES)?;
    let document: Value = serde_json::from_slice(bytes).map_err(Error::NotJson)?;
    let has = |key| document.get(key).is_some();
    if has("manifests") && (has("layers") || has("config")) {
        return Err(Error::Ambiguous);
    }
    let stated = document
        .get("mediaType")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let contradicts = |a: &str, b: &str| media_type::is_index(a) && media_type::is_manifest(b);
    if contradicts(stated, media_type) || contradicts(media_type, stated) {
        return Err(Error::Contradiction {
            announced: media_type.to_owned(),
            stated: stated.to_owned(),
        });
    }
    let what = what_is_document(&document, media_type);
    let malformed = |source| Error::Malformed {
        what: what.clone(),
        source,
    };
    let (parsed, schema_version) = match what {
        What::Image => {
            let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(malformed)?;
            if manifest.layers().len() > MAX_LAYERS {
                return Err(Error::TooManyLayers(manifest.layers().len()));
            }
            let version = manifest.schema_version();
            (Document::Image(Box::new(manifest)), version)
        }
        What::ImageIndex => {
            let (index, odd) = index(document).map_err(malformed)?;
            let version = index.schema_version();
            (Document::Index(Box::new(index), odd), version)
        }
        other => return Err(Error::NotAnImage(other)),
    };
    if schema_version != 2 {
        return Err(Error::SchemaVersion(schema_version));
    }
    Ok(parsed)
}

/// An image index of the sound entries of a document, and a sentence for each of the others. Null is read as Go reads it: an empty list, an
/// empty text.
fn index(mut document: Value) -> Result<(ImageIndex, Vec<String>), serde_json::Error> {
    let entries = match document.get_mut("manifests").map(Value::take) {
        Some(Value::Array(entries)) => entries,
        Some(Value::Null) => Vec::new(),
        Some(_) => return Err(serde::de::Error::custom("its manifests are not an array")),
        None => return Err(serde::de::Error::missing_field("manifests")),
    };
    document["manifests"] = Value::Array(Vec::new());
    let mut index: ImageIndex = serde_json::from_value(with_texts(document))?;
    let (mut sound, mut odd) = (Vec::new(), Vec::new());
    for (at, entry) in entries.into_iter().enumerate() {
        match Descriptor::read(&entry) {
            Ok(_) => match serde_json::from_value(with_texts(entry.clone())) {
                Ok(descriptor) => sound.push(descriptor),
                Err(why) => odd.push(descriptor::oddity(at, &entry, &why)),
            },
            Err(why) => odd.push(descriptor::oddity(at, &entry, &why)),
        }
    }
    index.set_manifests(sound);
    Ok((index, odd))
}

/// The same descriptor or index, whose annotations are all texts.
fn with_texts(mut value: Value) -> Value {
    if let Some(texts) = descriptor::annotations(&value["annotations"])
        && !value["annotations"].is_null()
    {
        value["annotations"] = texts.into_iter().collect();
    }
    value
}

/// Checks a document's length.
pub(super) fn bounded(bytes: &[u8], limit: u64) -> Result<(), Error> {
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if size > limit {
        return Err(Error::TooLong { size, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::media_type::{DOCKER_LIST, OCI_INDEX, OCI_MANIFEST};

    const DIGEST: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn image(layers: usize) -> String {
        let layer = serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 2
        });
        serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": media_type::OCI_CONFIG, "digest": DIGEST, "size": 2},
            "layers": vec![layer; layers],
        })
        .to_string()
    }

    #[test]
    fn an_image_and_an_index_are_parsed() {
        let Ok(Document::Image(manifest)) = parse(image(3).as_bytes(), OCI_MANIFEST) else {
            panic!("an image is expected");
        };
        assert_eq!(manifest.layers().len(), 3);
        let index = br#"{"schemaVersion":2,"manifests":[]}"#;
        assert!(matches!(parse(index, DOCKER_LIST), Ok(Document::Index(..))));
        assert!(matches!(parse(index, ""), Ok(Document::Index(..))));
    }

    #[test]
    fn what_readers_could_take_for_either_is_refused() {
        let both = br#"{"schemaVersion":2,"manifests":[],"layers":[]}"#;
        assert!(matches!(parse(both, OCI_INDEX), Err(Error::Ambiguous)));
        let contradiction =
            format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
        assert!(matches!(
            parse(contradiction.as_bytes(), OCI_MANIFEST),
            Err(Error::Contradiction { .. })
        ));
    }

    #[test]
    fn limits_hold() {
        let long = " ".repeat(MAX_MANIFEST_BYTES as usize + 1);
        assert!(matches!(
            parse(long.as_bytes(), OCI_MANIFEST),
            Err(Error::TooLong { .. })
        ));
        assert!(parse(image(MAX_LAYERS).as_bytes(), OCI_MANIFEST).is_ok());
        assert!(matches!(
            parse(image(MAX_LAYERS + 1).as_bytes(), OCI_MANIFEST),
            Err(Error::TooManyLayers(501))
        ));
        let deep = format!(r#"{{"manifests":{}"#, "[".repeat(100_000));
        assert!(matches!(
            parse(deep.as_bytes(), OCI_INDEX),
            Err(Error::NotJson(_))
        ));
    }

    #[test]
    fn what_is_no_image_is_named() {
        let chart = r#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json"},"layers":[]}"#;
        let error = parse(chart.as_bytes(), OCI_MANIFEST).unwrap_err();
        assert_eq!(error.to_string(), "it is a Helm chart, not an image");
        assert!(matches!(
            parse(b"{}", OCI_MANIFEST),
            Err(Error::NotAnImage(What::NoManifest))
        ));
        assert!(matches!(
            parse(br#"{"schemaVersion":1,"manifests":[]}"#, ""),
            Err(Error::SchemaVersion(1))
        ));
        assert!(matches!(
            parse(br#"{"schemaVersion":2,"manifests":{}}"#, OCI_INDEX),
            Err(Error::Malformed { .. })
        ));
    }

    #[test]
    fn odd_entries_of_an_index_are_left_out_each_with_a_sentence() {
        let entry = |field: &str, value: Value| {
            let mut entry =
                serde_json::json!({"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 2});
            entry[field] = value;
            entry
        };
        let index = serde_json::json!({
            "schemaVersion": 2,
            "annotations": {"a": null},
            "manifests": [
                entry("size", Value::Null), entry("size", (-1).into()), entry("size", "2".into()), entry("digest", "sha256:ab".into()),
                entry("digest", "blake3:ab".into()), entry("mediaType", 7.into()), entry("annotations", 7.into()), {}, null, 7, [],
                entry("platform", "linux/amd64".into()),
                entry("annotations", Value::Null),
                entry("annotations", serde_json::json!({"a": null, "b": 7, "c": "d"})),
            ],
        });
        let Ok(Document::Index(index, odd)) = parse(index.to_string().as_bytes(), OCI_INDEX) else {
            panic!("an index is expected");
        };
        assert_eq!(odd.len(), 12, "{odd:#?}");
        assert!(
            odd[1].contains(DIGEST) && odd[1].contains("size"),
            "{}",
            odd[1]
        );
        let [plain, annotated] = &index.manifests()[..] else {
            panic!("two sound entries are expected");
        };
        assert!(plain.annotations().is_none());
        let annotations = annotated.annotations().as_ref().unwrap();
        assert_eq!(annotations.len(), 2);
        assert_eq!(
            (annotations["a"].as_str(), annotations["c"].as_str()),
            ("", "d")
        );
        let empty = parse(br#"{"schemaVersion":2,"manifests":null}"#, OCI_INDEX);
        assert!(
            matches!(empty, Ok(Document::Index(index, odd)) if index.manifests().is_empty() && odd.is_empty())
        );
    }
}
