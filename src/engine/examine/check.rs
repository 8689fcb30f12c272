//! `socinbd check`: compares the disks of a root with their checksums, and repairs them.

use std::{collections::HashSet, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    blocking::blocking,
    error::Result,
    layer::{ScrubReport, Store},
    oci::Digest,
};

/// Which disks to check.
#[derive(Clone, Debug, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CheckRequest {
    /// The layers whose disks are checked; `None`: all.
    pub layers: Option<HashSet<Digest>>,
}

/// Progress of a check.
#[derive(Clone, Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckEvent {
    /// A part of a layer's disk has been read.
    Reading {
        /// The layer.
        layer: Digest,
        /// Bytes read so far.
        done: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A disk has been checked.
    Checked(ScrubReport),
}

/// Checks disks one after another. `event` is called with the progress. A disk that cannot be checked is reported as wrong and does not
/// stop the check.
pub async fn check(
    store: &Arc<Store>,
    request: &CheckRequest,
    event: &(dyn Fn(CheckEvent) + Send + Sync),
) -> Result<()> {
    let listing = Arc::clone(store);
    let disks = blocking(move || listing.directories()).await?;
    let wanted = |layer: &Digest| {
        let layers = request.layers.as_ref();
        layers.is_none_or(|layers| layers.contains(layer))
    };
    for (layer, table) in disks.into_iter().filter(|(layer, _)| wanted(layer)) {
        event(CheckEvent::Checked(one(store, layer, table, event).await));
    }
    Ok(())
}

async fn one(
    store: &Arc<Store>,
    layer: Digest,
    table: Digest,
    event: &(dyn Fn(CheckEvent) + Send + Sync),
) -> ScrubReport {
    let wrong = |why: String| ScrubReport {
        wrong: vec![why],
        ..ScrubReport::new(layer, table)
    };
    let opening = Arc::clone(store);
    let disk = match blocking(move || opening.stored(&layer, &table)).await {
        Ok(Some(disk)) => disk,
        Ok(None) => {
            return wrong(
                "the disk is unusable as it is; it is repaired when an image with this layer is attached".to_owned(),
            );
        }
        Err(error) => return wrong(error.report()),
    };
    let size = disk.size();
    let (bytes, mut read) = tokio::sync::watch::channel(0);
    let mut scrub = std::pin::pin!(disk.scrub(bytes));
    loop {
        tokio::select! {
            biased;
            Ok(()) = read.changed() => {
                let done = *read.borrow_and_update();
                event(CheckEvent::Reading { layer, done, size });
            }
            report = &mut scrub => return report.unwrap_or_else(|error| wrong(error.report())),
        }
    }
}
