//! `socinbd check`: compares the disks of a root with their checksums, and repairs them.

use std::{collections::HashSet, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Kind, Result, ResultExt as _},
    layer::{ScrubReport, Store},
    oci::Digest,
};

/// Which disks to check.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CheckRequest {
    /// Those of these layers; all where there is none.
    pub layers: Option<HashSet<Digest>>,
}

/// What happens in a check.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckEvent {
    /// So many bytes of a layer's disk have been read.
    Reading {
        /// The layer.
        layer: Digest,
        /// Bytes so far.
        done: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A disk has been checked.
    Checked(ScrubReport),
}

/// Checks disks one after another. `event` is told what happens; a disk that cannot be checked is wrong, and ends nothing.
pub async fn check(
    store: &Arc<Store>,
    request: &CheckRequest,
    event: &(dyn Fn(CheckEvent) + Send + Sync),
) -> Result<()> {
    let listing = Arc::clone(store);
    let disks = tokio::task::spawn_blocking(move || listing.folders()).await;
    let disks = disks.or_kind(Kind::Io, || "listing the disks".to_owned())??;
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
    let opened = tokio::task::spawn_blocking(move || opening.stored(&layer, &table)).await;
    let disk = match opened {
        Ok(Ok(Some(disk))) => disk,
        Ok(Ok(None)) => {
            return wrong(
                "it cannot be used as it is: it is made right when an image that has the layer is attached".to_owned(),
            );
        }
        Ok(Err(error)) => return wrong(error.report()),
        Err(error) => return wrong(error.to_string()),
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
