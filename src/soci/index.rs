//! SOCI index manifests, versions 1 and 2: the zTOCs of the layers of an image.
//!
//! Both are OCI image manifests. The media type of the configuration marks them, and their layers are zTOCs and prefetch artifacts.
//! Version 1 has the image as its `subject`; version 2 has no subject, because the image names it. Reading accepts what AWS's tool
//! accepts; writing gives the same bytes as that tool.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Serialize, Serializer, ser::SerializeStruct};

use super::json::{self, Node, TypeError, names};
use crate::oci::{Digest, manifest::MAX_MANIFEST_BYTES, media_type::OCI_MANIFEST};

/// Artifact type (the configuration's media type) of version 1.
pub const V1_TYPE: &str = "application/vnd.amazon.soci.index.v1+json";
/// Artifact type of version 2.
pub const V2_TYPE: &str = "application/vnd.amazon.soci.index.v2+json";
/// Media type of a zTOC.
pub const ZTOC_TYPE: &str = "application/octet-stream";
/// Media type of a prefetch artifact.
pub const PREFETCH_TYPE: &str = "application/vnd.amazon.soci.prefetch.v1+json";

/// On the descriptor of a zTOC or a prefetch artifact: the digest of its layer.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// On the descriptor of a zTOC: the media type of its layer.
pub const LAYER_MEDIA_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// On the descriptor of a zTOC: its span size in bytes, decimal.
pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// On the descriptor of a zTOC: `true` when no entry of the layer has an xattr.
pub const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
/// On a SOCI index: the tool that made it.
pub const BUILD_TOOL: &str = "com.amazon.soci.build-tool-identifier";
/// On an image manifest: the digest of its version 2 index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// On the descriptor of a version 2 index in an image index: the digest of its image manifest.
pub const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";

/// The configuration of every SOCI index.
pub const EMPTY_CONFIG: &[u8] = b"{}";

/// The span size of a new index where none is given, in bytes.
pub const DEFAULT_SPAN_SIZE: u64 = 4 << 20;
/// Layers smaller than this get no zTOC where no other limit is given, in bytes of the blob.
pub const DEFAULT_MIN_LAYER_SIZE: u64 = 10 << 20;
/// The default build tool of a new index.
pub const DEFAULT_BUILD_TOOL: &str = concat!("socinbd v", env!("CARGO_PKG_VERSION"));

/// The version of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// Bound to the image by its subject.
    V1,
    /// Bound by the image's annotation.
    V2,
}

impl Version {
    /// The artifact type.
    pub fn artifact_type(self) -> &'static str {
        match self {
            Self::V1 => V1_TYPE,
            Self::V2 => V2_TYPE,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// A descriptor as in an index, unchecked, because AWS's tool accepts any text and number here. [`BlobRef`] is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: i64,
    /// Its annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A blob that an index names, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRef {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// A SOCI index manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexManifest {
    /// Its version.
    pub version: Version,
    /// zTOCs in the order of the image's layers, then prefetch artifacts in that order.
    pub layers: Vec<Descriptor>,
    /// The image manifest (version 1).
    pub subject: Option<Descriptor>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Why a manifest is not a usable index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than a manifest may be.
    #[error("{0} bytes long, over the limit of {MAX_MANIFEST_BYTES}")]
    TooLong(u64),
    /// Not JSON.
    #[error("not JSON")]
    NotJson(#[from] serde_json::Error),
    /// A field of the wrong type.
    #[error("malformed")]
    Type(#[from] TypeError),
    /// The configuration's media type names no version of SOCI indexes.
    #[error("{0:?} is not a known version of SOCI indexes")]
    UnknownVersion(String),
    /// The descriptor of a zTOC or prefetch artifact that cannot be fetched.
    #[error("entry {index} has the invalid digest {digest:?} or size {size}")]
    Unusable {
        /// Its place among the manifest's layers.
        index: usize,
        /// Its digest.
        digest: String,
        /// Its size.
        size: i64,
    },
}

impl IndexManifest {
    /// Parses an index. Accepts what AWS's tool accepts: the configuration's media type alone decides.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if size > MAX_MANIFEST_BYTES {
            return Err(Error::TooLong(size));
        }
        let document = json::parse(bytes)?;
        let mut config = Descriptor::default();
        let mut manifest = Self {
            version: Version::V1,
            layers: Vec::new(),
            subject: None,
            annotations: BTreeMap::new(),
        };
        for (key, value) in document.fields("the document")? {
            if names(key, "schemaVersion") {
                value.read_integer("schemaVersion", &mut 0)?; // any number is accepted
            } else if names(key, "mediaType") {
                value.read_text("mediaType", &mut String::new())?; // and any media type
            } else if names(key, "config") {
                config.read(value, "config")?;
            } else if names(key, "layers") {
                manifest.layers = read_layers(value)?;
            } else if names(key, "subject") {
                manifest.subject = match value {
                    Node::Null => None,
                    value => {
                        let mut subject = manifest.subject.take().unwrap_or_default();
                        subject.read(value, "subject")?;
                        Some(subject)
                    }
                };
            } else if names(key, "annotations") {
                value.read_map("annotations", &mut manifest.annotations)?;
            }
        }
        manifest.version = match config.media_type.as_str() {
            V1_TYPE => Version::V1,
            V2_TYPE => Version::V2,
            other => return Err(Error::UnknownVersion(other.chars().take(255).collect())),
        };
        Ok(manifest)
    }

    /// The bytes of this index, equal to those that AWS's tool makes of the same.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        Ok(json::to_vec(self)?)
    }

