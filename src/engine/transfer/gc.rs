//! Removes version 1 indexes of deleted images from a repository, and entries whose manifest is missing from lists of referrers.
//!
//! A registry cannot list all its manifests. So only these are found: the lists of the referrers tag schema, by their tags, and the
//! referrers of images that the caller names.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest,
        referrers::{referring, subject_of_tag},
    },
    soci::index::{IndexManifest, V1_TYPE},
    source::{Destination, Manifest, Source},
};

/// The report: what was removed, or would be.
#[derive(Clone, Debug, Serialize)]
pub struct GcReport {
    /// The repository.
    pub repository: String,
    /// Whether nothing was removed.
    pub dry_run: bool,
    /// Number of lists that were read.
    pub lists: usize,
    /// Removed indexes and entries.
    pub removed: Vec<RemovedReferrer>,
}

/// A removed index or entry.
#[derive(Clone, Debug, Serialize)]
pub struct RemovedReferrer {
    /// Digest of the index, or of the entry's manifest.
    pub digest: Digest,
    /// Digest of its image.
    pub image: Digest,
    /// `index`: the image is missing; `entry`: the manifest of the entry is missing.
    pub what: &'static str,
}

/// Cleans a repository. `images` are checked in addition to the images with lists.
pub async fn collect(
    destination: &Destination,
    images: &[Digest],
    dry_run: bool,
) -> Result<GcReport> {
    let source = destination.source().await?.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            "indexes cannot be removed from an archive",
        )
    })?;
    let mut subjects: BTreeSet<Digest> = images.iter().copied().collect();
    let listed: BTreeSet<Digest> = source
        .tags()
        .await?
        .iter()
        .filter_map(|tag| subject_of_tag(tag))
        .collect();
    subjects.extend(&listed);
    let mut removed = Vec::new();
    for image in &subjects {
        let is_gone = matches!(at(&source, image).await?, DigestTarget::Nothing);
        for referrer in source.all_referrers(image).await? {
            // check the manifest itself: the entry of a list is not enough to remove an index
            let what = match at(&source, &referrer.digest).await? {
                DigestTarget::Nothing => "entry",
                DigestTarget::Manifest(found) if is_gone && is_index_of(&found, image) => "index",
                DigestTarget::Manifest(_) | DigestTarget::Other => continue,
            };
            let is_changed =
                dry_run || destination.delete_referrer(&referrer.digest, image).await?;
            if is_changed {
                removed.push(RemovedReferrer {
                    digest: referrer.digest,
                    image: *image,
                    what,
                });
            }
        }
    }
    Ok(GcReport {
        repository: source.reference().to_string(),
        dry_run,
        lists: listed.len(),
        removed,
    })
}

/// The content of a digest.
enum DigestTarget {
    Nothing,
    Manifest(Manifest),
    /// Content that is not a readable manifest.
    Other,
}

async fn at(source: &Source, digest: &Digest) -> Result<DigestTarget> {
    match source.manifest(digest).await {
        Ok(manifest) => Ok(DigestTarget::Manifest(manifest)),
        Err(error) if error.kind() == Kind::NotFound => Ok(DigestTarget::Nothing),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
            Ok(DigestTarget::Other)
        }
        Err(error) => Err(error),
    }
}

/// Whether a manifest is a SOCI index (version 1) with this image as its subject.
fn is_index_of(manifest: &Manifest, image: &Digest) -> bool {
    let referring = referring(&manifest.bytes, image);
    referring.is_some_and(|referring| referring.artifact_type == V1_TYPE)
        && IndexManifest::parse(&manifest.bytes).is_ok()
}

impl fmt::Display for GcReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.dry_run {
            true => "would remove",
            false => "removed",
        };
        for one in &self.removed {
            let (what, why) = match one.what {
                "index" => ("SOCI index", "the image is missing"),
                _ => ("the entry of", "the manifest is missing"),
            };
            writeln!(
                f,
                "{verb} {what} {} of image {}: {why}",
                one.digest, one.image
            )?;
        }
        write!(
            f,
            "{}: {} lists of referrers, {verb} {}",
            self.repository,
            self.lists,
            self.removed.len()
        )
    }
}
