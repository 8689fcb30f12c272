//! Makes a SOCI index (version 1) for an image: each layer passes once, several side by side.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    thread::available_parallelism,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use serde::Serialize;

pub use crate::{
    compact::DEFAULT_SPAN_SIZE as DEFAULT_COMPACT_SPAN_SIZE,
    soci::index::{DEFAULT_BUILD_TOOL, DEFAULT_MIN_LAYER_SIZE, DEFAULT_SPAN_SIZE},
};

use super::{
    compact_index::{Blob, NewCompact},
    layer_pass::{Made, Maker},
    reuse::Known,
};
use crate::{
    compact::manifest::Subject,
    engine::open::{image::Image, local_indexes::LocalIndexes},
    error::{Error, Kind, Result, ResultExt},
    layer::{LayerBlob, Touch},
    oci::{Digest, media_type::OCI_MANIFEST},
    soci::{
        files,
        index::{BUILD_TOOL, Descriptor, EMPTY_CONFIG, IndexManifest, Version},
        prefetch::Prefetch,
    },
    source::{Destination, layout::NewArtifact},
    tar::Entry,
    units::SpanId,
    ztoc::{SpanTable, Ztoc},
};

/// How an index is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of a layer between checkpoints, at least.
    pub span_size: u64,
    /// Layers whose blobs have fewer bytes get no zTOC.
    pub min_layer_size: u64,
    /// What the index says that it was made by.
    pub build_tool: String,
    /// Whether a compact index is made in the same pass, and its bytes of a layer between checkpoints, at least.
    pub compact_span_size: Option<u64>,
    /// Say of layers without any xattr that they have none (`--optimizations xattr`).
    pub disable_xattrs: bool,
    /// Make each zTOC anew, also where there is one of the same layer and span size.
    pub force: bool,
    /// Files whose spans a prefetch artifact lists.
    pub prefetch_files: Vec<String>,
    /// What a recorded start has read, in order: its spans are listed in prefetch artifacts.
    pub uses: Vec<Touch>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            span_size: DEFAULT_SPAN_SIZE,
            min_layer_size: DEFAULT_MIN_LAYER_SIZE,
            build_tool: DEFAULT_BUILD_TOOL.to_owned(),
            compact_span_size: None,
            disable_xattrs: false,
            force: false,
            prefetch_files: Vec::new(),
            uses: Vec::new(),
        }
    }
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct CreateReport {
    /// The index.
    pub index: Digest,
    /// The compact index, if one was made too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact_index: Option<Digest>,
    /// The manifest of the image that it belongs to.
    pub image: Digest,
    /// The image's platform.
    pub platform: String,
    /// Where it was stored.
    pub stored_in: String,
    /// The image's layers, the lowest first.
    pub layers: Vec<LayerReport>,
    /// What the person should know: files to prefetch that are nowhere.
    pub warnings: Vec<String>,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: Digest,
    /// Its media type.
    pub media_type: String,
    /// Bytes of its blob.
    pub size: u64,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What the compact index has of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact: Option<CompactReport>,
}

/// What a compact index has of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct CompactReport {
    /// The table.
    pub table: Digest,
    /// Bytes of the table: what is fetched before the first read.
    pub table_size: u64,
    /// Bytes of the table and of all windows.
    pub blob_size: u64,
    /// Spans.
    pub spans: usize,
    /// An index had it already.
    pub reused: bool,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    /// It has a zTOC now.
    Indexed {
        /// The zTOC.
        ztoc: Digest,
        /// Its bytes.
        ztoc_size: u64,
        /// An index had it already.
        reused: bool,
    },
    /// It has none: it will be streamed whole.
    Skipped {
        /// Why.
        skipped: String,
    },
}

/// Told the bytes of a layer that have passed, and all that it has.
pub type Progress<'a> = &'a (dyn Fn(Digest, u64, u64) + Send + Sync);