    /// The zTOC of a layer, if there is one: the first that names it.
    pub fn ztoc_of(&self, layer: &Digest) -> Result<Option<BlobRef>, Error> {
        self.blob_of(layer, ZTOC_TYPE)
    }

    /// The span size of the zTOC of a layer, if it is stated.
    pub fn span_size_of(&self, layer: &Digest) -> Option<u64> {
        let layer = layer.to_string();
        let of_layer = self.layers.iter().find(|descriptor| {
            descriptor.media_type == ZTOC_TYPE
                && descriptor.annotations.get(LAYER_DIGEST) == Some(&layer)
        })?;
        of_layer.annotations.get(SPAN_SIZE)?.parse().ok()
    }

    /// The prefetch artifact of a layer, if there is one.
    pub fn prefetch_of(&self, layer: &Digest) -> Result<Option<BlobRef>, Error> {
        self.blob_of(layer, PREFETCH_TYPE)
    }

    fn blob_of(&self, layer: &Digest, media_type: &str) -> Result<Option<BlobRef>, Error> {
        let layer = layer.to_string();
        let found = self.layers.iter().enumerate().find(|(_, descriptor)| {
            descriptor.media_type == media_type
                && descriptor.annotations.get(LAYER_DIGEST) == Some(&layer)
        });
        found
            .map(|(index, descriptor)| descriptor.checked(index))
            .transpose()
    }

    /// All blobs that it lists, each once.
    pub fn blobs(&self) -> impl Iterator<Item = Result<BlobRef, Error>> {
        let mut seen = BTreeSet::new();
        self.layers
            .iter()
            .enumerate()
            .map(|(index, descriptor)| descriptor.checked(index))
            .filter(move |blob| blob.as_ref().map_or(true, |blob| seen.insert(blob.digest)))
    }

    /// The tool that made this index, as stated in it.
    pub fn build_tool(&self) -> Option<&str> {
        self.annotations.get(BUILD_TOOL).map(String::as_str)
    }
}

fn read_layers(value: &Node) -> Result<Vec<Descriptor>, Error> {
    value
        .elements("layers")?
        .iter()
        .map(|element| {
            let mut descriptor = Descriptor::default();
            descriptor.read(element, "layers")?;
            Ok(descriptor)
        })
        .collect()
}

impl Descriptor {
    /// The descriptor of a layer's zTOC.
    pub fn of_ztoc(
        digest: &Digest,
        size: u64,
        layer: &Digest,
        layer_media_type: &str,
        span_size: u64,
    ) -> Self {
        Self {
            media_type: ZTOC_TYPE.to_owned(),
            digest: digest.to_string(),
            size: i64::try_from(size).unwrap_or(i64::MAX), // it is the length of bytes in memory
            annotations: BTreeMap::from([
                (LAYER_DIGEST.to_owned(), layer.to_string()),
                (LAYER_MEDIA_TYPE.to_owned(), layer_media_type.to_owned()),
                (SPAN_SIZE.to_owned(), span_size.to_string()),
            ]),
        }
    }

    /// The descriptor of a layer's prefetch artifact.
    pub fn of_prefetch(digest: &Digest, size: u64, layer: &Digest) -> Self {
        Self {
            media_type: PREFETCH_TYPE.to_owned(),
            digest: digest.to_string(),
            size: i64::try_from(size).unwrap_or(i64::MAX), // it is the length of bytes in memory
            annotations: BTreeMap::from([(LAYER_DIGEST.to_owned(), layer.to_string())]),
        }
    }

    fn read(&mut self, value: &Node, field: &'static str) -> Result<(), TypeError> {
        for (key, value) in value.fields(field)? {
            if names(key, "mediaType") {
                value.read_text("mediaType", &mut self.media_type)?;
            } else if names(key, "digest") {
                value.read_text("digest", &mut self.digest)?;
            } else if names(key, "size") {
                value.read_integer("size", &mut self.size)?;
            } else if names(key, "annotations") {
                value.read_map("annotations", &mut self.annotations)?;
            }
        }
        Ok(())
    }

