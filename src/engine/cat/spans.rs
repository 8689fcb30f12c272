//! Helpers for reading the data of a file from spans, for both kinds of tables.

use std::ops::Range;

use bytes::Bytes;

use crate::{
    error::{Error, Kind, Result},
    units::LayerOffset,
};

/// Number of requests that run ahead of the reader.
pub(super) const SPANS_AHEAD: usize = 3;

/// The part of a decoded span, which is at `place` in the layer, that is in the range `wanted`.
pub(super) fn part(
    decoded: &Bytes,
    place: &Range<LayerOffset>,
    wanted: &Range<LayerOffset>,
) -> Result<Bytes> {
    let from = wanted.start.max(place.start);
    let to = wanted.end.min(place.end);
    let (Some(skip), Some(length)) = (
        from.get().checked_sub(place.start.get()),
        to.get().checked_sub(from.get()),
    ) else {
        return Ok(Bytes::new());
    };
    let skip = usize::try_from(skip).ok();
    let end = skip.zip(usize::try_from(length).ok());
    let end = end.and_then(|(skip, length)| skip.checked_add(length));
    match skip.zip(end) {
        Some((skip, end)) if end <= decoded.len() => Ok(decoded.slice(skip..end)),
        _ => Err(Error::new(
            Kind::Corrupt,
            "the decoded span is shorter than the table says",
        )),
    }
}
