//! Converts an image to an image with a SOCI index (version 2). Each layer is read at most once. Blobs that the destination has, or can
//! mount, are not transferred.
//!
//! Blobs are written first, then SOCI indexes and manifests, then the image index, whose tag comes last. So an aborted conversion leaves
//! nothing that has a tag, and a repeated one reuses most of the work.

use std::{
    collections::{HashMap, HashSet},
    thread::available_parallelism,
};

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::{Map, Value, json};

use super::{
    compact_index::NewCompactIndex,
    create::NewSociIndex,
    layer_pass::LayerMaker,
    options::{ConvertOptions, OnLayerProgress},
    parts::LayerResult,
    report::{ConvertReport, ConvertedImage, SignatureCoverage},
    reuse::ReusableIndexes,
};
use crate::{
    engine::{
        open::{
            image::Image,
            local_indexes::LocalIndexes,
            nested_indexes::{indexes, listed},
            platforms::{ChosenImages, Platforms, choose_images},
        },
        transfer::{
            manifests::{BlobTally, CopiedManifest, ManifestCopier},
            naming::TagUpdate,
            referrers::{self},
        },
    },
    error::{Error, Kind, Result, ResultExt as _},
    layer::LayerBlob,
    oci::{
        Digest,
        media_type::{OCI_INDEX, OCI_MANIFEST},
    },
    soci::convert::{
        Converted, annotations, image_index, image_manifest, named_compact_index, named_index,
    },
    source::{Destination, Manifest, Source},
};

/// Converts the image of the source's reference and stores the result under the destination's reference.
pub async fn convert(
    source: &Source,
    destination: &Destination,
    options: &ConvertOptions,
    local: &LocalIndexes,
    progress: OnLayerProgress<'_>,
) -> Result<ConvertReport> {
    let work = async {
        let naming = TagUpdate::begin(destination).await?;
        let root = source.root_manifest().await?;
        let ChosenImages {
            images,
            mut warnings,
            absent: _, // reported when the index is copied
        } = choose_images(source, &root, &options.platforms).await?;
        let tally = BlobTally::default();
        let reusable =
            reusable_indexes(source, &naming, destination, &images, options, local).await?;
        let made = layers(
            source,
            destination,
            &images,
            reusable,
            options,
            &tally,
            progress,
        )
        .await?;
        let mut converted = Vec::new();
        let mut reports = Vec::new();
        for image in &images {
            let (one, report, noted) = one_image(image, destination, &made, options, &tally)
                .await
                .map_err(|error| {
                    error.context(format!("{} image {}", image.platform, image.digest))
                })?;
            converted.push(one);
            reports.push(report);
            for warning in noted {
                if !warnings.contains(&warning) {
                    warnings.push(warning);
                }
            }
        }
        let mut graph = ManifestCopier::new(source, destination, options.uploads, &tally)
            .with_converted(&converted);
        let is_list = images.iter().all(|image| image.digest != root.digest);
        let (media_type, index) = match is_list {
            true => {
                let index = graph.copy_references(&root).await?;
                (index.media_type, index.bytes)
            }
            false => {
                let index = image_index(None, &converted);
                let index =
                    index.or_kind(Kind::Corrupt, || "encoding the image index".to_owned())?;
                (OCI_INDEX.to_owned(), index.into())
            }
        };
        warnings.append(&mut graph.warnings);
        let digest = naming.set(&media_type, &index).await?;
        destination.finish().await?;
        Ok(ConvertReport {
            source: source.reference().to_string(),
            source_digest: root.digest,
            destination: destination.reference().to_string(),
            digest,
            vouchers: vouchers(source, &root, &images, &graph.copied, &mut warnings).await,
            images: reports,
            blobs: tally.counts(),
            warnings,
        })
    };
    work.await
        .map_err(|error: Error| error.context(format!("converting {}", source.reference())))
}

/// The outcome of [`convert_unless_done`].
#[derive(Clone, Debug)]
pub enum ConvertOutcome {
    /// The image was converted.
    Converted(Box<ConvertReport>),
    /// The destination already has the conversion, with this digest.
    Unchanged(Digest),
}

