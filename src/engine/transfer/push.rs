//! Pushes version 1 indexes of this host to a registry or a layout, with their image if the destination does not have it.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::{
    copy::changed,
    manifests::{BlobCounts, BlobTally, ManifestCopier},
    naming::TagUpdate,
};
use crate::{
    compact::{manifest as compact, manifest::ARTIFACT_TYPE as COMPACT_TYPE},
    engine::open::{
        image::Image,
        local_indexes::LocalIndexes,
        platforms::{ChosenImages, Platforms, choose_images},
        soci_index::MAX_ZTOC_BYTES,
    },
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, Reference, media_type::OCI_MANIFEST},
    soci::index::{EMPTY_CONFIG, INDEX_DIGEST, IndexManifest, V1_TYPE},
    source::{DEFAULT_UPLOADS, Destination, Manifest, Source, layout::NewArtifact},
};

/// What to do if the destination has another index of the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ExistingIndexPolicy {
    /// Push, and print a warning.
    #[default]
    Warn,
    /// Do not push.
    Skip,
    /// Push.
    Allow,
}

/// Options of a push.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// Platforms whose indexes are pushed.
    pub platforms: Platforms,
    /// What to do if the destination has another index.
    pub existing: ExistingIndexPolicy,
    /// Whether the tag of the destination stays as it is: an image is copied only where its manifest is missing.
    pub keep_tag: bool,
    /// Number of parallel uploads.
    pub uploads: usize,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self {
            platforms: Platforms::default(),
            existing: ExistingIndexPolicy::default(),
            keep_tag: false,
            uploads: DEFAULT_UPLOADS,
        }
    }
}

