//! Makes a SOCI index (version 1) for an image: each layer passes once, several side by side.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    thread::available_parallelism,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::sync::mpsc;

pub use crate::compact::DEFAULT_SPAN_SIZE as DEFAULT_COMPACT_SPAN_SIZE;
pub use crate::soci::index::{DEFAULT_BUILD_TOOL, DEFAULT_MIN_LAYER_SIZE, DEFAULT_SPAN_SIZE};

use super::{image::Image, local::LocalIndexes};
use crate::{
    compact::manifest as compact,
    error::{Error, Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::{Digest, Packing, media_type::OCI_MANIFEST},
    soci::{
        build::{CompactBlob, Indexed, LayerIndexer, NoSink, Options},
        index::{BUILD_TOOL, Descriptor, EMPTY_CONFIG, IndexManifest, Version},
    },
    source::layout::NewArtifact,
};

/// Pieces of a layer that are on their way from the source to the indexer.
const PIECES_AHEAD: usize = 4;

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
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            span_size: DEFAULT_SPAN_SIZE,
            min_layer_size: DEFAULT_MIN_LAYER_SIZE,
            build_tool: DEFAULT_BUILD_TOOL.to_owned(),
            compact_span_size: None,
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
    let cores = available_parallelism().map_or(1, usize::from);
    let mut seen = HashSet::new();
    let distinct = image
        .layers
        .iter()
        .filter(|layer| seen.insert(layer.digest));
    let made: HashMap<Digest, Made> = futures_util::stream::iter(distinct)
        .map(async |layer| -> Result<_> {
            let made = one_layer(image, layer, options, progress)
                .await
                .map_err(|error| error.context(format!("layer {}", layer.digest)))?;
            Ok((layer.digest, made))
        })
        .buffer_unordered(cores)
        .try_collect()
        .await?;

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
    let descriptors: Vec<Descriptor> = layers
        .iter()
        .filter_map(|(layer, media_type, made)| {
            let (digest, bytes) = made.ztoc.as_ref().ok()?;
            Some(Descriptor::of_ztoc(
                digest,
                bytes.len() as u64,
                &layer.digest,
                media_type,
                options.span_size,
            ))
        })
        .collect();
    if descriptors.is_empty() {
        return Err(nothing_made(&report));
    }

    let manifest = IndexManifest {
        version: Version::V1,
        layers: descriptors,
        subject: Some(Descriptor {
            media_type: image.media_type.clone(),
            digest: image.digest.to_string(),
            size: i64::try_from(image.manifest_bytes.len()).unwrap_or(i64::MAX), // it is in memory
            ..Descriptor::default()
        }),
        annotations: [(BUILD_TOOL.to_owned(), options.build_tool.clone())].into(),
    };
    let mut compact = compact_manifest(image, options, &layers);
    let (mut ztocs, mut tables) = (Vec::new(), Vec::new());
    for made in made.into_values() {
        ztocs.extend(made.ztoc.ok().map(|(_, bytes)| bytes));
        tables.extend(
            made.compact
                .and_then(Result::ok)
                .map(|(_, blob)| blob.bytes.into()),
        );
    }
    let bytes = manifest
        .to_bytes()
        .or_kind(Kind::Io, || "the SOCI index".to_owned())?;
    // first, so that the SOCI index stays the newest of the artifacts for who knows no other
    let compact_index = match compact.take() {
        Some(manifest) => {
            let bytes = manifest
                .to_bytes()
                .or_kind(Kind::Io, || "the compact index".to_owned())?;
            let artifact = NewArtifact {
                media_type: OCI_MANIFEST.to_owned(),
                manifest: bytes.into(),
                artifact_type: compact::ARTIFACT_TYPE.to_owned(),
                annotations: BTreeMap::new(),
                blobs: with_config(tables, compact::CONFIG),
            };
            Some(store(image, artifact, local).await?.0)
        }
        None => None,
    };
    let artifact = NewArtifact {
        media_type: OCI_MANIFEST.to_owned(),
        manifest: bytes.into(),
        artifact_type: manifest.version.artifact_type().to_owned(),
        annotations: manifest.annotations.clone(),
        blobs: with_config(ztocs, EMPTY_CONFIG),
    };
    let (index, stored_in) = store(image, artifact, local).await?;
    Ok(CreateReport {
        index,
        compact_index,
        image: image.digest,
        platform: image.platform.to_string(),
        stored_in,
        layers: report,
    })
}

/// The manifest of the compact index; `None` where no layer has a part of one.
fn compact_manifest(
    image: &Image,
    options: &CreateOptions,
    layers: &[(&LayerBlob, String, &Made)],
) -> Option<compact::Manifest> {
    let mut seen = HashSet::new();
    let layers: Vec<compact::LayerIndex> = layers
        .iter()
        .filter(|(layer, ..)| seen.insert(layer.digest))
        .filter_map(|(layer, _, made)| {
            let (digest, blob) = made.compact.as_ref()?.as_ref().ok()?;
            Some(compact::LayerIndex {
                layer: layer.digest,
                blob: *digest,
                size: blob.bytes.len() as u64,
                table: blob.table,
                table_size: blob.table_size as u64,
                span_size: blob.span_size,
            })
        })
        .collect();
    (!layers.is_empty()).then(|| compact::Manifest {
        layers,
        subject: Some(compact::Subject {
            media_type: image.media_type.clone(),
            digest: image.digest,
            size: image.manifest_bytes.len() as u64,
        }),
        build_tool: Some(options.build_tool.clone()),
    })
}

