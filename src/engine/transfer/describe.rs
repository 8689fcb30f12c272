//! Describes the content of a reference, and lists its referrers.

use serde::Serialize;
use serde_json::Value;

use super::referrers::{self, RelatedArtifact};
use crate::{
    error::{Kind, Result},
    oci::{
        Digest,
        artifact::{what_is, what_is_type},
    },
    soci::index::{IMAGE_MANIFEST_DIGEST, INDEX_DIGEST},
    source::Source,
};

/// Maximum number of index entries to show.
const MAX_ENTRIES: usize = 4096;

/// The description of a reference.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// The reference.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// Artifact type; if it has none and is not an image, the media type of its configuration.
    pub artifact_type: Option<String>,
    /// Size of the manifest in bytes.
    pub size: usize,
    /// Kind of content, e.g. `an image index`.
    pub what: String,
    /// Whether it is an image or an image index.
    pub is_image: bool,
    /// Digest of its subject.
    pub subject: Option<String>,
    /// Entries of an index.
    pub entries: Vec<DescribedEntry>,
    /// Referrers of it and of its entries, sorted by artifact type.
    pub referrers: Vec<RelatedArtifact>,
    /// Warnings for the user, e.g. about a SOCI index that was lost by a copy.
    pub warnings: Vec<String>,
}

/// An entry of an index.
#[derive(Clone, Debug, Serialize)]
pub struct DescribedEntry {
    /// Digest of the manifest.
    pub digest: String,
    /// Platform, e.g. `linux/arm64`.
    pub platform: Option<String>,
    /// Kind of content.
    pub what: String,
    /// The SOCI index (version 2) that it names, or, for a SOCI index, its image.
    pub bound_to: Option<String>,
    /// Whether the manifest exists.
    pub is_there: bool,
}

/// Describes the content of the source's reference.
pub async fn describe(source: &Source) -> Result<Description> {
    let root = source.root_manifest().await?;
    let document: Value = serde_json::from_slice(&root.bytes).unwrap_or_default();
    let what = what_is(&root.bytes, &root.media_type);
    let text = |value: &Value| {
        value
            .as_str()
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let mut described = Description {
        reference: source.reference().to_string(),
        digest: root.digest,
        media_type: root.media_type.clone(),
        artifact_type: match what.is_image() {
            true => text(&document["artifactType"]),
            false => text(&document["artifactType"]).or(text(&document["config"]["mediaType"])),
        },
        size: root.bytes.len(),
        what: what.to_string(),
        is_image: what.is_image(),
        subject: text(&document["subject"]["digest"]),
        entries: Vec::new(),
        referrers: referrers::of(source, &root.digest).await?,
        warnings: Vec::new(),
    };
    if what.is_image() {
        described.warn_of_missing_index(source, &document).await?;
    }
    let entries = document["manifests"].as_array().into_iter().flatten();
    for entry in entries.take(MAX_ENTRIES) {
        described.entry(source, entry).await?;
    }
    described
        .referrers
        .sort_by(|one, other| one.artifact_type.cmp(&other.artifact_type));
    Ok(described)
}

impl Description {
    async fn entry(&mut self, source: &Source, entry: &Value) -> Result<()> {
        let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
        let found = match digest.parse() {
            Ok(digest) => match source.manifest(&digest).await {
                Ok(manifest) => Some(manifest),
                Err(error) if error.kind() == Kind::NotFound => None,
                Err(error) => return Err(error),
            },
            Err(_) => None,
        };
        let platform = &entry["platform"];
        let part = |key: &str| platform[key].as_str().unwrap_or_default();
        let annotation = |key: &str| entry["annotations"][key].as_str().map(str::to_owned);
        let what = match (&found, entry["artifactType"].as_str()) {
            (Some(manifest), _) => what_is(&manifest.bytes, &manifest.media_type).to_string(),
            (None, Some(kind)) => what_is_type(kind).to_string(),
            (None, None) => "missing".to_owned(),
        };
        self.entries.push(DescribedEntry {
            platform: platform.is_object().then(|| {
                let mut name = format!("{}/{}", part("os"), part("architecture"));
                if !part("variant").is_empty() {
                    name.push_str(&format!("/{}", part("variant")));
                }
                name
            }),
            what,
            bound_to: annotation(INDEX_DIGEST).or(annotation(IMAGE_MANIFEST_DIGEST)),
            is_there: found.is_some(),
            digest,
        });
        if let Some(manifest) = found {
            let document: Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
            self.warn_of_missing_index(source, &document).await?;
            self.referrers
                .extend(referrers::of(source, &manifest.digest).await?);
        }
        Ok(())
    }

    /// Adds a warning if a manifest names a SOCI index that does not exist.
    async fn warn_of_missing_index(&mut self, source: &Source, manifest: &Value) -> Result<()> {
        let Some(named) = manifest["annotations"][INDEX_DIGEST].as_str() else {
            return Ok(());
        };
        let is_there = match named.parse() {
            Ok(digest) => match source.manifest(&digest).await {
                Ok(_) => true,
                Err(error) if error.kind() == Kind::NotFound => false,
                Err(error) => return Err(error),
            },
            Err(_) => false,
        };
        if !is_there {
            let named: String = named.chars().take(255).collect();
            self.warnings.push(format!(
                "an image names the SOCI index {named}, which is missing here: copy it from another place with `socinbd copy`, or make \
                 one with `socinbd convert`"
            ));
        }
        Ok(())
    }
}
