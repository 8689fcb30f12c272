//! Claims on chain IDs: images that name one chain ID for different layers, and layers that do not have the diff ID that their image states.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, Weak},
    time::Duration,
};

use super::{
    labels::{IMAGE, LayerRequest, TARGET},
    records::{LazyLayer, Snapshot},
    set::SnapshotSet,
};
use crate::{
    error::Result,
    layer::LayerBlob,
    metrics::METRICS,
    oci::{Digest, Reference},
};

impl SnapshotSet {
    /// Compares what an image says of the layer below with the snapshot that containerd has taken for it, without asking, by its chain ID.
    pub(super) fn compare_parent(
        self: &Arc<Self>,
        parent: &str,
        request: &LayerRequest,
        below: &LayerBlob,
    ) -> Result<()> {
        let chain = self.records.chain(parent).unwrap_or_default();
        let Some(existing) = chain.first().and_then(|snapshot| snapshot.layer.as_ref()) else {
            return Ok(());
        };
        let store = self.engine.disks().store();
        if existing.blob.digest != below.digest
            && !store.is_verified(&existing.blob, &existing.table)
        {
            let claim = (&request.image, &below.digest);
            self.note_conflict(existing, claim, "containerd uses the first for both");
        }
        Ok(())
    }

    /// Notes that another image names the chain ID of an unproven layer for another blob, and returns the text. The layer is compared with its
    /// diff ID soon.
    pub(super) fn note_conflict(
        self: &Arc<Self>,
        existing: &LazyLayer,
        (image, blob): (&Reference, &Digest),
        consequence: &str,
    ) -> String {
        METRICS.conflicting_claims.add(1);
        let why = format!(
            "the images {} and {image} name one chain ID for the layers {} and {blob}, which are not proven to be equal",
            existing.image, existing.blob.digest,
        );
        tracing::warn!(chain = %existing.chain_id, "{why}; {consequence}");
        let (set, layer) = (Arc::clone(self), existing.clone());
        tokio::spawn(async move {
            if let Err(error) = set.check_soon(layer, Duration::ZERO).await {
                tracing::warn!("comparing a layer with its diff ID: {}", error.report());
            }
        });
        why
    }
}

/// Tells which images a layer that does not have its diff ID has affected: those with its chain ID, and those with layers on it.
pub(super) fn tell_false_layer(sets: &[Weak<SnapshotSet>], layer: &LayerBlob, table: &Digest) {
    let sets: Vec<_> = sets.iter().filter_map(Weak::upgrade).collect();
    let all: Vec<_> = sets.iter().map(|set| set.records.list()).collect();
    let is_false = |it: &LazyLayer| it.blob == *layer && it.table == *table;
    for snapshots in &all {
        for found in snapshots {
            let Some(layer) = found.layer.as_ref().filter(|it| is_false(it)) else {
                continue;
            };
            let own = name_of(&layer.image);
            let chain = layer.chain_id.to_string();
            let same = all.iter().flatten().filter(|it| chain_of(it) == chain);
            let mut others: BTreeSet<String> = same.filter_map(|it| image_of(it)).collect();
            others.extend(
                on(snapshots, &found.name)
                    .iter()
                    .filter_map(|it| image_of(it)),
            );
            others.remove(&own);
            let others: Vec<String> = others.into_iter().collect();
            tracing::warn!(
                chain,
                layer = %layer.blob.digest,
                "the image {own} states a false diff ID, {}, and its layer is not served any more; {}",
                layer.blob.diff_id,
                match others.is_empty() {
                    true => "no other image is known to use its chain ID".to_owned(),
                    false => format!("other images that use its chain ID: {}", others.join(", ")),
                }
            );
        }
    }
}

/// The snapshots on another one, and those on them.
fn on(all: &[Arc<Snapshot>], name: &str) -> Vec<Arc<Snapshot>> {
    let (mut below, mut found) = (HashSet::from([name]), Vec::new());
    loop {
        let count = below.len();
        for snapshot in all {
            let is_on = snapshot
                .parent
                .as_deref()
                .is_some_and(|it| below.contains(it));
            if is_on && below.insert(&snapshot.name) {
                found.push(Arc::clone(snapshot));
            }
        }
        if below.len() == count {
            return found;
        }
    }
}

fn chain_of(snapshot: &Snapshot) -> String {
    match &snapshot.layer {
        Some(layer) => layer.chain_id.to_string(),
        None => snapshot.labels.get(TARGET).cloned().unwrap_or_default(),
    }
}

/// The image of a snapshot, as far as it is known.
fn image_of(snapshot: &Snapshot) -> Option<String> {
    match &snapshot.layer {
        Some(layer) => Some(name_of(&layer.image)),
        None => snapshot.labels.get(IMAGE).cloned(),
    }
}

/// An image by its tag, if it has one.
fn name_of(image: &Reference) -> String {
    let mut image = image.clone();
    if let Reference::Registry {
        tag: Some(_),
        digest,
        ..
    } = &mut image
    {
        *digest = None;
    }
    image.to_string()
}