fn with_config(mut blobs: Vec<Bytes>, config: &'static [u8]) -> Vec<Bytes> {
    blobs.push(Bytes::from_static(config));
    blobs
}

/// What was made of a layer.
struct Made {
    /// The zTOC, or why there is none.
    ztoc: Result<(Digest, Bytes), String>,
    /// Its part of the compact index, if one is wanted, or why there is none.
    compact: Option<Result<(Digest, CompactBlob), String>>,
}

impl Made {
    fn skipped(reason: String) -> Self {
        Self {
            ztoc: Err(reason),
            compact: None,
        }
    }

    fn outcome(&self) -> Outcome {
        match &self.ztoc {
            Ok((digest, bytes)) => Outcome::Indexed {
                ztoc: *digest,
                ztoc_size: bytes.len() as u64,
            },
            Err(reason) => Outcome::Skipped {
                skipped: reason.clone(),
            },
        }
    }

    fn compact_report(&self) -> Option<CompactReport> {
        let (_, blob) = self.compact.as_ref()?.as_ref().ok()?;
        Some(CompactReport {
            table: blob.table,
            table_size: blob.table_size as u64,
            blob_size: blob.bytes.len() as u64,
            spans: blob.spans,
        })
    }
}

async fn one_layer(
    image: &Image,
    layer: &LayerBlob,
    options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<Made> {
    if layer.size < options.min_layer_size {
        return Ok(Made::skipped(format!(
            "size {} is less than min-layer-size {}",
            layer.size, options.min_layer_size
        )));
    }
    if layer.packing == Packing::Zstd {
        return Ok(Made::skipped(
            "zstd: a zTOC can describe gzip and plain tar only".to_owned(),
        ));
    }
    let indexed = index(image, layer, options, progress).await?;
    for (what, actual, expected) in [
        ("digest", indexed.digest, layer.digest),
        ("diff ID", indexed.diff_id, layer.diff_id),
    ] {
        if actual != expected {
            return Err(Error::new(
                Kind::Corrupt,
                format!("its content has the {what} {actual}, where the image says {expected}"),
            ));
        }
    }
    Ok(Made {
        ztoc: match indexed.ztoc {
            Some(Ok(bytes)) => Ok((Digest::of(&bytes), bytes.into())),
            Some(Err(reason)) => Err(reason),
            None => Err("no zTOC was made".to_owned()),
        },
        compact: indexed
            .compact
            .map(|made| made.map(|blob| (Digest::of(&blob.bytes), blob))),
    })
}

/// Streams a layer through an indexer, which has a thread of its own.
async fn index(
    image: &Image,
    layer: &LayerBlob,
    options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<Indexed> {
    let mut pieces = image.source.stream(&layer.digest, layer.size).await?;
    let mut indexer = LayerIndexer::new(
        layer.packing,
        Options {
            span_size: options.span_size,
            build_tool: options.build_tool.clone(),
            ztoc: true,
            compact_span_size: options.compact_span_size,
        },
        NoSink,
    );
    let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_AHEAD);
    let thread = tokio::task::spawn_blocking(move || {
        while let Some(piece) = receiver.blocking_recv() {
            indexer.write(&piece)?;
        }
        indexer.finish()
    });
    let mut done: u64 = 0;
    while let Some(piece) = pieces.next().await {
        let piece = piece?; // the thread ends when the channel does
        done = done.saturating_add(piece.len() as u64);
        if sender.send(piece).await.is_err() {
            break; // the indexer has failed: its error follows
        }
        progress(layer.digest, done, layer.size);
    }
    drop(sender);
    match thread.await {
        Ok(Ok((indexed, NoSink))) => Ok(indexed),
        Ok(Err(error)) => Err(Error::with_source(error.kind(), "it cannot be read", error)),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::new(Kind::Io, "the program is shutting down")),
        },
    }
}

/// Stores an artifact of the image; gives its digest, and where it is.
async fn store(
    image: &Image,
    artifact: NewArtifact,
    local: &LocalIndexes,
) -> Result<(Digest, String)> {
    match image.source.layout() {
        Some(layout) if layout.is_writable() => Ok((
            layout.store(artifact).await?,
            image.source.reference().to_string(),
        )),
        _ => Ok((local.store(artifact).await?, "the local root".to_owned())),
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
            Outcome::Indexed { ztoc, .. } => write!(f, "layer {} -> ztoc {ztoc}", self.layer)?,
            Outcome::Skipped { skipped } => write!(
                f,
                "ztoc skipped - layer {} ({}): {skipped}",
                self.layer, self.media_type
            )?,
        }
        match &self.compact {
            Some(compact) => write!(
                f,
                ", compact table of {} bytes ({} spans, {} bytes with their windows)",
                compact.table_size, compact.spans, compact.blob_size
            ),
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
