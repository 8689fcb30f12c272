//! The disk of a layer without a zTOC.
use super::{Disk, LayerBlob, Store};
use crate::{error::Result, source::Source};
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Streams {}

impl Store {
    /// The disk of a layer that has no zTOC: streamed once, indexed as it passes, complete at the end. `progress` is called with the
    /// compressed bytes so far. One stream a layer, however many ask.
    pub async fn streamed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        source: &Source,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Arc<Disk>> {
        let _ = (layer, source, progress);
        unimplemented!("module layer")
    }
}