    fn checked(&self, index: usize) -> Result<BlobRef, Error> {
        match (self.digest.parse(), u64::try_from(self.size)) {
            (Ok(digest), Ok(size)) => Ok(BlobRef { digest, size }),
            _ => Err(Error::Unusable {
                index,
                digest: self.digest.chars().take(255).collect(),
                size: self.size,
            }),
        }
    }
}

impl Serialize for IndexManifest {
    /// In the order of the fields of Go's structure.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let config = Descriptor {
            media_type: self.version.artifact_type().to_owned(),
            digest: Digest::of(EMPTY_CONFIG).to_string(),
            size: 2, // `{}`
            annotations: BTreeMap::new(),
        };
        let mut document = serializer.serialize_struct("Index", 6)?;
        document.serialize_field("schemaVersion", &2)?;
        document.serialize_field("mediaType", OCI_MANIFEST)?;
        document.serialize_field("config", &config)?;
        document.serialize_field("layers", &self.layers)?;
        if let Some(subject) = &self.subject {
            document.serialize_field("subject", subject)?;
        }
        if !self.annotations.is_empty() {
            document.serialize_field("annotations", &self.annotations)?;
        }
        document.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> IndexManifest {
        let [ztoc, layer, image] = [b"ztoc", b"laye", b"imag"].map(|bytes| Digest::of(bytes));
        IndexManifest {
            version: Version::V1,
            layers: vec![Descriptor::of_ztoc(
                &ztoc,
                1234,
                &layer,
                "application/vnd.oci.image.layer.v1.tar+gzip",
                4 << 20,
            )],
            subject: Some(Descriptor {
                media_type: OCI_MANIFEST.to_owned(),
                digest: image.to_string(),
                size: 999,
                annotations: BTreeMap::new(),
            }),
            annotations: BTreeMap::from([(BUILD_TOOL.to_owned(), "a <b> & c".to_owned())]),
        }
    }

    #[test]
    fn what_is_made_is_read_back() {
        let made = sample();
        let bytes = made.to_bytes().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.starts_with(r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.amazon.soci.index.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[{"mediaType":"application/octet-stream","digest":""#), "{text}");
        assert!(text.ends_with(r#""annotations":{"com.amazon.soci.build-tool-identifier":"a \u003cb\u003e \u0026 c"}}"#), "{text}");
        let read = IndexManifest::parse(&bytes).unwrap();
        assert_eq!(read, made);
        assert_eq!(read.build_tool(), Some("a <b> & c"));
        assert_eq!(
            read.ztoc_of(&Digest::of(b"laye")).unwrap(),
            Some(BlobRef {
                digest: Digest::of(b"ztoc"),
                size: 1234
            })
        );
        assert_eq!(read.ztoc_of(&Digest::of(b"other")).unwrap(), None);
        assert_eq!(read.prefetch_of(&Digest::of(b"laye")).unwrap(), None);
    }

    #[test]
    fn a_repeated_key_is_applied_over_the_first() {
        let text = format!(
            r#"{{"config":{{"mediaType":"{V1_TYPE}"}},"CONFIG":{{"size":3}},"layers":[{{}}],"Layers":null,"annotations":{{"a":"1"}},"annotations":{{"b":"2"}}}}"#
        );
        let read = IndexManifest::parse(text.as_bytes()).unwrap();
        assert_eq!(read.version, Version::V1);
        assert!(read.layers.is_empty());
        assert_eq!(read.annotations.len(), 2);
    }

    #[test]
    fn what_cannot_be_fetched_is_an_error_only_when_it_is_wanted() {
        for (digest, size) in [("nonsense", 5), ("", 5), ("sha512:00", 5)] {
            let mut made = sample();
            made.layers[0].digest = digest.to_owned();
            made.layers[0].size = size;
            let read = IndexManifest::parse(&made.to_bytes().unwrap()).unwrap();
            assert!(matches!(
                read.ztoc_of(&Digest::of(b"laye")),
                Err(Error::Unusable { index: 0, .. })
            ));
            assert!(read.ztoc_of(&Digest::of(b"other")).is_ok());
        }
        let mut made = sample();
        made.layers[0].size = -1;
        assert!(matches!(
            made.ztoc_of(&Digest::of(b"laye")),
            Err(Error::Unusable { size: -1, .. })
        ));
    }

    #[test]
    fn a_manifest_that_is_too_long_is_not_parsed() {
        let long = vec![b' '; usize::try_from(MAX_MANIFEST_BYTES).unwrap() + 1];
        assert!(matches!(
            IndexManifest::parse(&long),
            Err(Error::TooLong(_))
        ));
    }
}
