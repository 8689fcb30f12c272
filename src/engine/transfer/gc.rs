//! Removes version 1 indexes from a repository whose image is gone, and the entries that list what is gone.
//!
//! A registry cannot be asked for all its manifests. What can be found: the lists that stand in for the referrers API, by their tags,
//! and the referrers of images that the caller names.

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

/// What was removed, or would be.
#[derive(Clone, Debug, Serialize)]
pub struct GcReport {
    /// The repository.
    pub repository: String,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// Lists that were looked at.
    pub lists: usize,
    /// What was removed.
    pub removed: Vec<RemovedReferrer>,
}

/// Something that was removed.
#[derive(Clone, Debug, Serialize)]
pub struct RemovedReferrer {
    /// The index, or what the entry listed.
    pub digest: Digest,
    /// The image that it belonged to.
    pub image: Digest,
    /// `index`: the image is gone; `entry`: what it lists is gone.
    pub what: &'static str,
}

/// Cleans a repository. `images` are looked at besides those that lists are about.
pub async fn collect(
    destination: &Destination,
    images: &[Digest],
    dry_run: bool,
) -> Result<GcReport> {
    let source = destination.source().await?.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            "an archive has no indexes that could be removed",
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
            // what a list says of it is not enough to remove it
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

/// What is there under a digest.
enum DigestTarget {
    Nothing,
    Manifest(Manifest),
    /// Something that cannot be read as a manifest.
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

/// Whether a manifest says by itself that it is a SOCI index (version 1) of this image.
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
                "index" => ("SOCI index", "its image is gone"),
                _ => ("the entry of", "it is gone"),
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
