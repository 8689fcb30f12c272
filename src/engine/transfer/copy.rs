//! Copies an image from one place to another with its SOCI indexes and the other artifacts that refer to it.

use std::{collections::HashSet, fmt};

use serde::Serialize;
use serde_json::Value;

use super::{
    manifests::{BlobCounts, BlobTally, ManifestCopier},
    naming::TagUpdate,
    referrers::{self, Companion},
};
use crate::{
    compact::manifest::ARTIFACT_TYPE as COMPACT_TYPE,
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, pattern},
    soci::index::V1_TYPE,
    source::{DEFAULT_UPLOADS, Destination, Manifest, Source, layout::NewArtifact},
};

/// What goes along with an image.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Patterns of the artifact types of referrers that go along; SOCI's always do.
    pub referrers: Vec<String>,
    /// Blobs that are sent at a time.
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

/// What was copied.
#[derive(Clone, Debug, Serialize)]
pub struct CopyReport {
    /// From where.
    pub source: String,
    /// To where.
    pub destination: String,
    /// The image at the destination: the same as at the source, unless something that it lists was left out.
    pub digest: Digest,
    /// What went along.
    pub referrers: Vec<Companion>,
    /// What refers to it and stayed behind.
    pub left: Vec<Companion>,
    /// How the blobs went.
    pub blobs: BlobCounts,
    /// What the person should know: what was left out.
    pub warnings: Vec<String>,
}

/// Copies what the source's reference names, unchanged, and what refers to it and to the images that it lists.
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
                    && along(source, destination, &mut graph, &companion).await?
                {
                    referrers.push(companion);
                } else {
                    left.push(companion);
                }
            }
        }
        // the name last: who finds the image finds its index
        naming
            .give(&copied.media_type, &copied.bytes)
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

fn is_wanted(companion: &Companion, options: &CopyOptions) -> bool {
    let kind = companion.artifact_type.as_str();
    matches!(kind, V1_TYPE | COMPACT_TYPE)
        || options
            .referrers
            .iter()
            .any(|wanted| pattern::matches(wanted, kind))
}

/// Says that what was written is another index than the source's.
pub(crate) fn changed(root: &Manifest, copied: &Manifest) -> Option<String> {
    (root.digest != copied.digest).then(|| {
        format!(
            "as something is left out, the copy has the digest {}, not {}: signatures of that do not cover it",
            copied.digest, root.digest
        )
    })
}

/// Copies what refers to the image, its blobs first. `false` where the destination has something else under its tag: that stays, for
/// signatures of others may be in it.
async fn along(
    source: &Source,
    destination: &Destination,
    graph: &mut ManifestCopier<'_>,
    companion: &Companion,
) -> Result<bool> {
    let manifest = source.manifest(&companion.digest).await?;
    if let Some(tag) = &companion.tag {
        let there = match destination.source().await? {
            Some(there) => there.tagged(tag).await?,
            None => None,
        };
        if let Some(other) = there.filter(|there| there.digest != manifest.digest) {
            tracing::warn!(
                "{}: its tag {tag} names {} already, and not {}: it stays as it is",
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
        blobs: Vec::new(), // they are there
    };
    destination
        .put_referrer(artifact, &companion.subject, 1)
        .await?;
    Ok(true)
}

impl fmt::Display for CopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (list, verb) in [(&self.referrers, "with"), (&self.left, "without")] {
            for Companion {
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
