//! What an index says that a start will want, fetched while the image is being mounted.
//!
//! The lists are small blobs; they are fetched, and then followed, in the background: an attach does not wait for them, and what cannot
//! be had or read costs nothing but a line in the log. The order counts over all layers.

use std::sync::Arc;

use futures_util::{StreamExt as _, stream};

use super::{
    discovery::SociIndex,
    disks::{LAYERS_AT_ONCE, OpenedLayer},
    request::Basis,
};
use crate::{
    error::{Kind, Result, ResultExt as _},
    layer::{Disk, Listed, Store},
    oci::manifest::MAX_MANIFEST_BYTES,
    soci::{index::BlobRef, prefetch::Prefetch},
};

/// Starts to fetch what the index lists for these layers. Returns at once.
pub(super) fn start(store: &Arc<Store>, index: &SociIndex, layers: &[OpenedLayer]) {
    let mut lists = Vec::new();
    for layer in layers {
        let disk = &layer.disk;
        if !matches!(layer.basis, Basis::Ztoc) || disk.is_complete() {
            continue;
        }
        match index.manifest.prefetch_of(&disk.layer().digest) {
            Ok(Some(list)) => lists.push((Arc::downgrade(disk), list)),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(index = %index.digest, "a prefetch artifact is left out: {error}")
            }
        }
    }
    if lists.is_empty() {
        return;
    }
    let (store, index) = (Arc::clone(store), index.clone());
    tokio::spawn(async move {
        let fetching: Vec<_> = lists
            .into_iter()
            .map(|(disk, list)| {
                let index = &index;
                async move { (disk, read(index, &list).await) }
            })
            .collect();
        let mut listed: Vec<(i64, Listed)> = Vec::new();
        let mut fetched = stream::iter(fetching).buffered(LAYERS_AT_ONCE);
        while let Some((disk, list)) = fetched.next().await {
            let Some(disk) = disk.upgrade() else { continue };
            match list {
                Ok(list) => listed.extend(of_disk(&disk, &list)),
                Err(error) => tracing::warn!(
                    index = %index.digest,
                    layer = %disk.layer().digest,
                    error = error.report(),
                    "a prefetch artifact is left out"
                ),
            }
        }
        listed.sort_by_key(|(priority, _)| *priority);
        store.prefetch(listed.into_iter().map(|(_, listed)| listed).collect());
    });
}

async fn read(index: &SociIndex, list: &BlobRef) -> Result<Prefetch> {
    let bytes = index.place().blob(list, MAX_MANIFEST_BYTES).await?;
    Prefetch::parse(&bytes).or_kind(Kind::Corrupt, || {
        format!("prefetch artifact {}", list.digest)
    })
}

fn of_disk(disk: &Arc<Disk>, list: &Prefetch) -> Vec<(i64, Listed)> {
    let (_, count) = disk.span_counts();
    let runs = list.in_order(count).into_iter();
    runs.map(|(priority, spans)| {
        let disk = Arc::clone(disk);
        (priority, Listed { disk, spans })
    })
    .collect()
}
