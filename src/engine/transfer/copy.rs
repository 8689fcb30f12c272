//! Copies an image with its SOCI indexes and other referrers.

use std::{collections::HashSet, fmt};

use serde::Serialize;
use serde_json::Value;

use super::{
    manifests::{BlobCounts, BlobTally, ManifestCopier},
    naming::TagUpdate,
    referrers::{self, RelatedArtifact},
};
use crate::{
    compact::manifest::ARTIFACT_TYPE as COMPACT_TYPE,
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, pattern},
    soci::index::V1_TYPE,
    source::{DEFAULT_UPLOADS, Destination, Manifest, Source, layout::NewArtifact},
};

/// Options of a copy.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Patterns of artifact types of referrers to copy; SOCI indexes are always copied.
    pub referrers: Vec<String>,
    /// Number of parallel uploads.
    pub uploads: usize,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            referrers: Vec::new(),
            uploads: DEFAULT_UPLOADS,
        }
    }
}

/// The report of a copy.
#[derive(Clone, Debug, Serialize)]
pub struct CopyReport {
    /// Reference of the source.
    pub source: String,
    /// Reference of the destination.
    pub destination: String,
    /// Digest at the destination; differs from the source's if entries were left out.
    pub digest: Digest,
    /// Referrers that were copied.
    pub referrers: Vec<RelatedArtifact>,
    /// Referrers that were not copied.
    pub left: Vec<RelatedArtifact>,
    /// Counts of blobs that were present, mounted and uploaded.
    pub blobs: BlobCounts,
    /// Warnings for the user: entries that were left out.
    pub warnings: Vec<String>,
}

/// Copies the content of the source's reference unchanged, with the referrers of it and of the images that it lists.
pub async fn copy(
    source: &Source,
    destination: &Destination,
    options: &CopyOptions,
) -> Result<CopyReport> {
    let work = async {
        let naming = TagUpdate::begin(destination).await?;
        let root = source.root_manifest().await?;
        let tally = BlobTally::default();
        let mut graph = ManifestCopier::new(source, destination, options.uploads, &tally);
        let copied = graph.copy(&root).await?;
        let (mut referrers, mut left) = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        let listed: Vec<Digest> = graph.copied.iter().map(|listed| listed.digest).collect();
        for subject in std::iter::once(root.digest).chain(listed) {
            let is_there = subject != root.digest || subject == copied.digest;
            for companion in referrers::of(source, &subject).await? {
                if !seen.insert(companion.digest) {
                    continue;
                }
                if is_there
                    && is_wanted(&companion, options)
                    && copy_referrer(source, destination, &mut graph, &companion).await?
                {
                    referrers.push(companion);
                } else {
                    left.push(companion);
                }
            }
        }
        // the tag last, so that the index exists when the image is found
        naming
            .set(&copied.media_type, &copied.bytes)
            .await
            .map_err(|error| match changed(&root, &copied) {
                Some(changed) => error.context(changed),
                None => error,
            })?;
        destination.finish().await?;
        Ok(CopyReport {
            source: source.reference().to_string(),
            destination: destination.reference().to_string(),
            digest: copied.digest,
            referrers,
            left,
            blobs: tally.counts(),
            warnings: graph
                .warnings
                .into_iter()
                .chain(changed(&root, &copied))
                .collect(),
        })
    };
    work.await.map_err(|error: Error| {
        error.context(format!(
            "copying {} to {}",
            source.reference(),
            destination.reference()
        ))
    })
}

fn is_wanted(companion: &RelatedArtifact, options: &CopyOptions) -> bool {
    let kind = companion.artifact_type.as_str();
    matches!(kind, V1_TYPE | COMPACT_TYPE)
        || options
            .referrers
            .iter()
            .any(|wanted| pattern::matches(wanted, kind))
}

/// Warning if the copied index differs from the source's.
pub(crate) fn changed(root: &Manifest, copied: &Manifest) -> Option<String> {
    (root.digest != copied.digest).then(|| {
        format!(
            "some entries are left out, so the copy has digest {}, not {}: signatures of the source do not cover the copy",
            copied.digest, root.digest
        )
    })
}

/// Copies a referrer, its blobs first. Returns `false` if the destination's tag names other content: the tag is kept, because it may hold
/// signatures by others.
async fn copy_referrer(
    source: &Source,
    destination: &Destination,
    graph: &mut ManifestCopier<'_>,
    companion: &RelatedArtifact,
) -> Result<bool> {
    let manifest = source.manifest(&companion.digest).await?;
    if let Some(tag) = &companion.tag {
        let there = match destination.source().await? {
            Some(there) => there.tagged(tag).await?,
            None => None,
        };
        if let Some(other) = there.filter(|there| there.digest != manifest.digest) {
            tracing::warn!(
                "{}: tag {tag} already names {}, not {}: the tag is kept",
                destination.reference(),
                other.digest,
                manifest.digest
            );
            return Ok(false);
        }
        graph.copy(&manifest).await?;
        destination
            .tag_as(&manifest.media_type, &manifest.bytes, tag)
            .await?;
        return Ok(true);
    }
    graph.copy_blobs(&manifest).await?;
    let annotations = serde_json::from_slice::<Value>(&manifest.bytes)
        .or_kind(Kind::Corrupt, || format!("manifest {}", manifest.digest))?
        .get("annotations")
        .and_then(|annotations| serde_json::from_value(annotations.clone()).ok())
        .unwrap_or_default();
    let artifact = NewArtifact {
        media_type: manifest.media_type,
        manifest: manifest.bytes,
        artifact_type: companion.artifact_type.clone(),
        annotations,
        blobs: Vec::new(), // copied above
    };
    destination
        .put_referrer(artifact, &companion.subject, 1)
        .await?;
    Ok(true)
}

impl fmt::Display for CopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (list, verb) in [(&self.referrers, "with"), (&self.left, "without")] {
            for RelatedArtifact {
                what,
                digest,
                subject,
                ..
            } in list
            {
                writeln!(f, "{verb} {what} ({digest}) of {subject}")?;
            }
        }
        writeln!(f, "{}", self.blobs)?;
        write!(f, "{} is {}", self.destination, self.digest)
    }
}
