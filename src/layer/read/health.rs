//! The reasons for which a disk is degraded.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{Error, Kind},
    units::SpanId,
};

/// Maximum number of spans whose reasons are remembered.
const MAX_SPANS: usize = 64;

#[derive(Default)]
struct DegradedReasons {
    /// No source answers, or the local disk fails: ended by any success.
    outage: Option<Arc<Error>>,
    /// The local disk rejects spans: ended when it accepts them again.
    local_disk: Option<Arc<Error>>,
    /// The local disk loses spans that it had accepted: ended when a sync succeeds.
    sync: Option<Arc<Error>>,
    /// The layer as a whole does not match its digest. That does not end.
    whole: Option<Arc<Error>>,
    /// Spans with wrong bytes: each ended when the span's right bytes arrive.
    spans: BTreeMap<SpanId, Arc<Error>>,
}

impl DegradedReasons {
    /// Those that are about the present, and not about wrong bytes.
    fn now(&self) -> impl Iterator<Item = &Arc<Error>> {
        self.outage.iter().chain(&self.local_disk).chain(&self.sync)
    }
}

/// One reason for which a disk is degraded.
#[derive(
    Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct DegradedReason {
    /// The span with wrong bytes; `None`: the reason is not that of a single span.
    pub span: Option<u32>,
    /// The error.
    pub message: String,
}

/// All reasons for which a disk is degraded.
#[derive(Default)]
pub(crate) struct DiskHealth(Mutex<DegradedReasons>);

impl DiskHealth {
    /// These spans could not be fetched. Returns true if this reason is new, so that it is logged once and not with each failure.
    pub(crate) fn failed(&self, spans: &[SpanId], error: &Arc<Error>) -> bool {
        let mut reasons = self.lock();
        if error.kind() != Kind::Corrupt {
            return reasons.outage.replace(Arc::clone(error)).is_none();
        }
        let mut is_new = false;
        for span in spans {
            if reasons.spans.len() < MAX_SPANS || reasons.spans.contains_key(span) {
                is_new |= reasons.spans.insert(*span, Arc::clone(error)).is_none();
            }
        }
        is_new
    }

    /// A local operation that is not about a span has failed.
    pub(crate) fn failed_locally(&self, error: &Arc<Error>) {
        self.lock().outage = Some(Arc::clone(error));
    }

    /// The local disk rejects spans; `None`: it accepts them.
    pub(super) fn local_disk_rejects(&self, error: Option<&Arc<Error>>) {
        self.lock().local_disk = error.cloned();
    }

    /// A sync has failed; `None`: one has succeeded.
    pub(crate) fn sync_fails(&self, error: Option<Error>) {
        self.lock().sync = error.map(Arc::new);
    }

    /// The layer as a whole does not match its digest.
    pub(crate) fn failed_as_a_whole(&self, error: &Arc<Error>) {
        self.lock().whole = Some(Arc::clone(error));
    }

    /// All spans are readable: an outage of the sources does not matter any more.
    pub(crate) fn no_source_needed(&self) {
        self.lock().outage = None;
    }

    /// A span was fetched.
    pub(crate) fn fetched(&self, span: SpanId) {
        let mut reasons = self.lock();
        reasons.outage = None;
        reasons.spans.remove(&span);
    }

    /// The first reason, if there is one.
    pub(crate) fn degraded(&self) -> Option<String> {
        let reasons = self.lock();
        let corrupt = reasons.whole.iter().chain(reasons.spans.values());
        let first = reasons.now().chain(corrupt).next()?;
        Some(first.report())
    }

    /// All reasons: outage and local disk, the layer as a whole, and the spans in their order.
    pub(crate) fn reasons(&self) -> Vec<DegradedReason> {
        let reasons = self.lock();
        let all = reasons.now().chain(&reasons.whole);
        let spans = reasons.spans.iter();
        all.map(|error| (None, error))
            .chain(spans.map(|(span, error)| (Some(span.get()), error)))
            .map(|(span, error)| DegradedReason {
                span,
                message: error.report(),
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, DegradedReasons> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: Kind, text: &str) -> Arc<Error> {
        Arc::new(Error::new(kind, text))
    }

    #[test]
    fn an_outage_ends_with_any_span() {
        let health = DiskHealth::default();
        assert_eq!(health.degraded(), None);
        health.failed(&[SpanId(1)], &error(Kind::Unavailable, "away"));
        assert_eq!(health.degraded().as_deref(), Some("away"));
        health.fetched(SpanId(9));
        assert_eq!(health.degraded(), None);
    }

    #[test]
    fn a_failed_sync_is_a_reason_until_one_succeeds() {
        let health = DiskHealth::default();
        health.sync_fails(Some(Error::new(Kind::Io, "cannot sync")));
        health.fetched(SpanId(1));
        assert_eq!(health.degraded().as_deref(), Some("cannot sync"));
        assert_eq!(health.reasons().len(), 1);
        health.sync_fails(None);
        assert_eq!(health.degraded(), None);
    }

    #[test]
    fn a_wrong_span_is_a_reason_until_its_right_bytes_arrive() {
        let health = DiskHealth::default();
        health.failed(&[SpanId(1)], &error(Kind::Corrupt, "wrong"));
        health.fetched(SpanId(2));
        assert_eq!(health.degraded().as_deref(), Some("wrong"));
        health.fetched(SpanId(1));
        assert_eq!(health.degraded(), None);
    }

    #[test]
    fn every_reason_is_reported_with_its_span() {
        let health = DiskHealth::default();
        health.failed(
            &[SpanId(7), SpanId(3)],
            &error(Kind::Corrupt, "other bytes"),
        );
        health.failed(&[SpanId(9)], &error(Kind::Unavailable, "away"));
        let reasons = health.reasons();
        let reported: Vec<_> = reasons
            .iter()
            .map(|reason| (reason.span, reason.message.as_str()))
            .collect();
        assert_eq!(
            reported,
            [
                (None, "away"),
                (Some(3), "other bytes"),
                (Some(7), "other bytes")
            ]
        );
    }

    #[test]
    fn the_number_of_spans_with_a_reason_is_bounded() {
        let health = DiskHealth::default();
        let many = u32::try_from(MAX_SPANS).unwrap() * 2;
        for span in 0..many {
            health.failed(&[SpanId(span)], &error(Kind::Corrupt, "wrong"));
        }
        assert_eq!(health.reasons().len(), MAX_SPANS);
        // a span with a reason may get another one
        health.failed(&[SpanId(3)], &error(Kind::Corrupt, "wrong again"));
        let reasons = health.reasons();
        assert_eq!(reasons.len(), MAX_SPANS);
        assert_eq!(reasons[3].message, "wrong again");
        // a span that was fetched makes room for the next
        health.fetched(SpanId(0));
        health.failed(&[SpanId(many)], &error(Kind::Corrupt, "wrong"));
        let last = health.reasons().pop().unwrap();
        assert_eq!(last.span, Some(many));
    }

    #[test]
    fn a_layer_that_is_wrong_as_a_whole_stays_wrong() {
        let health = DiskHealth::default();
        health.failed_as_a_whole(&error(Kind::Corrupt, "another layer"));
        health.failed_locally(&error(Kind::Io, "full"));
        assert_eq!(health.degraded().as_deref(), Some("full"));
        assert_eq!(health.reasons().len(), 2);
        health.no_source_needed();
        health.fetched(SpanId(0));
        assert_eq!(health.degraded().as_deref(), Some("another layer"));
    }
}