/// Converts an image, unless the destination's tag already names the conversion of exactly this image and `force` is not set.
///
/// If the tag does not exist, or names the conversion of another image, the image is converted. If the tag names content that cannot be
/// read, that is an error, and nothing is replaced, because the content is unknown. [`convert`] itself replaces the tag, unless another
/// writer changes it meanwhile.
pub async fn convert_unless_done(
    source: &Source,
    destination: &Destination,
    options: &ConvertOptions,
    local: &LocalIndexes,
    progress: OnLayerProgress<'_>,
) -> Result<ConvertOutcome> {
    if !options.create.force
        && let Some(there) = destination.source().await?
    {
        let done = async {
            let found = match there.root_manifest().await {
                Err(error) if error.kind() == Kind::NotFound => return Ok(None),
                found => found?,
            };
            let done = is_converted(source, &there, &found, &options.platforms).await?;
            Ok(done.then_some(found.digest))
        };
        let done = done.await.map_err(|error: Error| {
            error.context(format!(
                "reading the current manifest of {}",
                there.reference()
            ))
        })?;
        if let Some(digest) = done {
            return Ok(ConvertOutcome::Unchanged(digest));
        }
    }
    let report = convert(source, destination, options, local, progress).await?;
    Ok(ConvertOutcome::Converted(Box::new(report)))
}

