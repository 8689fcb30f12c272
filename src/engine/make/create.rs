//! Makes a SOCI index (version 1) for an image. Each layer is read once; several layers are read in parallel.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    thread::available_parallelism,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};

use super::{
    compact_index::NewCompactIndex,
    layer_pass::LayerMaker,
    options::{CreateOptions, OnLayerProgress},
    parts::LayerResult,
    prefetch_lists::spans_of_uses,
    report::{CreateReport, LayerReport, nothing_made},
    reuse::ReusableIndexes,
};
use crate::{
    compact::manifest::Subject,
    engine::open::{image::Image, local_indexes::LocalIndexes},
    error::{Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::{Digest, media_type::OCI_MANIFEST},
    soci::{
        files,
        index::{BUILD_TOOL, Descriptor, EMPTY_CONFIG, IndexManifest, Version},
        prefetch::Prefetch,
    },
    source::{DEFAULT_UPLOADS, Destination, layout::NewArtifact},
    tar::Entry,
    ztoc::{SpanTable, Ztoc},
};

/// Makes the index of an image and stores it beside an image on this host (in its layout directory, in containerd), or, for other sources,
/// in the state directory.
pub async fn create(
    image: &Image,
    options: &CreateOptions,
    local: &LocalIndexes,
    progress: OnLayerProgress<'_>,
) -> Result<CreateReport> {
    let pass = LayerResults::over(image, options, local, progress).await?;
    let (report, soci, compact) = pass.artifacts(image, options)?;
    let beside = match options.in_state_directory {
        true => None,
        false => Destination::beside(&image.source).await?,
    };
    let compact = match compact {
        Some(compact) => Some(compact.with_all_blobs().await?),
        None => None,
    };
    for artifact in compact.into_iter().chain([soci]) {
        match &beside {
            Some(to) => {
                to.put_referrer(artifact, &image.digest, DEFAULT_UPLOADS)
                    .await?
            }
            None => local.store(artifact, image).await?,
        };
    }
    if let Some(to) = &beside {
        to.finish().await?;
    }
    let stored_in = match beside {
        Some(_) => image.source.reference().to_string(),
        None => "the state directory".to_owned(),
    };
    Ok(CreateReport {
        stored_in,
        ..report
    })
}

/// Makes the index of an image and stores it as a referrer of the image at a destination, which must have the image.
pub async fn create_at(
    image: &Image,
    options: &CreateOptions,
    local: &LocalIndexes,
    destination: &Destination,
    uploads: usize,
    progress: OnLayerProgress<'_>,
) -> Result<CreateReport> {
    let pass = LayerResults::over(image, options, local, progress).await?;
    let (report, soci, compact) = pass.artifacts(image, options)?;
    if let Some(compact) = &compact {
        compact.copy_existing(destination).await?;
    }
    let compact = compact.map(|compact| compact.artifact);
    for artifact in compact.into_iter().chain([soci]) {
        destination
            .put_referrer(artifact, &image.digest, uploads)
            .await
            .map_err(|error| error.context(format!("pushing the SOCI index {}", report.index)))?;
    }
    destination.finish().await?;
    Ok(CreateReport {
        stored_in: destination.reference().to_string(),
        ..report
    })
}

/// The results of an image's layers. They are not stored yet.
struct LayerResults(HashMap<Digest, LayerResult>);

impl LayerResults {
    /// Reads each layer once, unless everything wanted from it exists already.
    async fn over(
        image: &Image,
        options: &CreateOptions,
        local: &LocalIndexes,
        progress: OnLayerProgress<'_>,
    ) -> Result<Self> {
        let mut reusable = ReusableIndexes::new(options);
        if !options.force {
            reusable.add_local(local).await;
            reusable.add_image(image).await;
        }
        let maker = LayerMaker {
            options,
            reusable,
            destination: None,
            foreign: image.foreign_layers(),
            progress,
        };
        let cores = available_parallelism().map_or(1, usize::from);
        let mut seen = HashSet::new();
        let distinct = image
            .layers
            .iter()
            .filter(|layer| seen.insert(layer.digest));
        futures_util::stream::iter(distinct)
            .map(async |layer| -> Result<_> {
                let (made, _) = maker.layer(&image.source, layer).await?;
                Ok((layer.digest, made))
            })
            .buffer_unordered(cores)
            .try_collect()
            .await
            .map(Self)
    }

    /// The SOCI index (version 1) and the compact index. The compact index must be stored first: clients that only know SOCI take the
    /// newest referrer.
    fn artifacts(
        &self,
        image: &Image,
        options: &CreateOptions,
    ) -> Result<(CreateReport, NewArtifact, Option<NewCompactIndex<'_>>)> {
        let mut index = NewSociIndex::of(image, &self.0, options)?;
        index.manifest.subject = Some(Descriptor {
            media_type: image.media_type.clone(),
            digest: image.digest.to_string(),
            size: i64::try_from(image.manifest_bytes.len()).unwrap_or(i64::MAX), // it is in memory
            ..Descriptor::default()
        });
        let subject = Subject {
            media_type: image.media_type.clone(),
            digest: image.digest,
            size: image.manifest_bytes.len() as u64,
        };
        let compact = NewCompactIndex::of(image, &self.0, options, Some(subject))?;
        let artifact = index.artifact()?;
        let report = CreateReport {
            index: Digest::of(&artifact.manifest),
            compact_index: compact
                .as_ref()
                .map(|compact| Digest::of(&compact.artifact.manifest)),
            image: image.digest,
            platform: image.platform.to_string(),
            stored_in: String::new(),
            layers: index.layers,
            warnings: index.warnings,
        };
        Ok((report, artifact, compact))
    }
}

/// A new SOCI index: its manifest (version 2 until it gets a subject), its blobs, and the report of each layer.
pub(crate) struct NewSociIndex {
    pub(crate) manifest: IndexManifest,
    pub(crate) blobs: Vec<Bytes>,
    pub(crate) layers: Vec<LayerReport>,
    pub(crate) warnings: Vec<String>,
}

impl NewSociIndex {
    /// Makes the index of an image from the results of its layers.
    pub(crate) fn of(
        image: &Image,
        made: &HashMap<Digest, LayerResult>,
        options: &CreateOptions,
    ) -> Result<Self> {
        let media_types = image
            .manifest
            .layers()
            .iter()
            .map(|layer| layer.media_type().to_string());
        let layers: Vec<(&LayerBlob, String, &LayerResult)> = image
            .layers
            .iter()
            .zip(media_types)
            .filter_map(|(layer, media_type)| Some((layer, media_type, made.get(&layer.digest)?)))
            .collect();
        let report: Vec<LayerReport> = layers
            .iter()
            .map(|(layer, media_type, made)| LayerReport {
                layer: layer.digest,
                media_type: media_type.clone(),
                size: layer.size,
                outcome: made.outcome(),
                compact: made.compact_report(),
            })
            .collect();
        let mut descriptors = Vec::new();
        let mut blobs = BTreeMap::new();
        for (layer, media_type, made) in &layers {
            if let Ok(table) = &made.ztoc {
                descriptors.push(table.descriptor(&layer.digest, media_type, options)?);
                blobs.insert(table.digest, table.bytes.clone());
            }
        }
        if descriptors.is_empty() {
            return Err(nothing_made(&report));
        }
        let mut warnings: Vec<String> = Vec::new();
        for (layer, _, made) in &layers {
            let noted = made
                .absent
                .clone()
                .into_iter()
                .chain(made.other_diff_id(layer));
            warnings.extend(noted);
        }
        if !options.prefetch_files.is_empty() {
            let layers: Vec<(Digest, &LayerResult)> = layers
                .iter()
                .map(|(layer, _, made)| (layer.digest, *made))
                .collect();
            prefetch(
                &layers,
                options,
                &mut descriptors,
                &mut blobs,
                &mut warnings,
            )?;
        }
        if !options.uses.is_empty() {
            for (layer, _, made) in &layers {
                let Ok(table) = &made.ztoc else { continue };
                let spans = table.parse(&layer.digest)?.spans;
                if let Some(list) = spans_of_uses(&layer.digest, &spans, options) {
                    add_prefetch(&list, &layer.digest, &mut descriptors, &mut blobs)?;
                }
            }
        }
        for (layer, _, made) in &layers {
            if let Ok(table) = &made.ztoc
                && let Some(list) = &table.prefetch
            {
                add_list(list.clone(), &layer.digest, &mut descriptors, &mut blobs);
            }
        }
        let config = Bytes::from_static(EMPTY_CONFIG);
        blobs.insert(Digest::of(&config), config);
        Ok(Self {
            manifest: IndexManifest {
                version: Version::V2,
                layers: descriptors,
                subject: None,
                annotations: [(BUILD_TOOL.to_owned(), options.build_tool.clone())].into(),
            },
            blobs: blobs.into_values().collect(),
            layers: report,
            warnings,
        })
    }

    /// The artifact to store; version 1 if the index has a subject.
    pub(crate) fn artifact(&mut self) -> Result<NewArtifact> {
        if self.manifest.subject.is_some() {
            self.manifest.version = Version::V1;
        }
        let bytes = self
            .manifest
            .to_bytes()
            .or_kind(Kind::Io, || "encoding the SOCI index".to_owned())?;
        Ok(NewArtifact {
            media_type: OCI_MANIFEST.to_owned(),
            manifest: bytes.into(),
            artifact_type: self.manifest.version.artifact_type().to_owned(),
            annotations: self.manifest.annotations.clone(),
            blobs: self.blobs.clone(),
        })
    }
}

/// Adds the prefetch artifacts for the files of `--prefetch-file`.
fn prefetch(
    layers: &[(Digest, &LayerResult)],
    options: &CreateOptions,
    descriptors: &mut Vec<Descriptor>,
    blobs: &mut BTreeMap<Digest, Bytes>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let tables = layers
        .iter()
        .map(|(layer, made)| match &made.ztoc {
            Ok(table) => table.parse(layer).map(Some),
            Err(_) => Ok(None),
        })
        .collect::<Result<Vec<Option<Ztoc>>>>()?;
    let tables: Vec<Option<(&[Entry], &SpanTable)>> = tables
        .iter()
        .map(|table| {
            table
                .as_ref()
                .map(|table| (&table.entries[..], &table.spans))
        })
        .collect();
    let listed = files::spans_of(&options.prefetch_files, &tables);
    for (found, (layer, _)) in listed.layers.iter().zip(layers) {
        let Some(found) = found else { continue };
        add_prefetch(found, layer, descriptors, blobs)?;
    }
    warnings.extend(
        listed
            .missing
            .iter()
            .map(|file| format!("prefetch file {file} is not in any layer that has a zTOC")),
    );
    Ok(())
}

fn add_prefetch(
    list: &Prefetch,
    layer: &Digest,
    descriptors: &mut Vec<Descriptor>,
    blobs: &mut BTreeMap<Digest, Bytes>,
) -> Result<()> {
    let bytes = list
        .to_bytes()
        .or_kind(Kind::Io, || "encoding a prefetch artifact".to_owned())?;
    add_list(bytes.into(), layer, descriptors, blobs);
    Ok(())
}

fn add_list(
    bytes: Bytes,
    layer: &Digest,
    descriptors: &mut Vec<Descriptor>,
    blobs: &mut BTreeMap<Digest, Bytes>,
) {
    let digest = Digest::of(&bytes);
    descriptors.push(Descriptor::of_prefetch(&digest, bytes.len() as u64, layer));
    blobs.insert(digest, bytes);
}
