//! Makes prefetch lists from the reads of a recorded start.

use super::options::CreateOptions;
use crate::{oci::Digest, soci::prefetch::Prefetch, units::SpanId, ztoc::SpanTable};

/// The prefetch list of a layer, with the spans in the order of the recorded reads; `None` if there are none.
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