/// Whether the manifest at the destination is the conversion of the source's current image, for these platforms.
pub async fn is_converted(
    source: &Source,
    there: &Source,
    found: &Manifest,
    platforms: &Platforms,
) -> Result<bool> {
    let root = source.root_manifest().await?;
    let wanted = choose_images(source, &root, platforms).await?.images;
    let mut manifests = Vec::new();
    for index in indexes(there, found).await {
        for digest in listed(&index, |entry| entry.get("artifactType").is_none()) {
            manifests.extend(there.manifest(&digest).await.ok());
        }
    }
    for image in &wanted {
        let is_conversion = |manifest: &Manifest| {
            let named = named_index(&manifest.bytes).and_then(|named| named.parse().ok());
            let compact = named_compact_index(&manifest.bytes);
            let compact = compact.and_then(|named| named.parse().ok());
            let made = named.and_then(|named| {
                image_manifest(&image.manifest_bytes, &named, compact.as_ref()).ok()
            });
            made.is_some_and(|made| made == manifest.bytes)
        };
        if !manifests.iter().any(is_conversion) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The existing indexes that can be reused.
async fn reusable_indexes(
    source: &Source,
    naming: &TagUpdate<'_>,
    destination: &Destination,
    images: &[Image],
    options: &ConvertOptions,
    local: &LocalIndexes,
) -> Result<ReusableIndexes> {
    let mut reusable = ReusableIndexes::new(&options.create);
    if options.create.force {
        return Ok(reusable);
    }
    for image in images {
        reusable.add_image(image).await;
    }
    reusable.add_local(local).await;
    // indexes of an earlier conversion to the same tag
    if let Some(there) = destination.source().await?
        && there.reference() != source.reference()
        && let Some(before) = naming.before()
    {
        for index in indexes(&there, before).await {
            reusable.add_listed(&there, &index).await;
        }
    }
    Ok(reusable)
}

/// Makes the zTOCs of all layers, and copies the layers to the destination.
async fn layers(
    source: &Source,
    destination: &Destination,
    images: &[Image],
    reusable: ReusableIndexes,
    options: &ConvertOptions,
    tally: &BlobTally,
    progress: OnLayerProgress<'_>,
) -> Result<HashMap<Digest, LayerResult>> {
    let foreign = images.iter().flat_map(Image::foreign_layers).collect();
    let maker = LayerMaker {
        options: &options.create,
        reusable,
        destination: Some(destination),
        foreign,
        progress,
    };
    let maker = &maker;
    let mut seen = HashSet::new();
    let distinct: Vec<&LayerBlob> = images
        .iter()
        .flat_map(|image| &image.layers)
        .filter(|layer| seen.insert(layer.digest))
        .collect();
    let cores = available_parallelism().map_or(1, usize::from);
    futures_util::stream::iter(distinct)
        .map(|layer| async move {
            let (made, copied) = maker.layer(source, layer).await?;
            if let Some(copied) = copied {
                tally.count(copied, layer.size);
            }
            Ok((layer.digest, made))
        })
        .buffer_unordered(cores.max(options.uploads))
        .try_collect()
        .await
}

/// Writes the SOCI index of an image and its new manifest.
async fn one_image(
    image: &Image,
    destination: &Destination,
    made: &HashMap<Digest, LayerResult>,
    options: &ConvertOptions,
    tally: &BlobTally,
) -> Result<(Converted, ConvertedImage, Vec<String>)> {
    let mut index = NewSociIndex::of(image, made, &options.create)?;
    let artifact = index.artifact()?;
    let compact = NewCompactIndex::of(image, made, &options.create, None)?;
    let compact_blobs = compact
        .as_ref()
        .map_or(&[][..], |compact| &compact.artifact.blobs);
    let blobs: Vec<_> = artifact
        .blobs
        .iter()
        .chain(compact_blobs)
        .cloned()
        .collect();
    let sent: Vec<_> = futures_util::stream::iter(blobs)
        .map(|blob| async move {
            let copied = destination.put_blob(&blob).await?;
            Ok::<_, Error>((copied, blob.len() as u64))
        })
        .buffer_unordered(options.uploads.max(1))
        .try_collect()
        .await?;
    let existing = match &compact {
        Some(compact) => compact.copy_existing(destination).await?,
        None => Vec::new(),
    };
    let config = image.manifest.config();
    let config_digest: Digest = config.digest().as_ref().parse()?;
    let copied = destination
        .copy_blob(&image.source, &config_digest, config.size(), None)
        .await?;
    for (copied, size) in sent
        .into_iter()
        .chain(existing)
        .chain([(copied, config.size())])
    {
        tally.count(copied, size);
    }
    let soci = destination
        .put_manifest(&artifact.media_type, &artifact.manifest)
        .await?;
    let compact = match &compact {
        Some(compact) => {
            let digest = destination
                .put_manifest(&compact.artifact.media_type, &compact.artifact.manifest)
                .await?;
            Some((digest, compact.artifact.manifest.len()))
        }
        None => None,
    };
    let compact_index = compact.map(|(digest, _)| digest);
    let manifest = image_manifest(&image.manifest_bytes, &soci, compact_index.as_ref())
        .or_kind(Kind::Corrupt, || format!("manifest {}", image.digest))?;
    let annotations = annotations(&manifest);
    let manifest = manifest.into();
    let digest = destination.put_manifest(OCI_MANIFEST, &manifest).await?;
    let converted = Converted {
        old: image.digest,
        manifest: digest,
        manifest_size: manifest.len(),
        annotations,
        index: soci,
        index_size: artifact.manifest.len(),
        compact,
        replaces: named_index(&image.manifest_bytes),
        platform: platform_of(image),
        index_platform: match options.platforms {
            Platforms::All => None,
            Platforms::Host | Platforms::These(_) => normal_platform(image),
        },
    };
    let report = ConvertedImage {
        platform: image.platform.to_string(),
        old: image.digest,
        manifest: digest,
        index: soci,
        compact_index,
        layers: index.layers,
    };
    Ok((converted, report, index.warnings))
}

/// The platform of an index entry. AWS's tool writes the requested platform: that of the image in normal form (arm64, not arm64/v8).
fn normal_platform(image: &Image) -> Option<Value> {
    let platform = &image.platform;
    // the platform of a Windows image includes an OS version
    (platform.os() == "linux").then(|| {
        let mut stated = json!({"architecture": platform.architecture(), "os": platform.os()});
        if !platform.variant().is_empty() {
            stated["variant"] = json!(platform.variant());
        }
        stated
    })
}

/// The platform from the image configuration, for an entry without a platform.
fn platform_of(image: &Image) -> Value {
    let config: Value = serde_json::from_slice(&image.config_bytes).unwrap_or_default();
    let stated = ["architecture", "os", "os.version", "os.features", "variant"]
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())));
    let mut platform: Map<String, Value> = stated.collect();
    for (key, value) in [
        ("architecture", image.platform.architecture()),
        ("os", image.platform.os()),
    ] {
        let fields = platform.entry(key).or_insert_with(|| value.into());
        if fields.as_str().is_none_or(str::is_empty) {
            *fields = value.into();
        }
    }
    platform.into()
}

/// The signatures and attestations of the source, and for each whether its subject is an unchanged part of the new image.
async fn vouchers(
    source: &Source,
    root: &Manifest,
    converted: &[Image],
    copied: &[CopiedManifest],
    warnings: &mut Vec<String>,
) -> Vec<SignatureCoverage> {
    let unchanged: Vec<Digest> = copied
        .iter()
        .filter(|manifest| !manifest.is_artifact)
        .map(|manifest| manifest.digest)
        .collect();
    let changed = std::iter::once(root.digest).chain(converted.iter().map(|image| image.digest));
    let subjects: Vec<Digest> = changed.chain(unchanged.iter().copied()).collect();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for subject in subjects {
        match referrers::of(source, &subject).await {
            Ok(list) => found.extend(
                list.into_iter()
                    .filter(|companion| companion.vouches && seen.insert(companion.digest))
                    .map(|companion| SignatureCoverage {
                        covers: unchanged.contains(&companion.subject),
                        companion,
                    }),
            ),
            Err(error) => {
                warnings.push(format!(
                    "cannot list the signatures of the source: {}",
                    error.report()
                ));
                break;
            }
        }
    }
    found
}
