//! The artifact manifest of a compact index: which layer of an image has which table, and where.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{HEADER_SIZE, MAX_TABLE_SIZE};
use crate::oci::{
    Digest,
    manifest::MAX_MANIFEST_BYTES,
    media_type::{OCI_EMPTY, OCI_MANIFEST},
};

/// Artifact type of a compact index.
pub const ARTIFACT_TYPE: &str = "application/vnd.socinbd.compact-index.v1+json";
/// Media type of a layer's blob in it: the table, and behind it the windows.
pub const LAYER_TYPE: &str = "application/vnd.socinbd.compact-index.layer.v1";

/// Media type of a list of the spans of a layer that a start needs, in the form of SOCI's prefetch artifacts.
pub const PREFETCH_TYPE: &str = "application/vnd.socinbd.compact-index.prefetch.v1+json";
/// The longest such list that is read, in bytes.
pub const MAX_PREFETCH_BYTES: u64 = 1 << 20;

/// On the descriptor of a blob: the digest of the layer.
pub const LAYER_DIGEST: &str = "vnd.socinbd.layer-digest";
/// On the descriptor of a blob: the digest of the table, the blob's first bytes; on that of a list: the table whose spans it counts.
pub const TABLE_DIGEST: &str = "vnd.socinbd.table-digest";
/// On the descriptor of a blob: the size of the table in bytes, decimal.
pub const TABLE_SIZE: &str = "vnd.socinbd.table-size";
/// On the descriptor of a blob: the span size that was asked for, in bytes, decimal. For people.
pub const SPAN_SIZE: &str = "vnd.socinbd.span-size";
/// On a compact index: what made it.
pub const BUILD_TOOL: &str = "vnd.socinbd.build-tool";
/// On an image manifest: the digest of its compact index.
pub const INDEX_DIGEST: &str = "vnd.socinbd.compact-index-digest";
/// On the descriptor of a compact index in an image index: the digest of its image manifest.
pub const IMAGE_MANIFEST_DIGEST: &str = "vnd.socinbd.image-manifest-digest";

/// The configuration of every compact index.
pub const CONFIG: &[u8] = b"{}";

/// The compact index of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Its layers, in the order of the image's.
    pub layers: Vec<LayerIndex>,
    /// The spans of these layers that a start needs.
    pub prefetch: Vec<PrefetchList>,
    /// The image manifest; `None` where the image names the index.
    pub subject: Option<Subject>,
    /// What made it, by its own word.
    pub build_tool: Option<String>,
}

/// A layer's table and windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerIndex {
    /// The layer.
    pub layer: Digest,
    /// The blob.
    pub blob: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// The blob's first `table_size` bytes.
    pub table: Digest,
    /// Bytes of the table.
    pub table_size: u64,
    /// The span size that was asked for.
    pub span_size: u64,
}

/// A list of spans that a start needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefetchList {
    /// The layer.
    pub layer: Digest,
    /// The table whose spans are listed.
    pub table: Digest,
    /// The list.
    pub blob: Digest,
    /// Bytes of the list.
    pub size: u64,
}

