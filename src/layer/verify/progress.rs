//! The state of a layer's verification: whether it is complete, which spans it still needs, and why spans were revoked.

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

/// What is known.
pub(crate) struct LayerCheck {
    is_verified: AtomicBool,
    is_checking: AtomicBool,
    /// Why the last check came to no end.
    check_error: Mutex<Option<String>>,
    /// Until the layer has been checked.
    rest: Mutex<Option<Arc<NonFileBytes>>>,
    /// Spans that the check wants and no reader: they have nothing of a file and have not come yet, or what was kept of them beside the disk
    /// is lost.
    bare: Mutex<BTreeSet<SpanId>>,
    /// Why spans were taken back since the disk was opened.
    refutations: Mutex<Vec<(Range<u32>, Refutation)>>,
}

impl LayerCheck {
    /// Without a rest the layer has been checked.
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

    /// The layer has been checked: what was kept for that is let go.
    pub(crate) fn verified(&self) {
        self.is_verified.store(true, Ordering::Release);
        locked(&self.rest).take();
    }

    pub(crate) fn check_error(&self) -> Option<String> {
        locked(&self.check_error).clone()
    }

    /// Whether the caller is to check the layer now; [`Self::end_check`] must follow.
    pub(super) fn begin_check(&self) -> bool {
        !self.is_verified() && !self.is_checking.swap(true, Ordering::AcqRel)
    }

    /// The check has come to an end, or could not.
    pub(super) fn end_check(&self, error: Option<&Error>) {
        *locked(&self.check_error) = error.map(Error::report);
        self.is_checking.store(false, Ordering::Release);
    }

    /// What of the layer is in no file; `None` once the layer has been checked.
    pub(crate) fn rest(&self) -> Option<Arc<NonFileBytes>> {
        locked(&self.rest).clone()
    }

    /// Has the check fetch these spans, whoever else does.
    pub(crate) fn want(&self, spans: impl Iterator<Item = SpanId>) {
        locked(&self.bare).extend(spans);
    }

    /// The spans that only the check wants.
    pub(crate) fn bare(&self) -> BTreeSet<SpanId> {
        locked(&self.bare).clone()
    }

    /// Whether it is one of [`Self::bare`].
    pub(crate) fn is_bare(&self, span: SpanId) -> bool {
        locked(&self.bare).contains(&span)
    }

    /// A span has come.
    pub(crate) fn came(&self, span: SpanId) {
        locked(&self.bare).remove(&span);
    }

    /// Notes why spans are taken back.
    pub(crate) fn refute(&self, spans: Range<u32>, refutation: Refutation) {
        locked(&self.refutations).push((spans, refutation));
    }

    /// Why a span was taken back, if it was since the disk was opened.
    pub(crate) fn refutation(&self, span: SpanId) -> Option<Refutation> {
        let refutations = locked(&self.refutations);
        let of_it = refutations
            .iter()
            .rfind(|(spans, _)| spans.contains(&span.get()));
        of_it.map(|(_, refutation)| refutation.clone())
    }
}