/// Makes the index of an image and stores it: in the layout that the image is in, if that is a folder, else in the local root.
pub async fn create(
    image: &Image,
    options: &CreateOptions,
    local: &LocalIndexes,
    progress: Progress<'_>,
) -> Result<CreateReport> {
    let pass = Pass::over(image, options, local, progress).await?;
    let (report, soci, compact) = pass.artifacts(image, options)?;
    let beside = image.source.layout().filter(|layout| layout.is_writable());
    let compact = match compact {
        Some(compact) => Some(compact.whole().await?),
        None => None,
    };
    for artifact in compact.into_iter().chain([soci]) {
        match beside {
            Some(layout) => layout.store(artifact).await?,
            None => local.store(artifact, image).await?,
        };
    }
    let stored_in = match beside {
        Some(_) => image.source.reference().to_string(),
        None => "the local root".to_owned(),
    };
    Ok(CreateReport {
        stored_in,
        ..report
    })
}

/// Makes the index of an image and stores it among the image's referrers at a destination, which must have the image.
pub async fn create_at(
    image: &Image,
    options: &CreateOptions,
    local: &LocalIndexes,
    destination: &Destination,
    uploads: usize,
    progress: Progress<'_>,
) -> Result<CreateReport> {
    let pass = Pass::over(image, options, local, progress).await?;
    let (report, soci, compact) = pass.artifacts(image, options)?;
    if let Some(compact) = &compact {
        compact.copy_known(destination).await?;
    }
    let compact = compact.map(|compact| compact.artifact);
    for artifact in compact.into_iter().chain([soci]) {
        destination
            .put_referrer(artifact, &image.digest, uploads)
            .await
            .map_err(|error| error.context(format!("pushing the SOCI index {}", report.index)))?;
    }
    Ok(CreateReport {
        stored_in: destination.reference().to_string(),
        ..report
    })
}

/// What was made of an image's layers, which are stored nowhere yet.
struct Pass(HashMap<Digest, Made>);