/// The image that an index belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The manifest's media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Why something is no usable compact index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than a manifest may be.
    #[error("{0} bytes long, where at most {MAX_MANIFEST_BYTES} are read")]
    TooLong(u64),
    /// Not JSON, or not of a manifest's form.
    #[error("no manifest")]
    NotJson(#[from] serde_json::Error),
    /// Another artifact.
    #[error("its artifact type is {0:?}, and not {ARTIFACT_TYPE}")]
    OtherType(String),
    /// A blob's descriptor that lacks something or makes no sense.
    #[error("layer {index} has no usable {what}")]
    Layer {
        /// Its place among the manifest's layers.
        index: usize,
        /// What is at fault.
        what: &'static str,
    },
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct ManifestDocument {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses untrusted bytes. Blobs of other media types are passed: there may be more beside the layers' some day.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if size > MAX_MANIFEST_BYTES {
            return Err(Error::TooLong(size));
        }
        let document: ManifestDocument = serde_json::from_slice(bytes)?;
        if document.artifact_type != ARTIFACT_TYPE {
            let found = document.artifact_type.chars().take(255).collect();
            return Err(Error::OtherType(found));
        }
        let of_type = |media_type: &'static str| {
            let blobs = document.layers.iter().enumerate();
            blobs.filter(move |(_, blob)| blob.media_type == media_type)
        };
        Ok(Self {
            layers: of_type(LAYER_TYPE)
                .map(|(index, layer)| LayerIndex::of(index, layer))
                .collect::<Result<_, _>>()?,
            prefetch: of_type(PREFETCH_TYPE)
                .map(|(index, list)| PrefetchList::of(index, list))
                .collect::<Result<_, _>>()?,
            subject: document.subject.map(|subject| Subject {
                media_type: subject.media_type,
                digest: subject.digest,
                size: subject.size,
            }),
            build_tool: document.annotations.get(BUILD_TOOL).cloned(),
        })
    }

    /// The manifest's bytes: always the same of the same.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let annotations = self.build_tool.clone();
        let document = ManifestDocument {
            schema_version: 2,
            media_type: OCI_MANIFEST.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            config: Descriptor {
                media_type: OCI_EMPTY.to_owned(),
                digest: Digest::of(CONFIG),
                size: u64::try_from(CONFIG.len()).unwrap_or(u64::MAX),
                annotations: BTreeMap::new(),
            },
            layers: (self.layers.iter().map(LayerIndex::descriptor))
                .chain(self.prefetch.iter().map(PrefetchList::descriptor))
                .collect(),
            subject: self.subject.as_ref().map(|subject| Descriptor {
                media_type: subject.media_type.clone(),
                digest: subject.digest,
                size: subject.size,
                annotations: BTreeMap::new(),
            }),
            annotations: annotations
                .map(|tool| (BUILD_TOOL.to_owned(), tool))
                .into_iter()
                .collect(),
        };
        Ok(serde_json::to_vec(&document)?)
    }

    /// What there is of a layer: the first that names it.
    pub fn of_layer(&self, layer: &Digest) -> Option<&LayerIndex> {
        self.layers.iter().find(|index| index.layer == *layer)
    }

    /// The list of a layer's spans: the first in the numbers of this table.
    pub fn prefetch_of(&self, layer: &LayerIndex) -> Option<&PrefetchList> {
        let wanted = (layer.layer, layer.table);
        self.prefetch
            .iter()
            .find(|list| (list.layer, list.table) == wanted)
    }

    /// The blobs that it names, with their sizes, each once; its configuration is [`CONFIG`].
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        let layers = self.layers.iter().map(|layer| (layer.blob, layer.size));
        let lists = self.prefetch.iter().map(|list| (list.blob, list.size));
        let mut seen = BTreeSet::new();
        layers
            .chain(lists)
            .filter(|(digest, _)| seen.insert(*digest))
            .collect()
    }
}

impl LayerIndex {
    fn of(index: usize, descriptor: &Descriptor) -> Result<Self, Error> {
        let without = |what| Error::Layer { index, what };
        let number = |name| -> Option<u64> { descriptor.annotations.get(name)?.parse().ok() };
        let table_size = number(TABLE_SIZE).ok_or(without(TABLE_SIZE))?;
        let least = u64::try_from(HEADER_SIZE).unwrap_or(u64::MAX);
        if !(least..=descriptor.size.min(MAX_TABLE_SIZE)).contains(&table_size) {
            return Err(without(TABLE_SIZE));
        }
        Ok(Self {
            layer: descriptor.noted_digest(index, LAYER_DIGEST)?,
            blob: descriptor.digest,
            size: descriptor.size,
            table: descriptor.noted_digest(index, TABLE_DIGEST)?,
            table_size,
            span_size: number(SPAN_SIZE).unwrap_or(0),
        })
    }

    fn descriptor(&self) -> Descriptor {
        let annotations = [
            (LAYER_DIGEST, self.layer.to_string()),
            (SPAN_SIZE, self.span_size.to_string()),
            (TABLE_DIGEST, self.table.to_string()),
            (TABLE_SIZE, self.table_size.to_string()),
        ];
        Descriptor::noted(LAYER_TYPE, self.blob, self.size, annotations)
    }
}

impl PrefetchList {
    fn of(index: usize, descriptor: &Descriptor) -> Result<Self, Error> {
        Ok(Self {
            layer: descriptor.noted_digest(index, LAYER_DIGEST)?,
            table: descriptor.noted_digest(index, TABLE_DIGEST)?,
            blob: descriptor.digest,
            size: descriptor.size,
        })
    }

    fn descriptor(&self) -> Descriptor {
        let annotations = [
            (LAYER_DIGEST, self.layer.to_string()),
            (TABLE_DIGEST, self.table.to_string()),
        ];
        Descriptor::noted(PREFETCH_TYPE, self.blob, self.size, annotations)
    }
}

