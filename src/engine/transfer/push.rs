//! Pushes version 1 indexes of this host to a registry or a layout, with their image if it is not there.

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

/// What to do where the destination has an index of the image that is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ExistingIndexPolicy {
    /// Push, and say so.
    #[default]
    Warn,
    /// Do not push.
    Skip,
    /// Push.
    Allow,
}

/// How indexes are pushed.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// Of which images.
    pub platforms: Platforms,
    /// What to do where there is one.
    pub existing: ExistingIndexPolicy,
    /// Blobs that are sent at a time.
    pub uploads: usize,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self {
            platforms: Platforms::default(),
            existing: ExistingIndexPolicy::default(),
            uploads: DEFAULT_UPLOADS,
        }
    }
}

/// What was pushed.
#[derive(Clone, Debug, Serialize)]
pub struct PushReport {
    /// Where to.
    pub destination: String,
    /// Each image, and what became of its index.
    pub images: Vec<PushedIndex>,
    /// How the blobs of the image went, where it was not there.
    pub image_blobs: Option<BlobCounts>,
    /// What the person should know.
    pub warnings: Vec<String>,
}

/// What became of an image's index.
#[derive(Clone, Debug, Serialize)]
pub struct PushedIndex {
    /// The image's platform.
    pub platform: String,
    /// The image's manifest.
    pub image: Digest,
    /// The index; `None` where there was none to push.
    pub index: Option<Digest>,
    /// `pushed`, `present`, `skipped`.
    pub outcome: &'static str,
}

/// Pushes the newest index of each image: from the layout that the image is in, else from the local root. Where the destination is
/// another place than the source, the image goes first.
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
            let naming = TagUpdate::begin(destination).await?;
            let tally = BlobTally::default();
            let mut graph = ManifestCopier::new(source, destination, options.uploads, &tally);
            let copied = graph.copy(&root).await?;
            naming.give(&copied.media_type, &copied.bytes).await?;
            warnings.append(&mut graph.warnings);
            warnings.extend(changed(&root, &copied));
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

/// An index that was found here.
struct LocalSociIndex {
    digest: Digest,
    manifest: IndexManifest,
    bytes: bytes::Bytes,
    source: Source,
}

/// The newest version 1 index that this host, or the image's layout, has of an image.
async fn newest(
    image: &Image,
    local: &LocalIndexes,
    warnings: &mut Vec<String>,
) -> Result<Option<LocalSociIndex>> {
    let annotations = image.manifest.annotations().as_ref();
    if annotations.is_some_and(|annotations| annotations.contains_key(INDEX_DIGEST)) {
        warnings.push(format!(
            "image {} ({}) has its index (v2) in itself: `socinbd copy` moves both",
            image.digest, image.platform
        ));
        return Ok(None);
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
    warnings.push(format!(
        "no index of image {} ({}) is here: `socinbd index create` makes one",
        image.digest, image.platform
    ));
    Ok(None)
}

/// The newest artifact of a type that refers to an image, in its layout or on this host.
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

/// Pushes the image's compact index, where there is one: before the SOCI index, which stays the newest for who knows no other.
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
        format!("there is none to push: {}", warnings.join("; ")),
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
