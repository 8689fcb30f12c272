//! Fetches the spans that an index lists for the start, while the image is being mounted.
//!
//! The lists are small blobs. They are fetched and processed in the background, so an attach does not wait for them. A list that is missing
//! or invalid only causes a line in the log. The priorities are compared across all layers.

use std::sync::{Arc, Weak};

use futures_util::{StreamExt as _, stream};

use super::{
    opened::{DiskBasis, LAYERS_AT_ONCE, OpenedLayer},
    search::FoundIndexes,
};
use crate::{
    compact::manifest::MAX_PREFETCH_BYTES,
    error::{Kind, Result, ResultExt as _},
    layer::{Disk, ListedSpans, Store},
    oci::manifest::MAX_MANIFEST_BYTES,
    soci::{index::BlobRef, prefetch::Prefetch},
    source::Source,
};

/// A prefetch list that is to be fetched.
struct PrefetchBlob {
    disk: Weak<Disk>,
    source: Source,
    blob: BlobRef,
    limit: u64,
}

/// Starts to fetch the spans that the indexes list for these layers. Each list has the span numbers of the table of its disk. Returns at
/// once.
pub(crate) fn start(store: &Arc<Store>, found: &FoundIndexes, layers: &[OpenedLayer]) {
    let incomplete = layers.iter().filter(|layer| !layer.disk.is_complete());
    let lists: Vec<PrefetchBlob> = incomplete
        .filter_map(|layer| list_of(found, layer))
        .collect();
    if lists.is_empty() {
        return;
    }
    let store = Arc::clone(store);
    tokio::spawn(async move {
        let mut listed: Vec<(i64, ListedSpans)> = Vec::new();
        let mut fetched = stream::iter(lists)
            .map(|list| async move { (read(&list).await, list) })
            .buffered(LAYERS_AT_ONCE);
        while let Some((read, list)) = fetched.next().await {
            let Some(disk) = list.disk.upgrade() else {
                continue;
            };
            match read {
                Ok(list) => listed.extend(of_disk(&disk, &list)),
                Err(error) => left_out(&disk, &error.report()),
            }
        }
        listed.sort_by_key(|(priority, _)| *priority);
        store.prefetch(listed.into_iter().map(|(_, listed)| listed).collect());
    });
}

/// The list of a layer, if the index has one.
fn list_of(found: &FoundIndexes, layer: &OpenedLayer) -> Option<PrefetchBlob> {
    let disk = &layer.disk;
    let digest = &disk.layer().digest;
    let (source, blob, limit) = match layer.basis {
        DiskBasis::Compact => {
            let compact = found.compact.as_ref()?;
            let list = compact.manifest.prefetch_of(compact.layer(digest)?)?;
            let blob = BlobRef {
                digest: list.blob,
                size: list.size,
            };
            (compact.source.clone(), blob, MAX_PREFETCH_BYTES)
        }
        DiskBasis::Ztoc => {
            let index = found.index.as_ref()?;
            let blob = match index.manifest.prefetch_of(digest) {
                Ok(blob) => blob?,
                Err(error) => {
                    left_out(disk, &error.to_string());
                    return None;
                }
            };
            (index.source().clone(), blob, MAX_MANIFEST_BYTES)
        }
        _ => return None,
    };
    Some(PrefetchBlob {
        disk: Arc::downgrade(disk),
        source,
        blob,
        limit,
    })
}

async fn read(list: &PrefetchBlob) -> Result<Prefetch> {
    let bytes = list
        .source
        .blob(&list.blob.digest, list.blob.size, list.limit)
        .await?;
    Prefetch::parse(&bytes).or_kind(Kind::Corrupt, || {
        format!("prefetch artifact {}", list.blob.digest)
    })
}

fn left_out(disk: &Disk, error: &str) {
    let layer = disk.layer().digest;
    tracing::warn!(%layer, error, "skipped a prefetch list");
}

fn of_disk(disk: &Arc<Disk>, list: &Prefetch) -> Vec<(i64, ListedSpans)> {
    let (_, count) = disk.span_counts();
    let runs = list.in_order(count).into_iter();
    runs.map(|(priority, spans)| {
        let disk = Arc::clone(disk);
        (priority, ListedSpans { disk, spans })
    })
    .collect()
}
