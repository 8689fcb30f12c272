//! The state of a layer's verification: whether it is complete, the spans that it still needs, and why spans were revoked.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{contradictions::Refutation, non_file_bytes::NonFileBytes};
use crate::{error::Error, layer::locked::locked, units::SpanId};

/// The state of the check of a whole layer.
pub(crate) struct LayerCheck {
    is_verified: AtomicBool,
    is_checking: AtomicBool,
    /// The error of the last check that could not be completed.
    check_error: Mutex<Option<String>>,
    /// `None` after the layer was checked.
    rest: Mutex<Option<Arc<NonFileBytes>>>,
    /// Spans that only the check needs: they have no data of a file and are not present, or their bytes in `rest` or `last` are lost.
    bare: Mutex<BTreeSet<SpanId>>,
    /// Why spans were revoked since the disk was opened.
    refutations: Mutex<Vec<(Range<u32>, Refutation)>>,
}

impl LayerCheck {
    /// Without `rest` the layer was checked before.
    pub(crate) fn new(rest: Option<NonFileBytes>, bare: BTreeSet<SpanId>) -> Self {
        Self {
            is_verified: AtomicBool::new(rest.is_none()),
            is_checking: AtomicBool::new(false),
            check_error: Mutex::default(),
            rest: Mutex::new(rest.map(Arc::new)),
            bare: Mutex::new(bare),
            refutations: Mutex::default(),
        }
    }

    pub(crate) fn is_verified(&self) -> bool {
        self.is_verified.load(Ordering::Acquire)
    }

    /// The layer has passed the check: the files for the check are closed.
    pub(crate) fn verified(&self) {
        self.is_verified.store(true, Ordering::Release);
        locked(&self.rest).take();
    }

    pub(crate) fn check_error(&self) -> Option<String> {
        locked(&self.check_error).clone()
    }

    /// Whether the caller has to check the layer now. [`Self::end_check`] must follow.
    pub(super) fn begin_check(&self) -> bool {
        !self.is_verified() && !self.is_checking.swap(true, Ordering::AcqRel)
    }

    /// The check has ended, with or without an error.
    pub(super) fn end_check(&self, error: Option<&Error>) {
        *locked(&self.check_error) = error.map(Error::report);
        self.is_checking.store(false, Ordering::Release);
    }

    /// The bytes of the layer that are in no file; `None` after the layer was checked.
    pub(crate) fn rest(&self) -> Option<Arc<NonFileBytes>> {
        locked(&self.rest).clone()
    }

    /// Makes the check fetch these spans.
    pub(crate) fn want(&self, spans: impl Iterator<Item = SpanId>) {
        locked(&self.bare).extend(spans);
    }

    /// The spans that only the check needs.
    pub(crate) fn bare(&self) -> BTreeSet<SpanId> {
        locked(&self.bare).clone()
    }

    /// Whether a span is one of [`Self::bare`].
    pub(crate) fn is_bare(&self, span: SpanId) -> bool {
        locked(&self.bare).contains(&span)
    }

    /// A span has become present.
    pub(crate) fn fetched(&self, span: SpanId) {
        locked(&self.bare).remove(&span);
    }

    /// Records why spans are revoked.
    pub(crate) fn refute(&self, spans: Range<u32>, refutation: Refutation) {
        locked(&self.refutations).push((spans, refutation));
    }

    /// Why a span was revoked, if that was since the disk was opened.
    pub(crate) fn refutation(&self, span: SpanId) -> Option<Refutation> {
        let refutations = locked(&self.refutations);
        let of_span = refutations
            .iter()
            .rfind(|(spans, _)| spans.contains(&span.get()));
        of_span.map(|(_, refutation)| refutation.clone())
    }
}
