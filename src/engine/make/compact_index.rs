//! Assembles a compact index from the parts of its layers, new or reused, and from prefetch lists.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;

use super::{
    options::CreateOptions,
    parts::{CompactPart, LayerResult, PartBlob},
    prefetch_lists::spans_of_uses,
};
use crate::{
    compact::{
        Table,
        manifest::{ARTIFACT_TYPE, CONFIG, LayerIndex, Manifest, PrefetchList, Subject},
    },
    engine::open::image::Image,
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, media_type::OCI_MANIFEST},
    soci::{files, prefetch::Prefetch},
    source::{Copied, Destination, Source, layout::NewArtifact},
    tar::Entry,
    ztoc::SpanTable,
};

/// Maximum size in bytes of a compact index blob that is held in memory. It is more than the windows of any layer take.
const MAX_BLOB_BYTES: u64 = 1 << 30;

/// A new compact index.
pub(crate) struct NewCompactIndex<'a> {
    /// The manifest and the new blobs.
    pub(crate) artifact: NewArtifact,
    /// Existing blobs that are reused, each with its source.
    existing: Vec<(LayerIndex, &'a Source)>,
}

impl<'a> NewCompactIndex<'a> {
    /// Makes the compact index of an image from the results of its layers; `None` if no layer has a part of one. The index has no subject
    /// if the image is going to name it by annotation.
    pub(crate) fn of(
        image: &Image,
        made: &'a HashMap<Digest, LayerResult>,
        options: &CreateOptions,
        subject: Option<Subject>,
    ) -> Result<Option<Self>> {
        let mut seen = HashSet::new();
        let parts: Vec<&CompactPart> = image
            .layers
            .iter()
            .filter(|layer| seen.insert(layer.digest))
            .filter_map(|layer| made.get(&layer.digest)?.compact.as_ref()?.as_ref().ok())
            .collect();
        if parts.is_empty() {
            return Ok(None);
        }
        let (mut blobs, mut existing) = (Vec::new(), Vec::new());
        for part in &parts {
            match &part.blob {
                PartBlob::New(bytes) => blobs.push(bytes.clone()),
                PartBlob::At(source) => existing.push((part.index, source)),
            }
        }
        let mut listed: Vec<(&CompactPart, Bytes)> = Vec::new();
        for (part, list) in lists(&parts, options)? {
            let bytes = list.to_bytes();
            let bytes = bytes.or_kind(Kind::Io, || "encoding a prefetch list".to_owned())?;
            listed.push((part, bytes.into()));
        }
        let kept = parts
            .iter()
            .filter_map(|part| Some((*part, part.prefetch.clone()?)));
        listed.extend(kept);
        let mut prefetch = Vec::new();
        for (part, bytes) in listed {
            prefetch.push(PrefetchList {
                layer: part.index.layer,
                table: part.index.table,
                blob: Digest::of(&bytes),
                size: bytes.len() as u64,
            });
            blobs.push(bytes);
        }
        blobs.push(Bytes::from_static(CONFIG));
        let manifest = Manifest {
            layers: parts.iter().map(|part| part.index).collect(),
            prefetch,
            subject,
            build_tool: Some(options.build_tool.clone()),
        };
        let bytes = manifest
            .to_bytes()
            .or_kind(Kind::Io, || "encoding the compact index".to_owned())?;
        Ok(Some(Self {
            artifact: NewArtifact {
                media_type: OCI_MANIFEST.to_owned(),
                manifest: bytes.into(),
                artifact_type: ARTIFACT_TYPE.to_owned(),
                annotations: BTreeMap::new(),
                blobs,
            },
            existing,
        }))
    }

    /// Copies the reused blobs to a destination, unless they exist or can be mounted there.
    pub(super) async fn copy_existing(&self, to: &Destination) -> Result<Vec<(Copied, u64)>> {
        let mut all = Vec::new();
        for (part, source) in &self.existing {
            let copied = to.copy_blob(source, &part.blob, part.size, None).await;
            all.push((copied.map_err(|error| of_part(error, part))?, part.size));
        }
        Ok(all)
    }

    /// The artifact with all blobs, new and reused.
    pub(crate) async fn with_all_blobs(self) -> Result<NewArtifact> {
        let mut artifact = self.artifact;
        for (part, source) in &self.existing {
            let bytes = source.blob(&part.blob, part.size, MAX_BLOB_BYTES).await;
            artifact
                .blobs
                .push(bytes.map_err(|error| of_part(error, part))?);
        }
        Ok(artifact)
    }
}

fn of_part(error: Error, part: &LayerIndex) -> Error {
    error.context(format!("part of layer {} in the compact index", part.layer))
}

/// Prefetch lists from the options: from named files or from a recorded start.
fn lists<'p>(
    parts: &[&'p CompactPart],
    options: &CreateOptions,
) -> Result<Vec<(&'p CompactPart, Prefetch)>> {
    if options.prefetch_files.is_empty() && options.uses.is_empty() {
        return Ok(Vec::new());
    }
    let tables: Vec<Table> = parts
        .iter()
        .map(|part| part.parse())
        .collect::<Result<_>>()?;
    let mut lists = Vec::new();
    if !options.prefetch_files.is_empty() {
        let tables: Vec<Option<(&[Entry], &SpanTable)>> = tables
            .iter()
            .map(|table| Some((&table.entries[..], &table.spans)))
            .collect();
        let listed = files::spans_of(&options.prefetch_files, &tables).layers;
        lists.extend(
            parts
                .iter()
                .zip(listed)
                .filter_map(|(part, list)| Some((*part, list?))),
        );
    }
    // One list per layer: named files are preferred to the recorded start.
    for (part, table) in parts.iter().zip(&tables) {
        let is_new = lists
            .iter()
            .all(|(listed, _): &(&CompactPart, _)| listed.index.layer != part.index.layer);
        if let (true, Some(list)) = (
            is_new,
            spans_of_uses(&part.index.layer, &table.spans, options),
        ) {
            lists.push((part, list));
        }
    }
    Ok(lists)
}