/// The report of a push.
#[derive(Clone, Debug, Serialize)]
pub struct PushReport {
    /// Reference of the destination.
    pub destination: String,
    /// The images, and the outcome of the index of each.
    pub images: Vec<PushedIndex>,
    /// Counts of the image's blobs, if the image was copied.
    pub image_blobs: Option<BlobCounts>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// The outcome of an image's index.
#[derive(Clone, Debug, Serialize)]
pub struct PushedIndex {
    /// Platform of the image.
    pub platform: String,
    /// Digest of the image manifest.
    pub image: Digest,
    /// Digest of the index; `None` if there was none to push.
    pub index: Option<Digest>,
    /// `pushed`, `present`, `skipped`.
    pub outcome: &'static str,
}

/// Pushes the newest index of each image, from beside the image or the state directory. If source and destination differ, the image is copied
/// first.
pub async fn push(
    source: &Source,
    destination: &Destination,
    options: &PushOptions,
    local: &LocalIndexes,
) -> Result<PushReport> {
    let work = async {
        let root = source.root_manifest().await?;
        let ChosenImages {
            images,
            absent,
            mut warnings,
        } = choose_images(source, &root, &options.platforms).await?;
        let mut found = Vec::new();
        for image in &images {
            found.push((image, newest(image, local, &mut warnings).await?));
        }
        if found.iter().all(|(_, index)| index.is_none()) {
            return Err(nothing(&warnings));
        }
        let mut image_blobs = None;
        if source.reference().place() != destination.reference().place() {
            let tally = BlobTally::default();
            let mut graph = ManifestCopier::new(source, destination, options.uploads, &tally);
            if options.keep_tag {
                for image in &images {
                    copy_missing(image, destination, &mut graph).await?;
                }
            } else {
                let naming = TagUpdate::begin(destination).await?;
                let copied = graph.copy(&root).await?;
                naming.set(&copied.media_type, &copied.bytes).await?;
                warnings.extend(changed(&root, &copied));
            }
            warnings.append(&mut graph.warnings);
            image_blobs = Some(tally.counts());
        } else {
            warnings.extend(absent);
        }
        let mut pushed = Vec::new();
        for (image, index) in found {
            let outcome = match &index {
                Some(index) => {
                    push_compact(image, destination, options, local).await?;
                    one(image, index, destination, options, &mut warnings).await?
                }
                None => "skipped",
            };
            pushed.push(PushedIndex {
                platform: image.platform.to_string(),
                image: image.digest,
                index: index.map(|index| index.digest),
                outcome,
            });
        }
        destination.finish().await?;
        Ok(PushReport {
            destination: destination.reference().to_string(),
            images: pushed,
            image_blobs,
            warnings,
        })
    };
    work.await.map_err(|error: Error| {
        error.context(format!(
            "pushing the SOCI index of {} to {}",
            source.reference(),
            destination.reference()
        ))
    })
}

/// Copies an image without a tag, if the destination does not have its manifest.
async fn copy_missing(
    image: &Image,
    destination: &Destination,
    graph: &mut ManifestCopier<'_>,
) -> Result<()> {
    if let Some(there) = destination.source().await? {
        match there.manifest(&image.digest).await {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let manifest = Manifest {
        media_type: image.media_type.clone(),
        digest: image.digest,
        bytes: image.manifest_bytes.clone(),
    };
    graph.copy(&manifest).await.map(drop)
}

/// An index that was found on this host.
struct LocalSociIndex {
    digest: Digest,
    manifest: IndexManifest,
    bytes: bytes::Bytes,
    source: Source,
}

/// The newest version 1 index of an image on this host or beside the image.
async fn newest(
    image: &Image,
    local: &LocalIndexes,
    warnings: &mut Vec<String>,
) -> Result<Option<LocalSociIndex>> {
    let annotations = image.manifest.annotations().as_ref();
    let contains_its_own =
        annotations.is_some_and(|annotations| annotations.contains_key(INDEX_DIGEST));
    if contains_its_own {
        warnings.push(format!(
            "image {} ({}) contains its index (v2): copy both with `socinbd copy`",
            image.digest, image.platform
        ));
    }
    if let Some((manifest, source)) = newest_of(image, V1_TYPE, local).await? {
        let parsed = IndexManifest::parse(&manifest.bytes)
            .or_kind(Kind::Corrupt, || format!("SOCI index {}", manifest.digest))?;
        return Ok(Some(LocalSociIndex {
            digest: manifest.digest,
            manifest: parsed,
            bytes: manifest.bytes,
            source,
        }));
    }
    if contains_its_own {
        return Ok(None);
    }
    warnings.push(format!(
        "no local index of image {} ({}): make one with `socinbd index create`",
        image.digest, image.platform
    ));
    Ok(None)
}

/// The newest artifact of a type that refers to an image, beside the image or in the state directory.
async fn newest_of(
    image: &Image,
    artifact_type: &str,
    local: &LocalIndexes,
) -> Result<Option<(Manifest, Source)>> {
    if !matches!(image.source.reference(), Reference::Registry { .. }) {
        let source = image.source.clone();
        let list = source.referrers(&image.digest, artifact_type).await?;
        if let Some(newest) = list.last() {
            return Ok(Some((source.manifest(&newest.digest).await?, source)));
        }
    }
    let list = local.of_image(&image.digest, artifact_type).await?;
    let Some(newest) = list.last() else {
        return Ok(None);
    };
    let source = local.source().await?;
    Ok(Some((source.manifest(&newest.digest).await?, source)))
}

/// Pushes the compact index of an image, if there is one. It is pushed before the SOCI index: clients that only know SOCI take the newest
/// referrer.
async fn push_compact(
    image: &Image,
    destination: &Destination,
    options: &PushOptions,
    local: &LocalIndexes,
) -> Result<()> {
    let Some((manifest, source)) = newest_of(image, COMPACT_TYPE, local).await? else {
        return Ok(());
    };
    let context = || format!("compact index {}", manifest.digest);
    let parsed = compact::Manifest::parse(&manifest.bytes).or_kind(Kind::Corrupt, context)?;
    let mut blobs = vec![bytes::Bytes::from_static(compact::CONFIG)];
    for (digest, size) in parsed.blobs() {
        blobs.push(source.blob(&digest, size, MAX_ZTOC_BYTES).await?);
    }
    let artifact = NewArtifact {
        media_type: OCI_MANIFEST.to_owned(),
        manifest: manifest.bytes.clone(),
        artifact_type: COMPACT_TYPE.to_owned(),
        annotations: BTreeMap::new(),
        blobs,
    };
    destination
        .put_referrer(artifact, &image.digest, options.uploads)
        .await?;
    Ok(())
}

async fn one(
    image: &Image,
    index: &LocalSociIndex,
    destination: &Destination,
    options: &PushOptions,
    warnings: &mut Vec<String>,
) -> Result<&'static str> {
    if let Some(there) = destination.source().await? {
        let list = there.referrers(&image.digest, V1_TYPE).await?;
        if list.iter().any(|listed| listed.digest == index.digest) {
            return Ok("present");
        }
        if let Some(other) = list.last() {
            match options.existing {
                ExistingIndexPolicy::Allow => {}
                ExistingIndexPolicy::Skip => return Ok("skipped"),
                ExistingIndexPolicy::Warn => warnings.push(format!(
                    "{} has {} other SOCI indexes of image {}, the newest is {}",
                    there.reference(),
                    list.len(),
                    image.digest,
                    other.digest
                )),
            }
        }
    }
    let mut blobs = vec![bytes::Bytes::from_static(EMPTY_CONFIG)];
    for blob in index.manifest.blobs() {
        let blob = blob.or_kind(Kind::Corrupt, || format!("SOCI index {}", index.digest))?;
        blobs.push(
            index
                .source
                .blob(&blob.digest, blob.size, MAX_ZTOC_BYTES)
                .await?,
        );
    }
    let artifact = NewArtifact {
        media_type: OCI_MANIFEST.to_owned(),
        manifest: index.bytes.clone(),
        artifact_type: V1_TYPE.to_owned(),
        annotations: index.manifest.annotations.clone(),
        blobs,
    };
    destination
        .put_referrer(artifact, &image.digest, options.uploads)
        .await?;
    Ok("pushed")
}

fn nothing(warnings: &[String]) -> Error {
    Error::new(
        Kind::NotFound,
        format!("no index to push: {}", warnings.join("; ")),
    )
}

impl fmt::Display for PushReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self
            .images
            .iter()
            .map(|image| {
                let index = image
                    .index
                    .map_or("no index".to_owned(), |index| index.to_string());
                format!(
                    "{} {}: {index} {}",
                    image.platform, image.image, image.outcome
                )
            })
            .collect();
        f.write_str(&lines.join("\n"))
    }
}
