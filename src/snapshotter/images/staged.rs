//! An image whose layers are being opened.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, join_all},
};

use crate::{
    blocking::broken_off,
    engine::DiskBasis,
    error::{Error, Kind, Result},
    layer::{Disk, LayerBlob},
    metrics::ExtractionReason,
    oci::Digest,
    snapshotter::rules::{Choice, Pull},
};

/// The result of work that several requests wait for.
pub(super) type Awaited<T> = Shared<BoxFuture<'static, Result<T, Arc<Error>>>>;

/// An image with the layers that are being opened.
pub(in crate::snapshotter) struct StagedImage {
    /// The layers, lowest first, with their chain IDs.
    layers: Vec<(LayerBlob, Digest)>,
    opening: HashMap<Digest, OpeningLayer>,
    /// Whether an index could not be read.
    has_warnings: bool,
}

/// A layer that is being opened.
pub(super) struct OpeningLayer {
    pub(super) choice: Choice,
    pub(super) work: Awaited<StagedLayer>,
}

/// An opened layer.
#[derive(Clone)]
pub(in crate::snapshotter) struct StagedLayer {
    pub(in crate::snapshotter) disk: Arc<Disk>,
    pub(in crate::snapshotter) basis: DiskBasis,
    /// What has chosen how it is pulled, for people.
    pub(in crate::snapshotter) chosen_by: String,
}

impl OpeningLayer {
    /// Whether a rule or a label wants it on a disk.
    pub(super) fn is_pulled(&self) -> bool {
        self.choice.pull == Pull::Disks && self.choice.is_asked_for
    }

    /// Whether a rule or a label leaves it to containerd.
    fn is_left(&self) -> bool {
        self.choice.pull == Pull::Containerd && self.choice.is_asked_for
    }
}

impl StagedImage {
    /// `layers`: lowest first, with their chain IDs.
    pub(super) fn new(
        layers: Vec<(LayerBlob, Digest)>,
        opening: HashMap<Digest, OpeningLayer>,
        has_warnings: bool,
    ) -> Self {
        Self {
            layers,
            opening,
            has_warnings,
        }
    }

    /// The position of a layer in the image, where its chain ID is this one.
    pub(in crate::snapshotter) fn position(&self, layer: &Digest, chain: &Digest) -> Option<usize> {
        self.layers
            .iter()
            .position(|(blob, id)| blob.digest == *layer && id == chain)
    }

    /// What the image says of the layer at a position: its blob and its chain ID.
    pub(in crate::snapshotter) fn claim(&self, position: usize) -> Option<&(LayerBlob, Digest)> {
        self.layers.get(position)
    }

    /// The chain ID below a position.
    pub(in crate::snapshotter) fn chain_below(&self, position: usize) -> Option<Digest> {
        Some(self.claim(position.checked_sub(1)?)?.1)
    }

    pub(super) fn opening(&self, position: usize) -> Result<&OpeningLayer, Arc<Error>> {
        let layer = self.layers.get(position);
        let opening = layer.and_then(|(blob, _)| self.opening.get(&blob.digest));
        let none = || Arc::new(Error::new(Kind::NotFound, "the image has no such layer"));
        opening.ok_or_else(none)
    }

    /// Why a layer that was tried, or was not to be tried, is not open.
    pub(in crate::snapshotter) fn reason_not_to_open(&self, position: usize) -> ExtractionReason {
        match self.opening(position) {
            Ok(layer) if layer.is_left() => ExtractionReason::Rule,
            // it may be in an index that could not be read
            Ok(layer) if layer.choice.pull == Pull::Containerd && !self.has_warnings => {
                ExtractionReason::Table
            }
            _ => ExtractionReason::Failure,
        }
    }

    /// Whether a part of it is not what it could be, and is to be tried again soon. Waits until all layers are opened.
    pub(super) async fn has_failed(&self) -> bool {
        let layers = self.opening.values().filter(|layer| !layer.is_left());
        let opened = join_all(layers.map(|layer| layer.work.clone())).await;
        self.has_warnings || opened.iter().any(Result::is_err)
    }
}

/// Why a part of an image is not there.
pub(in crate::snapshotter) enum NotOpen {
    /// The time for which containerd may be held up is over.
    Late(Error),
    /// It could not be opened.
    Failed(Error),
}

pub(super) fn late(limit: Duration) -> NotOpen {
    let why = format!("it was not opened within {} s", limit.as_secs_f64());
    NotOpen::Late(Error::new(Kind::Unavailable, why))
}

pub(super) fn silent() -> NotOpen {
    let why = "its registry does not answer";
    NotOpen::Late(Error::new(Kind::Unavailable, why))
}

/// Work in a task of its own, which several may wait for.
pub(super) fn awaited<T: Clone + Send + Sync + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Awaited<T> {
    let task = tokio::spawn(work);
    async move {
        let done = task.await;
        done.map_err(|error| broken_off("opening an image", error))
            .and_then(|done| done)
            .map_err(Arc::new)
    }
    .boxed()
    .shared()
}

pub(super) fn shared(error: Arc<Error>) -> Error {
    Error::with_source(error.kind(), "opening the image", error)
}