impl Pass {
    /// Has each layer pass once, unless all that is wanted of it is known.
    async fn over(
        image: &Image,
        options: &CreateOptions,
        local: &LocalIndexes,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let mut known = Known::new(options);
        if !options.force {
            known.add_local(local).await;
            known.add_image(image).await;
        }
        let maker = Maker {
            options,
            known,
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

    /// The index of version 1, and the compact index. That is to be stored first: the SOCI index is then the newest for who knows no other.
    fn artifacts(
        &self,
        image: &Image,
        options: &CreateOptions,
    ) -> Result<(CreateReport, NewArtifact, Option<NewCompact<'_>>)> {
        let mut index = NewIndex::of(image, &self.0, options)?;
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
        let compact = NewCompact::of(image, &self.0, options, Some(subject))?;
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

/// An index that was made: its manifest (of version 2, until it gets a subject), its blobs, and what became of each layer.
pub(crate) struct NewIndex {
    pub(crate) manifest: IndexManifest,
    pub(crate) blobs: Vec<Bytes>,
    pub(crate) layers: Vec<LayerReport>,
    pub(crate) warnings: Vec<String>,
}

impl NewIndex {
    /// The index of an image, from what was made of its layers.
    pub(crate) fn of(
        image: &Image,
        made: &HashMap<Digest, Made>,
        options: &CreateOptions,
    ) -> Result<Self> {
        let media_types = image
            .manifest
            .layers()
            .iter()
            .map(|layer| layer.media_type().to_string());
        let layers: Vec<(&LayerBlob, String, &Made)> = image
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
            let layers: Vec<(Digest, &Made)> = layers
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

    /// The index as it is stored: of version 1 where it has a subject.
    pub(crate) fn artifact(&mut self) -> Result<NewArtifact> {
        if self.manifest.subject.is_some() {
            self.manifest.version = Version::V1;
        }
        let bytes = self
            .manifest
            .to_bytes()
            .or_kind(Kind::Io, || "the SOCI index".to_owned())?;
        Ok(NewArtifact {
            media_type: OCI_MANIFEST.to_owned(),
            manifest: bytes.into(),
            artifact_type: self.manifest.version.artifact_type().to_owned(),
            annotations: self.manifest.annotations.clone(),
            blobs: self.blobs.clone(),
        })
    }
}

/// Adds the prefetch artifacts of the listed files.
fn prefetch(
    layers: &[(Digest, &Made)],
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
            .map(|file| format!("prefetch file {file} is in no layer that has a zTOC")),
    );
    Ok(())
}

/// The spans of a layer that a recorded start has read, in their order.
pub(super) fn spans_of_uses(
    layer: &Digest,
    spans: &SpanTable,
    options: &CreateOptions,
) -> Option<Prefetch> {
    let uses = (1..)
        .zip(&options.uses)
        .filter(|(_, touch)| touch.layer == *layer);
    Prefetch::of_uses(uses.flat_map(|(order, touch)| {
        let covering = spans.covering(touch.bytes.clone());
        (covering.start.get()..covering.end.get()).map(move |span| (order, SpanId(span)))
    }))
}

fn add_prefetch(
    list: &Prefetch,
    layer: &Digest,
    descriptors: &mut Vec<Descriptor>,
    blobs: &mut BTreeMap<Digest, Bytes>,
) -> Result<()> {
    let bytes = list
        .to_bytes()
        .or_kind(Kind::Io, || "a prefetch artifact".to_owned())?;
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

impl Made {
    /// Says that a layer has not the diff ID that the image's configuration gives it.
    fn other_diff_id(&self, layer: &LayerBlob) -> Option<String> {
        let other = self.diff_id.filter(|diff_id| *diff_id != layer.diff_id)?;
        Some(format!(
            "layer {} has the diff ID {other}, where the image's configuration says {}: container engines that unpack the layer refuse \
             the image, and an attach of it fails when the layer has been read in full; build the image again",
            layer.digest, layer.diff_id
        ))
    }

    fn outcome(&self) -> Outcome {
        match &self.ztoc {
            Ok(table) => Outcome::Indexed {
                ztoc: table.digest,
                ztoc_size: table.bytes.len() as u64,
                reused: table.reused,
            },
            Err(reason) => Outcome::Skipped {
                skipped: reason.clone(),
            },
        }
    }

    fn compact_report(&self) -> Option<CompactReport> {
        let part = self.compact.as_ref()?.as_ref().ok()?;
        Some(CompactReport {
            table: part.index.table,
            table_size: part.index.table_size,
            blob_size: part.index.size,
            spans: part.spans,
            reused: matches!(part.blob, Blob::At(_)),
        })
    }
}

fn nothing_made(layers: &[LayerReport]) -> Error {
    let mut text = "no zTOC was made: every layer was skipped".to_owned();
    for layer in layers {
        text.push_str(&format!("\n  {layer}"));
    }
    if layers
        .iter()
        .any(|layer| layer.size < DEFAULT_MIN_LAYER_SIZE)
    {
        text.push_str("\n  --min-layer-size sets from which size on a layer is indexed");
    }
    Error::new(Kind::Unsupported, text)
}

impl fmt::Display for LayerReport {
    /// As AWS's tool says it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Indexed { ztoc, reused, .. } => {
                let known = if *reused { " (already exists)" } else { "" };
                write!(f, "layer {} -> ztoc {ztoc}{known}", self.layer)?;
            }
            Outcome::Skipped { skipped } => write!(
                f,
                "ztoc skipped - layer {} ({}): {skipped}",
                self.layer, self.media_type
            )?,
        }
        match &self.compact {
            Some(compact) => {
                let known = if compact.reused {
                    " (already exists)"
                } else {
                    ""
                };
                write!(
                    f,
                    ", compact table of {} bytes ({} spans, {} bytes with their windows){known}",
                    compact.table_size, compact.spans, compact.blob_size
                )
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for CreateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in &self.layers {
            writeln!(f, "{layer}")?;
        }
        if let Some(compact) = &self.compact_index {
            writeln!(f, "compact index {compact}")?;
        }
        write!(f, "index {} in {}", self.index, self.stored_in)
    }
}