impl Descriptor {
    /// Of a blob with annotations.
    fn noted<const N: usize>(
        media_type: &str,
        digest: Digest,
        size: u64,
        annotations: [(&str, String); N],
    ) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: annotations
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
        }
    }

    /// The digest in an annotation.
    fn noted_digest(&self, index: usize, what: &'static str) -> Result<Digest, Error> {
        let text = self.annotations.get(what);
        text.and_then(|text| text.parse().ok())
            .ok_or(Error::Layer { index, what })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let layer = |number: u64| LayerIndex {
            layer: digest(&format!("layer {number}")),
            blob: digest(&format!("blob {number}")),
            size: 5000 + number,
            table: digest(&format!("table {number}")),
            table_size: 1000 + number,
            span_size: 1 << 17,
        };
        Manifest {
            layers: vec![layer(1), layer(2)],
            prefetch: vec![PrefetchList {
                layer: digest("layer 2"),
                table: digest("table 2"),
                blob: digest("list"),
                size: 99,
            }],
            subject: Some(Subject {
                media_type: OCI_MANIFEST.to_owned(),
                digest: digest("image"),
                size: 77,
            }),
            build_tool: Some("a tool".to_owned()),
        }
    }

    fn change(from: &str, to: &str) -> Result<Manifest, Error> {
        let text = String::from_utf8(sample().to_bytes().unwrap()).unwrap();
        assert!(text.contains(from), "{text}");
        Manifest::parse(text.replace(from, to).as_bytes())
    }

    #[test]
    fn what_is_made_is_read_back() {
        let made = sample();
        assert_eq!(Manifest::parse(&made.to_bytes().unwrap()).unwrap(), made);
        assert_eq!(made.of_layer(&made.layers[1].layer), Some(&made.layers[1]));
        assert_eq!(made.of_layer(&made.layers[1].blob), None);
        assert_eq!(made.prefetch_of(&made.layers[0]), None);
        assert_eq!(made.prefetch_of(&made.layers[1]), Some(&made.prefetch[0]));
        let other = LayerIndex {
            table: made.layers[0].table,
            ..made.layers[1]
        };
        assert_eq!(made.prefetch_of(&other), None, "another table's numbers");
        let sizes: Vec<u64> = made.blobs().iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [5001, 5002, 99]);
        let bare = Manifest {
            subject: None,
            build_tool: None,
            ..made
        };
        assert_eq!(Manifest::parse(&bare.to_bytes().unwrap()).unwrap(), bare);
    }

    #[test]
    fn it_is_an_artifact_as_the_image_specification_has_it() {
        let bytes = sample().to_bytes().unwrap();
        let what = crate::oci::artifact::what_is(&bytes, OCI_MANIFEST);
        assert_eq!(what, crate::oci::artifact::What::CompactIndex);
        assert!(!what.is_image());
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (from, to, what) in [
            ("table-size\":\"1002", "table-size\":\"95", TABLE_SIZE), // shorter than its header
            ("table-size\":\"1002", "table-size\":\"5003", TABLE_SIZE), // longer than the blob
            ("table-size\":\"1002", "table-size\":\"-1", TABLE_SIZE),
            (TABLE_DIGEST, "other", TABLE_DIGEST),
            (LAYER_DIGEST, "other", LAYER_DIGEST),
            // of a list
            (
                "\"size\":99,\"annotations\":{\"vnd.socinbd.layer-digest\":\"sha256:",
                "\"size\":99,\"annotations\":{\"vnd.socinbd.layer-digest\":\"",
                LAYER_DIGEST,
            ),
        ] {
            let found = change(from, to);
            assert!(
                matches!(found, Err(Error::Layer { what: found, .. }) if found == what),
                "{from} to {to}: {found:?}"
            );
        }
        assert!(matches!(
            change(ARTIFACT_TYPE, "application/other"),
            Err(Error::OtherType(_))
        ));
        assert!(matches!(change("{", ""), Err(Error::NotJson(_))));
        let long = vec![b' '; MAX_MANIFEST_BYTES as usize + 1];
        assert!(matches!(Manifest::parse(&long), Err(Error::TooLong(_))));
    }

    #[test]
    fn what_later_versions_add_is_passed() {
        let found = change(
            "\"layers\":[",
            "\"layers\":[{\"mediaType\":\"application/vnd.socinbd.more\",\"digest\":\"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a\",\"size\":2,\"data\":\"e30=\"},",
        );
        assert_eq!(found.unwrap(), sample());
    }
}
