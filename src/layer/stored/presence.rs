//! The present spans of an open disk, and which of them may be in the page cache only.

use std::sync::Mutex;

use super::{present_spans::Bitmap, span_record::SpanCheck};
use crate::{layer::locked::locked, units::SpanId};

/// The present spans of one disk.
pub(crate) struct Presence {
    bitmap: Bitmap,
    /// Spans whose data and record may be in the page cache only.
    unsynced: Mutex<Vec<(SpanId, SpanCheck)>>,
}

impl Presence {
    pub(crate) fn new(bitmap: Bitmap) -> Self {
        Self {
            bitmap,
            unsynced: Mutex::default(),
        }
    }

    /// One bit per span.
    pub(crate) fn bitmap(&self) -> &Bitmap {
        &self.bitmap
    }

    /// Adds a span whose data was written to the file, if `make_readable` returns true. `None`: it returned false. Otherwise whether it is
    /// the first span since the last [`Self::take_unsynced`].
    pub(crate) fn add(
        &self,
        span: SpanId,
        check: SpanCheck,
        make_readable: impl FnOnce() -> bool,
    ) -> Option<bool> {
        // locked over both: a sync that sees that the span is present also finds it here
        let mut unsynced = locked(&self.unsynced);
        if !make_readable() {
            return None;
        }
        unsynced.push((span, check));
        Some(unsynced.len() == 1)
    }

    /// Takes the spans that have to be synced.
    pub(crate) fn take_unsynced(&self) -> Vec<(SpanId, SpanCheck)> {
        std::mem::take(&mut *locked(&self.unsynced))
    }

    /// Whether every present span has been synced.
    pub(crate) fn is_synced(&self) -> bool {
        locked(&self.unsynced).is_empty()
    }
}
